"""Worlds are the truth models are measured against: same seed, same picture; the way back shows what was seen."""

import math

import pytest
import torch

from infworld.training.render import render
from infworld.training.walks import (
    CIRCLE,
    KINDS,
    MIXED,
    OPPOSITE_MOVE,
    OPPOSITE_VIEW,
    QUARTER,
    VIEW_ONLY,
    expand,
    inverse,
    revisits,
    sample_actions,
)
from infworld.training.worlds import (
    BODY_RADIUS,
    EVAL_SEEDS,
    MOVE_DIRECTIONS,
    PITCH_LIMIT,
    STEP,
    TRAIN_SEEDS,
    TURN,
    VIEW_DIRECTIONS,
    WALK_RADIUS,
    captions,
    clearance,
    make_worlds,
    spawn,
    step,
    walk,
)

SIZE = {"height": 24, "width": 32, "supersample": 1}


@pytest.fixture(scope="module")
def worlds():
    return make_worlds(range(6))


@pytest.fixture(scope="module")
def starts(worlds):
    return spawn(worlds)


def actions(segments, count):
    return expand(segments)[:, None].expand(-1, count, -1)


def difference(first, second):
    return (first.float() - second.float()).abs().mean((-3, -2, -1))


def test_frames_are_uint8_of_the_asked_size(worlds, starts):
    frames = render(worlds[:2], starts[:2, None].expand(-1, 3, -1), **SIZE)
    assert frames.shape == (2, 3, 24, 32, 3)
    assert frames.dtype == torch.uint8


def test_a_seed_makes_the_same_world_in_any_company(worlds, starts):
    alone = make_worlds(torch.tensor([4]))
    assert torch.equal(spawn(alone), starts[4:5])
    assert torch.equal(render(alone, starts[4:5, None], **SIZE), render(worlds, starts[:, None], **SIZE)[4:5])


def test_other_seeds_make_other_worlds(worlds, starts):
    frames = render(worlds, starts[:, None], **SIZE)[:, 0]
    apart = difference(frames[:, None], frames[None])
    assert (apart + 1e3 * torch.eye(len(frames))).min() > 10


def test_training_never_draws_evaluation_seeds():
    assert not set(TRAIN_SEEDS[-3:]) & set(EVAL_SEEDS[:3])
    assert max(TRAIN_SEEDS) < min(EVAL_SEEDS)


def test_solids_out_of_sight_may_be_left_out(worlds, starts, monkeypatch):
    poses = starts[:3, None].repeat(1, 3, 1)
    poses[:, 1, 3], poses[:, 2, 3] = PITCH_LIMIT, -PITCH_LIMIT
    culled = render(worlds[:3], poses, **SIZE)
    monkeypatch.setattr("infworld.training.render._visible_solids", lambda *_: None)
    assert torch.equal(culled, render(worlds[:3], poses, **SIZE))


def test_supersampling_is_an_average_of_the_same_picture(worlds, starts):
    coarse = render(worlds[:2], starts[:2, None], 24, 32, supersample=1)
    fine = render(worlds[:2], starts[:2, None], 24, 32, supersample=3)
    assert (difference(coarse, fine) < 6).all()


def test_a_turn_of_320_frames_closes_the_circle(worlds, starts):
    poses = walk(worlds, starts, *actions([(0, 3, CIRCLE)], len(worlds)))
    ends = poses[:, [0, QUARTER, CIRCLE]]
    frames = render(worlds, ends, **SIZE)
    assert (difference(frames[:, 0], frames[:, 2]) < 0.5).all()
    assert (difference(frames[:, 0], frames[:, 1]) > 5).all()
    assert torch.allclose(poses[:, QUARTER, 2] - starts[:, 2], torch.tensor(math.pi / 2), atol=1e-4)


def test_forward_changes_the_picture_and_back_restores_it(worlds, starts):
    poses = walk(worlds, starts, *actions([(1, 0, 12), (2, 0, 12)], len(worlds)))
    assert torch.allclose(poses[:, 12, :2] - starts[:, :2], 12 * STEP * direction(starts), atol=1e-4)
    frames = render(worlds, poses[:, [0, 12, 24]], **SIZE)
    assert (difference(frames[:, 0], frames[:, 2]) < 0.5).all()
    assert (difference(frames[:, 0], frames[:, 1]) > 1.5).all()


def direction(poses):
    return torch.stack((poses[:, 2].cos(), poses[:, 2].sin()), -1)


def test_left_is_left(worlds, starts):
    frames = render(worlds, walk(worlds, starts, *actions([(0, 3, 8)], len(worlds)))[:, [0, 8]], 24, 32)
    shift = round(8 * TURN / math.radians(80) * 32)  # turning left moves what is seen to the right
    first, second = frames[:, 0].float(), frames[:, 1].float()
    moved = difference(first[:, :, : 32 - shift], second[:, :, shift:])
    wrong = difference(first[:, :, shift:], second[:, :, : 32 - shift])
    assert (moved < wrong).all()


def test_every_move_is_one_step_long_and_uncertain_stands_still():
    lengths = torch.tensor(MOVE_DIRECTIONS).norm(dim=-1)
    assert torch.allclose(lengths[1:9], torch.ones(8))
    assert lengths[0] == lengths[9] == 0


def test_opposite_actions_cancel():
    for directions, opposite in ((MOVE_DIRECTIONS, OPPOSITE_MOVE), (VIEW_DIRECTIONS, OPPOSITE_VIEW)):
        table = torch.tensor(directions, dtype=torch.float32)
        assert torch.allclose(table[list(opposite)], -table)


def test_a_walk_is_its_steps(worlds, starts):
    move, view = sample_actions({"random": 1.0}, len(worlds), 20, torch.Generator().manual_seed(3))
    pose = starts
    for frame in range(20):
        pose = step(worlds, pose, move[:, frame], view[:, frame])
    assert torch.equal(pose, walk(worlds, starts, move, view)[:, -1])


def test_moving_and_turning_at_once_can_be_retraced(worlds, starts):
    way = [(1, 3, 10), (5, 4, 8)]
    poses = walk(worlds, starts, *actions(way + inverse(way), len(worlds)))
    free = (clearance(worlds, poses[..., :2]) > BODY_RADIUS + STEP).all(1)
    assert free.sum() >= 3
    assert torch.allclose(poses[free, -1], starts[free], atol=1e-3)


def test_nobody_enters_a_landmark_or_leaves_the_disc():
    worlds = make_worlds(range(100, 164))
    move, view = sample_actions({"random": 1.0, "go_return": 1.0}, 64, 200, torch.Generator().manual_seed(0))
    poses = walk(worlds, spawn(worlds), move, view)
    distance = clearance(worlds, poses[..., :2])
    assert distance.min() > BODY_RADIUS - 2e-3
    assert distance.min() < BODY_RADIUS + 1e-3, "nobody met a landmark: the test says nothing"
    assert poses[..., :2].norm(dim=-1).max() < WALK_RADIUS + 1e-3
    assert poses[..., 3].abs().max() <= PITCH_LIMIT + 1e-6


def test_a_wall_is_slid_along():
    worlds = make_worlds([0])
    worlds.footprints[:, :, :2] = 1e3
    worlds.footprints[0, 0] = torch.tensor([2.0, 0.0, 1.0, 0.0, 0.5, 5.0, 0.0])
    oblique = torch.tensor([[0.0, 0.0, math.pi / 4, 0.0]])
    poses = walk(worlds, oblique, *actions([(1, 0, 90)], 1))[0]
    assert poses[-1, 0] == pytest.approx(1.5 - BODY_RADIUS, abs=1e-3)
    assert poses[-1, 1] == pytest.approx(90 * STEP * math.sqrt(0.5), abs=1e-2)


def test_spawns_are_free_level_and_look_at_something():
    worlds = make_worlds(EVAL_SEEDS[:200])
    poses = spawn(worlds, seed=1)
    assert clearance(worlds, poses[:, None, :2]).min() > BODY_RADIUS
    assert (poses[:, 3] == 0).all()
    assert not torch.equal(poses, spawn(worlds, seed=2))


def test_captions_are_short_plain_and_various():
    texts = captions(make_worlds(range(300)))
    assert all(0 < len(text.encode("ascii")) <= 60 for text in texts)
    assert len(set(texts)) > 200


def test_a_view_from_another_place_is_an_error(worlds, starts):
    with pytest.raises(ValueError, match="expected"):
        render(worlds, starts)
    with pytest.raises(ValueError, match="expected"):
        walk(worlds, starts, torch.zeros(6, 4, dtype=torch.int64), torch.zeros(6, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="difficulty"):
        make_worlds([0], difficulty=2.0)


def test_actions_are_decided_by_the_generator():
    first, second = (sample_actions(MIXED, 9, 100, torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for index in first:
        assert index.shape == (9, 100)
        assert index.dtype == torch.int64
        assert index.min() >= 0 and index.max() <= 8


def test_an_unknown_kind_of_walk_is_named():
    with pytest.raises(ValueError, match="moonwalk"):
        sample_actions({"moonwalk": 1.0}, 1, 10)


def test_view_only_walks_stay_in_place():
    move, view = sample_actions(VIEW_ONLY, 20, 100, torch.Generator().manual_seed(1))
    assert not move.any()
    assert view.any(1).all()


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"random"}))
def test_kinds_that_return_come_back(kind):
    open_land = make_worlds([0] * 8)
    open_land.footprints[:, :, :2] = 1e3
    start = torch.zeros(8, 4)
    move, view = sample_actions({kind: 1.0}, 8, 800, torch.Generator().manual_seed(2))
    seen = revisits(walk(open_land, start, move, view))
    assert (seen >= 0).any(1).float().mean() > 0.8


@pytest.mark.parametrize("kind", ["random", "look"])
def test_random_looks_never_reach_the_pitch_limit(kind):
    _, view = sample_actions({kind: 1.0}, 50, 1000, torch.Generator().manual_seed(3))
    rise = torch.tensor([direction[1] for direction in VIEW_DIRECTIONS])[view].cumsum(1)
    assert 12 <= rise.abs().max() <= 24


def test_revisits_are_the_latest_views_of_the_same_before_it_went_out_of_sight():
    frames = torch.arange(161)
    yaw = TURN * torch.minimum(frames, 160 - frames)  # a quarter turn and back
    poses = torch.zeros(1, 161, 4)
    poses[0, :, 2] = yaw
    seen = revisits(poses)[0]
    assert (seen[:116] == -1).all()  # nothing went out of sight of a view of 80 degrees
    assert seen[160] == 35  # the last frame within 40 degrees of yaw 0
    assert (seen[116:] >= 0).all()
    assert (seen[116:] <= frames[116:] - 36).all()
    assert revisits(poses, aside=1.5 * TURN)[0, 160] == 1
