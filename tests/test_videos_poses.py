"""From tracks and pose files to every frame's action: known motion is found again, the rest is uncertain."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from infworld.actions import MOVES, UNCERTAIN, VIEWS
from infworld.training.labels import poses_to_matrices
from infworld.training.walks import revisits
from infworld.training.worlds import STEP, TURN, motions
from infworld.videos.labelling import at_one_pace, find_returns, from_tracks, label
from infworld.videos.mapping import STILL, Tracks, best_focal, find_turns, fit_turn
from infworld.videos.pose_files import at_frames, find_poses, read_poses

AHEAD, BACK, ASIDE, LEFT, RIGHT = (1, 0), (2, 0), (4, 0), (0, 3), (0, 4)
SPACING = 4


def flat_walk(*segments: tuple[tuple[int, int], int]) -> tuple[torch.Tensor, np.ndarray]:
    """Poses (1, T + 1, 4) of `worlds` and the actions (2, T) of a walk where nothing stands in the way."""
    actions = torch.tensor([action for action, frames in segments for _ in range(frames)])
    moves, turns = motions(actions[None, :, 0], actions[None, :, 1])
    yaw = turns[0, :, 0].cumsum(0)
    heading = yaw - turns[0, :, 0] / 2
    ahead, aside = moves[0].unbind(1)
    steps = torch.stack(
        [heading.cos() * ahead - heading.sin() * aside, heading.sin() * ahead + heading.cos() * aside], 1
    )
    poses = torch.cat([steps.cumsum(0), yaw[:, None], torch.zeros(len(yaw), 1)], 1)
    return torch.cat([torch.zeros(1, 4), poses])[None], actions.T.numpy()


def matrices_of(poses: torch.Tensor) -> np.ndarray:
    return poses_to_matrices(poses[0]).double().numpy()


def tracks_of(matrices: np.ndarray, still: bool = False) -> tuple[Tracks, np.ndarray]:
    """What a perfect estimator finds in every fourth frame."""
    keys = matrices[::SPACING]
    turns = keys[:-1, :3, :3].transpose(0, 2, 1) @ keys[1:, :3, :3]
    tracks = Tracks(np.zeros(len(keys), int), keys.copy(), turns, np.full(len(keys) - 1, still), np.array(0.8))
    return tracks, np.arange(len(keys)) * float(SPACING)


WALK = ((AHEAD, 60), (LEFT, 48), (AHEAD, 40), (BACK, 52), (RIGHT, 60), (ASIDE, 41))


def test_a_walk_is_labelled_as_it_was_walked():
    flat, actions = flat_walk(*WALK)
    matrices = matrices_of(flat)
    tracks, at = tracks_of(matrices)
    poses = from_tracks(tracks, at, len(matrices))
    move, view = label(poses, np.zeros(len(matrices), bool), 30)
    assert move[-1] == view[-1] == UNCERTAIN  # nothing is known of what comes after
    certain = (move[:-1] != UNCERTAIN) & (view[:-1] != UNCERTAIN)
    assert certain.mean() > 0.95
    assert (np.stack([move, view])[:, :-1] == actions).all(0)[certain].mean() > 0.97
    assert poses.source == "colmap" and 60 < poses.fov_degrees < 70


def test_the_scale_does_not_matter_and_becomes_one_step():
    flat, _ = flat_walk(*WALK)
    matrices = matrices_of(flat)
    matrices[:, :3, 3] *= 37.0
    tracks, at = tracks_of(matrices)
    found, pace = at_one_pace(from_tracks(tracks, at, len(matrices)))
    assert pace == 1.0
    assert np.linalg.norm(found[30, :3, 3] - found[20, :3, 3]) == pytest.approx(10, rel=0.05)


def test_keyframes_that_were_lost_are_uncertain_and_a_few_are_bridged():
    flat, _ = flat_walk((AHEAD, 200))
    matrices = matrices_of(flat)
    tracks, at = tracks_of(matrices)
    tracks.model[10] = tracks.model[11] = -1  # frames 40 to 44
    tracks.model[20:35] = -1
    tracks.poses[tracks.model < 0] = np.nan
    move, view = label(from_tracks(tracks, at, 201), np.zeros(201, bool), 30)
    assert (move[:76] == 1).all() and (view[:76] == 0).all()
    assert (move[77:139] == UNCERTAIN).all() and (view[77:139] == UNCERTAIN).all()
    assert (move[141:196] == 1).all()


def test_what_lasts_for_an_eighth_of_a_second_is_no_action():
    flat, _ = flat_walk((AHEAD, 60), (ASIDE, 4), (AHEAD, 60))
    tracks, at = tracks_of(matrices_of(flat))
    move, _ = label(from_tracks(tracks, at, 125), np.zeros(125, bool), 30)
    assert (move[:58] == 1).all() and (move[60:64] == UNCERTAIN).all() and (move[66:124] == 1).all()


def test_frames_that_the_film_lost_are_uncertain():
    flat, _ = flat_walk((AHEAD, 100))
    tracks, at = tracks_of(matrices_of(flat))
    lost = np.zeros(101, bool)
    lost[30:34] = True
    move, view = label(from_tracks(tracks, at, 101), lost, 30)
    assert np.flatnonzero(move == UNCERTAIN).tolist() == [29, 30, 31, 32, 33, 100]
    assert np.array_equal(move == UNCERTAIN, view == UNCERTAIN)


def test_two_models_have_their_own_scales_and_a_seam_between():
    flat, _ = flat_walk((AHEAD, 200))
    tracks, at = tracks_of(matrices_of(flat))
    tracks.model[25:] = 1
    tracks.poses[25:, :3, 3] *= 50
    poses = from_tracks(tracks, at, 201)
    move, _ = label(poses, np.zeros(201, bool), 30)
    assert (move[:96] == 1).all() and (move[96:100] == UNCERTAIN).all() and (move[100:199] == 1).all()
    found, _ = at_one_pace(poses)
    assert np.linalg.norm(found[150, :3, 3] - found[140, :3, 3]) == pytest.approx(10, rel=0.05)


def test_a_turn_in_place_may_change_the_scale():
    flat, actions = flat_walk((AHEAD, 100), (LEFT, 80), (BACK, 60), (RIGHT, 80), ((0, 0), 20), (AHEAD, 60))
    matrices = matrices_of(flat)
    tracks, at = tracks_of(matrices)
    for first, last, factor in ((25, 45, 1), (60, 85, 0.05)):
        tracks.still[first:last] = True
        tracks.poses[last:, :3, 3] = (
            tracks.poses[last, :3, 3] + factor * (matrices[::4] - matrices[4 * last])[last:, :3, 3]
        )
    poses = from_tracks(tracks, at, 401)
    assert np.allclose(poses.matrices[::4], matrices[::4], atol=1e-6)
    move, view = label(poses, np.zeros(401, bool), 30)
    assert (move[:-1] == actions[0]).mean() > 0.97 and (view[:-1] == actions[1]).mean() > 0.97


def test_a_slower_walk_stays_slower_and_a_shaking_hand_is_no_walk():
    flat, _ = flat_walk((AHEAD, 100), (LEFT, 80), (AHEAD, 60), (RIGHT, 80), ((0, 0), 81))
    matrices = matrices_of(flat)
    matrices[180:241, :3, 3] = matrices[180, :3, 3] + 0.7 * (matrices[180:241] - matrices[180])[:, :3, 3]
    matrices[241:, :3, 3] = matrices[240, :3, 3]
    tracks, at = tracks_of(matrices)
    tracks.still[25:45] = tracks.still[60:80] = True
    tracks.poses[81:, :3, 3] += 0.002 * np.random.default_rng(0).standard_normal((20, 3))
    found = from_tracks(tracks, at, 402)
    assert np.allclose(found.matrices[:320:4], matrices[:320:4], atol=1e-6)
    move, _ = label(found, np.zeros(402, bool), 30)
    assert (move[322:400] == 0).all()


def test_a_camera_that_only_turns_has_views_and_no_moves():
    flat, actions = flat_walk((LEFT, 60), ((0, 0), 20), (RIGHT, 80))
    tracks, at = tracks_of(matrices_of(flat), still=True)
    tracks.model[:], tracks.poses[:] = -1, np.nan  # COLMAP has nothing
    poses = from_tracks(tracks, at, 161)
    move, view = label(poses, np.zeros(161, bool), 30)
    assert poses.source == "turning"
    assert (move[:-1] == 0).all() and (view[:-1] == actions[1]).mean() > 0.95
    assert at_one_pace(poses)[1] == 0.0


def test_turning_goes_on_from_where_the_walk_was_lost():
    flat, actions = flat_walk((AHEAD, 80), (LEFT, 120), (AHEAD, 80))
    matrices = matrices_of(flat)
    tracks, at = tracks_of(matrices)
    tracks.still[20:50] = True
    tracks.model[25:46], tracks.poses[25:46] = -1, np.nan
    poses = from_tracks(tracks, at, 281)
    assert np.allclose(poses.matrices[100:180:4], matrices[100:180:4], atol=1e-6)
    move, view = label(poses, np.zeros(281, bool), 30)
    assert (move[:-1] == actions[0]).mean() > 0.97 and (view[:-1] == actions[1]).mean() > 0.97


def test_places_that_jump_about_are_not_believed():
    flat, _ = flat_walk((AHEAD, 240))
    tracks, at = tracks_of(matrices_of(flat))
    tracks.poses[30:45, :3, 3] += 0.6 * np.random.default_rng(0).standard_normal((15, 3))
    move, _ = label(from_tracks(tracks, at, 241), np.zeros(241, bool), 30)
    assert (move[:100] == 1).all() and (move[192:239] == 1).all()
    assert (move[124:172] == UNCERTAIN).mean() > 0.8


def test_a_model_that_turns_otherwise_than_the_matches_is_not_believed():
    flat, actions = flat_walk((AHEAD, 40), (LEFT, 120))
    tracks, at = tracks_of(matrices_of(flat))
    tracks.still[10:] = True
    tracks.poses[15:30, :3, :3] = tracks.poses[15, :3, :3]  # COLMAP had it stand
    move, view = label(from_tracks(tracks, at, 161), np.zeros(161, bool), 30)
    assert (move[:-1] == actions[0]).mean() > 0.95 and (view[:-1] == actions[1]).mean() > 0.95


def test_a_film_without_any_pose_is_uncertain_throughout():
    tracks = Tracks(
        np.full(5, -1), np.full((5, 4, 4), np.nan), np.full((4, 3, 3), np.nan), np.zeros(4, bool), np.ones(())
    )
    move, view = label(from_tracks(tracks, np.arange(5) * 4.0, 20), np.zeros(20, bool), 30)
    assert (move == UNCERTAIN).all() and (view == UNCERTAIN).all()


def test_returns_are_those_of_the_procedural_walks():
    flat, _ = flat_walk((AHEAD, 80), (LEFT, 80), ((0, 0), 20), (RIGHT, 80), (BACK, 80))
    matrices = matrices_of(flat)
    matrices[:, :3, 3] /= STEP
    found = find_returns(matrices, np.zeros(len(matrices), int), 1.0, 80.0).numpy()
    expected = revisits(flat)[0].numpy()
    assert ((found >= 0) == (expected >= 0)).mean() > 0.97
    both = (found >= 0) & (expected >= 0)
    assert both.sum() > 60 and np.quantile(np.abs(found - expected)[both], 0.9) <= 4


# Turns


def matches_of(turn: np.ndarray, shift: float = 0.0, focal: float = 0.8, outliers: int = 0) -> np.ndarray:
    """Matches (200, 2, 2) of points at depths of 2 to 6 seen before and after a rotation and a step aside."""
    rng = np.random.default_rng(0)
    first = rng.uniform(-0.4, 0.4, (200, 2)) * [1, 0.75]
    points = np.concatenate([first / focal, np.ones((200, 1))], 1) * rng.uniform(2, 6, (200, 1))
    points = (points - [shift, 0, 0]) @ turn
    second = points[:, :2] / points[:, 2:] * focal + 0.0005 * rng.standard_normal((200, 2))
    second[:outliers] = rng.uniform(-0.4, 0.4, (outliers, 2))
    return np.stack([first, second], 1)


def test_the_turn_between_two_pictures_is_found_despite_outliers():
    turn = Rotation.from_euler("yx", [12, 3], degrees=True).as_matrix()
    found, off = fit_turn(matches_of(turn, outliers=30), 0.8)
    assert np.allclose(found, turn, atol=2e-3) and off < STILL


def test_a_step_aside_is_told_from_a_turn():
    turn = Rotation.from_euler("y", 5, degrees=True).as_matrix()
    pairs = {(a, a + d): matches_of(turn, shift=0.1 * d) for a in range(8) for d in (1, 4) if a + d < 8}
    turns, still = find_turns(pairs, 8, 0.8)
    assert np.isfinite(turns).all() and not still.any()
    pairs = {(a, a + d): matches_of(turn) for a in range(8) for d in (1, 4) if a + d < 8}
    assert find_turns(pairs, 8, 0.8)[1].all()


def test_there_and_back_is_not_still():
    turn = np.eye(3)
    shifts = {(a, b): 0.1 * ((b % 4) - (a % 4)) for a in range(9) for b in range(a + 1, min(a + 5, 9))}
    pairs = {pair: matches_of(turn, shift=shift) for pair, shift in shifts.items()}
    assert not find_turns(pairs, 9, 0.8)[1].any()


def test_the_focal_length_shows_in_turns():
    turn = Rotation.from_euler("y", 20, degrees=True).as_matrix()
    for degrees in (50, 70, 90):
        focal = 0.5 / math.tan(math.radians(degrees / 2))
        assert best_focal({(0, 4): matches_of(turn, focal=focal)}, 9.0) == pytest.approx(focal, rel=0.05)
    assert best_focal({(0, 4): matches_of(np.eye(3))}, 9.0) == 9.0  # a still camera shows none
    assert best_focal({(0, 4): matches_of(turn, shift=0.5)}, 9.0) == 9.0
    assert best_focal({}, 9.0) == 9.0


# Pose files


def write_tum(path: Path, times: np.ndarray, matrices: np.ndarray) -> None:
    quaternions = Rotation.from_matrix(matrices[:, :3, :3]).as_quat()
    rows = np.concatenate([times[:, None], matrices[:, :3, 3], quaternions], 1)
    np.savetxt(path, rows, header="timestamp tx ty tz qx qy qz qw", fmt="%.9f")


@pytest.fixture
def walk() -> np.ndarray:
    return matrices_of(flat_walk((AHEAD, 60), (LEFT, 40))[0])


def read(path: Path, axes: str = "opencv", turns: int = 0):
    return read_poses(path, axes, 30.0, turns)


def test_tum_files_read_by_their_own_clock(tmp_path, walk):
    write_tum(tmp_path / "a.txt", 1.7e9 + np.arange(101) / 30, walk)
    times, matrices, focal = read(tmp_path / "a.txt")
    assert np.allclose(times, np.arange(101) / 30, atol=1e-5) and np.allclose(matrices, walk, atol=1e-6) and focal == 0


def test_opengl_axes_are_turned(tmp_path, walk):
    opengl = walk.copy()
    opengl[:, :3, 1:3] *= -1
    write_tum(tmp_path / "a.tum", np.arange(101) / 30, opengl)
    np.save(tmp_path / "b.npy", opengl)
    for name in ("a.tum", "b.npy"):
        times, matrices, _ = read(tmp_path / name, "opengl")
        assert np.allclose(times, np.arange(101) / 30) and np.allclose(matrices, walk, atol=1e-6)


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_logs_of_a_phone_are_of_its_sensor(tmp_path, walk, turns):
    """The sensor of a phone that is held upright lies on its side: what it calls right is up or down."""
    sensor = walk.copy()
    sensor[:, :3, :3] = walk[:, :3, :3] @ Rotation.from_euler("z", -90 * turns, degrees=True).as_matrix()
    quaternions = Rotation.from_matrix(sensor[:, :3, :3]).as_quat()
    rows = [
        ", ".join(map(str, (5000 + n / 30, n, *matrix[:3, 3], *quaternion)))
        for n, (matrix, quaternion) in enumerate(zip(sensor, quaternions, strict=True))
    ]
    (tmp_path / "stray.csv").write_text("timestamp, frame, x, y, z, qx, qy, qz, qw\n" + "\n".join(rows))
    arkit = sensor.copy()
    arkit[:, :3, 1:3] *= -1
    rows = [",".join(map(str, (5000 + n / 30, *matrix[:3].flatten()))) for n, matrix in enumerate(arkit)]
    (tmp_path / "arkit.txt").write_text("\n".join(rows))
    for name in ("stray.csv", "arkit.txt"):
        times, matrices, _ = read(tmp_path / name, turns=turns)
        assert np.allclose(times, np.arange(101) / 30, atol=1e-6) and np.allclose(matrices, walk, atol=1e-6)


@pytest.mark.parametrize("form", ["text", "binary"])
def test_a_colmap_model_counts_frames_by_its_images_names(tmp_path, walk, form):
    pycolmap = pytest.importorskip("pycolmap")
    model = pycolmap.Reconstruction()
    camera = pycolmap.Camera.create_from_model_name(1, "SIMPLE_PINHOLE", 480.0, 640, 360)
    model.add_camera_with_trivial_rig(camera)
    for number in range(0, 101, 5):
        image = pycolmap.Image(name=f"walk/frame_{number:04d}.jpg", camera_id=1, image_id=number + 1)
        pose = pycolmap.Rigid3d(np.linalg.inv(walk[number])[:3])
        model.add_image_with_trivial_frame(image, pose)
    (tmp_path / "film").mkdir()
    getattr(model, f"write_{form}")(tmp_path / "film")
    times, matrices, focal = read(tmp_path / "film")
    assert np.allclose(times, np.arange(0, 101, 5) / 30) and np.allclose(matrices, walk[::5], atol=1e-6)
    poses = at_frames(times, matrices, focal, np.arange(101) / 30)
    assert poses.fov_degrees == pytest.approx(2 * math.degrees(math.atan(320 / 480)))
    move, view = label(poses, np.zeros(101, bool), 30)
    assert (move[:58] == 1).all() and (view[62:98] == 3).all()


def test_gaps_and_ends_of_a_file_are_uncertain(walk):
    times = np.arange(101) / 30
    kept = (times < 1) | (times > 2)
    move, _ = label(at_frames(times[kept], walk[kept], 0.0, np.arange(150) / 30), np.zeros(150, bool), 30)
    assert (move[:28] == 1).all() and (move[31:60] == UNCERTAIN).all() and (move[62:99] == 0).all()
    assert (move[101:] == UNCERTAIN).all()


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.txt", "1 2 3\n4 5 6\n", "a line has 3 values, expected 8"),
        ("a.txt", "0 0 0 0 0 0 0 0\n1 0 0 0 0 0 0 0\n", "a quaternion of zeros"),
        ("a.txt", "0 0 0 0 0 0 0 1\n", "it has 1 poses"),
        ("a.txt", "0 0 0 0 0 0 0 one\n1 0 0 0 0 0 0 1\n", "could not convert"),
        ("a.txt", "0 nan 0 0 0 0 0 1\n1 0 0 0 0 0 0 1\n", "not finite"),
        ("a.json", "[1, 2]", "expected"),
        ("a.pkl", "", "no known form of poses"),
    ],
)
def test_files_that_hold_no_poses_say_what_is_wrong(tmp_path, name, text, problem):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=problem) as error:
        read(tmp_path / name)
    assert name in str(error.value)


def test_poses_are_found_by_the_films_name(tmp_path):
    (tmp_path / "walks").mkdir()
    (tmp_path / "walks" / "a.txt").touch()
    assert find_poses(tmp_path, "walks/a.mp4") == tmp_path / "walks" / "a.txt"
    assert find_poses(tmp_path, "a.mp4") is None
    (tmp_path / "walks" / "a.json").touch()
    with pytest.raises(ValueError, match="several files"):
        find_poses(tmp_path, "walks/a.mp4")


def test_names_of_actions_are_as_used_here():
    assert (MOVES[1], MOVES[2], MOVES[4], VIEWS[3], VIEWS[4]) == (
        "go forward", "go back", "go right", "turn left", "turn right",
    )  # fmt: skip
    assert TURN > 0
