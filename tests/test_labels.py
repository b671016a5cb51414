"""Labels of clean poses are right; of noisy ones mostly right, and *uncertain* rather than wrong."""

import json

import numpy as np
import pytest
import torch

from infworld.actions import MOVES, UNCERTAIN, VIEWS
from infworld.training.labels import Thresholds, jitter, label_actions, main, naive_labels, poses_to_matrices
from infworld.training.walks import MIXED, expand, sample_actions
from infworld.training.worlds import MOVE_DIRECTIONS, VIEW_DIRECTIONS, make_worlds, walk

WALKS, FRAMES = 12, 200


def on_open_land(move, view):
    worlds = make_worlds([0] * len(move))
    worlds.footprints[:, :, :2] = 1e3
    return poses_to_matrices(walk(worlds, torch.zeros(len(move), 4), move, view))


@pytest.fixture(scope="module")
def walks():
    move, view = sample_actions(MIXED, WALKS, FRAMES, torch.Generator().manual_seed(0))
    matrices = on_open_land(move, view)
    inside = matrices[:, :, :2, 3].norm(dim=-1).amax(1) < 7.4
    assert inside.sum() > WALKS // 2
    return matrices[inside], move[inside], view[inside]


def shares(labeller, walks, noise, **settings):
    """Share of right, uncertain and wrong labels over all walks, moves and views together."""
    generator = torch.Generator().manual_seed(1)
    right = unsure = total = 0
    for matrices, *truth in zip(*walks, strict=True):
        noisy = jitter(matrices, generator, **settings) if noise else matrices
        for label, true in zip(labeller(noisy), truth, strict=True):
            right += (label == true).sum().item()
            unsure += ((label == UNCERTAIN) & (label != true)).sum().item()
            total += len(label)
    return right / total, unsure / total, (total - right - unsure) / total


def test_matrices_are_rotations_with_the_eye_above_the_ground(walks):
    rotation = walks[0][:, :, :3, :3]
    assert torch.allclose(rotation @ rotation.mT, torch.eye(3).expand_as(rotation), atol=1e-5)
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(rotation.shape[:2]), atol=1e-5)
    assert (rotation[..., 2, 1] < 0).all()  # y looks down


def test_clean_poses_are_labelled_without_an_error(walks):
    assert shares(label_actions, walks, noise=False)[0] == 1.0


@pytest.mark.parametrize("index", range(9))
def test_every_direction_has_its_label(index):
    still = torch.zeros(1, 20, dtype=torch.int64)
    held = torch.full((1, 20), index)
    move, view = label_actions(on_open_land(held, still)[0])
    assert (move == index).all() and (view == 0).all()
    move, view = label_actions(on_open_land(still, held)[0])
    assert (move == 0).all() and (view == index).all()
    assert len(MOVES) == len(VIEWS) == len(MOVE_DIRECTIONS) == len(VIEW_DIRECTIONS) == 10


@pytest.mark.parametrize("scale", [0.05, 1.0, 40.0])
def test_noisy_poses_of_any_scale_are_mostly_right(walks, scale):
    right, unsure, wrong = shares(label_actions, walks, noise=True, scale=scale)
    assert right > 0.95
    assert wrong < 0.005
    assert wrong < unsure


def test_uncertain_takes_the_place_of_wrong_labels(walks):
    settings = {"position": 0.008, "degrees": 0.2}
    right, unsure, wrong = shares(label_actions, walks, noise=True, **settings)
    assert right > 0.8
    assert wrong < unsure / 3
    naive_right, naive_unsure, naive_wrong = shares(naive_labels, walks, noise=True, **settings)
    assert naive_unsure == 0
    assert naive_wrong > 2 * wrong


def test_jitter_alone_is_not_walking():
    standing = torch.eye(4, dtype=torch.float64).expand(300, 4, 4)
    for seed in range(5):
        move, _ = label_actions(jitter(standing, torch.Generator().manual_seed(seed), scale=20.0))
        assert (move == 0).all()


def test_slow_motion_is_uncertain_and_slower_motion_is_none():
    truth = expand([(1, 4, 40), (1, 4, 40), (1, 4, 40)])
    speed = torch.tensor([1.0, 0.35, 0.1]).repeat_interleave(40)
    poses = torch.zeros(121, 4)
    poses[1:, 0] = (0.04 * speed).cumsum(0)
    poses[1:, 2] = -torch.deg2rad(0.8 * speed).cumsum(0)
    poses[1:, :2] = torch.stack((poses[1:, 2].cos(), poses[1:, 2].sin()), -1).mul(0.04 * speed[:, None]).cumsum(0)
    move, view = label_actions(poses_to_matrices(poses))
    for label, index in ((move, truth[0, 0]), (view, truth[1, 0])):
        assert (label[:38] == index).all()
        assert (label[42:78] == UNCERTAIN).all()
        assert (label[82:] == 0).all()


def test_frames_per_second_turn_angles_into_speeds(walks):
    matrices, _, view = (part[0] for part in walks)
    assert torch.equal(label_actions(matrices, fps=30)[1], view)
    assert (label_actions(matrices, fps=2)[1] == 0).all()


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        (torch.zeros(5, 3, 4), "expected"),
        (torch.zeros(1, 4, 4), "T >= 2"),
        (torch.full((5, 4, 4), torch.nan), "finite"),
    ],
)
def test_useless_poses_are_an_error(matrices, message):
    with pytest.raises(ValueError, match=message):
        label_actions(matrices)


def test_thresholds_must_be_in_order():
    with pytest.raises(ValueError, match="still <= moving"):
        Thresholds(2.0, 1.0)


@pytest.mark.parametrize("suffix", [".json", ".npy"])
def test_the_command_writes_the_exchange_format(walks, tmp_path, suffix):
    matrices, move, view = (part[0] for part in walks)
    poses, out = tmp_path / f"poses{suffix}", tmp_path / "actions.json"
    if suffix == ".npy":
        np.save(poses, matrices.numpy())
    else:
        poses.write_text(json.dumps(matrices.tolist()))
    main([str(poses), "--fps", "30", "--out", str(out)])
    expected = [{"move": MOVES[m], "view": VIEWS[v]} for m, v in zip(move, view, strict=True)]
    assert json.loads(out.read_text()) == expected


def test_a_file_without_matrices_is_an_error(tmp_path):
    (tmp_path / "poses.json").write_text('[[1, 2], ["x"]]')
    with pytest.raises(ValueError, match="poses.json"):
        main([str(tmp_path / "poses.json"), "--out", str(tmp_path / "actions.json")])
