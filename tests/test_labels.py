"""Labels of clean poses are right; of noisy ones mostly right, and *uncertain* rather than wrong."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from infworld.actions import MOVES, UNCERTAIN, VIEWS
from infworld.training.labels import Thresholds, jitter, label_actions, main, naive_labels, poses_to_matrices
from infworld.training.walks import MIXED, expand, sample_actions
from infworld.training.worlds import MOVE_DIRECTIONS, VIEW_DIRECTIONS, make_worlds, walk

WALKS, FRAMES = 12, 200
CASES = Path(__file__).parent / "cases"


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


def test_poses_of_a_walk_from_a_file_are_labelled(tmp_path):
    assert main([str(CASES / "poses-good.json"), "--out", str(tmp_path / "actions.json")]) == 0
    assert len(json.loads((tmp_path / "actions.json").read_text())) == 120
    text = "\ufeff" + (CASES / "poses-good.json").read_text()
    (tmp_path / "bom.json").write_text(text, encoding="utf-8")
    assert main([str(tmp_path / "bom.json"), "--out", str(tmp_path / "again.json")]) == 0
    assert (tmp_path / "again.json").read_text() == (tmp_path / "actions.json").read_text()


def turned(degrees: float) -> torch.Tensor:
    angle = math.radians(degrees)
    rows = [[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pose: pose[:3, :3].mul_(2), "frame 7 has a rotation that is scaled"),
        (lambda pose: pose[:3, :3].mul_(0.9), "frame 7 has a rotation that is scaled"),
        (lambda pose: pose[:3, 0].mul_(-1), r"frame 7 is mirrored \(determinant -1\)"),
        (lambda pose: pose[:3, 0].mul_(3), "frame 7 has axes that are not at right angles or not of one length"),
        (lambda pose: pose[:3, 0].add_(pose[:3, 2]), "frame 7 has axes that are not at right angles"),
        (lambda pose: pose[:3, :3].zero_(), "frame 7 has axes"),
        (lambda pose: pose[3].fill_(1), "frame 7 does not end in the row 0 0 0 1"),
        (lambda pose: pose.copy_(pose.T.clone()), "frame 7 does not end in the row 0 0 0 1"),
        (lambda pose: pose[0].fill_(math.nan), "frame 7 has values that are not finite"),
        (lambda pose: pose[2, 3].fill_(math.inf), "frame 7 has values that are not finite"),
        (lambda pose: pose[2, 3].fill_(1e300), r"frame 7 has the eye more than 1e\+09 away"),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".npy"])
def test_a_frame_that_is_no_pose_is_named(tmp_path, capsys, change, message, suffix):
    poses = torch.eye(4, dtype=torch.float64).repeat(20, 1, 1)
    poses[:, :3, :3] = torch.stack([turned(angle) for angle in range(20)])
    poses[:, :3, 3] = 0.5
    label_actions(poses)
    change(poses[7])
    path = tmp_path / f"poses{suffix}"
    np.save(path, poses.numpy()) if suffix == ".npy" else path.write_text(json.dumps(poses.tolist()))
    assert main([str(path), "--out", str(tmp_path / "actions.json")]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.startswith("error: ") and said.count("\n") == 1
    assert not (tmp_path / "actions.json").exists()


@pytest.mark.parametrize("fps", ["0", "-3", "nan", "inf"])
def test_frames_per_second_without_sense_are_an_error(tmp_path, capsys, fps):
    assert main([str(CASES / "poses-good.json"), f"--fps={fps}", "--out", str(tmp_path / "actions.json")]) == 2
    assert "expected a finite number above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    ['[[1, 2], ["x"]]', "", "{}", "null", "3", '{"poses": []}', "[[[1, 2], [3]]]", "[" * 100_000, "[[[true]]]",
     '[[["1", "0"], ["0", "1"]]]', "[1" + "0" * 400 + "]", "\0"],
)  # fmt: skip
def test_a_file_without_matrices_is_an_error_of_one_line(tmp_path, capsys, content):
    (tmp_path / "poses.json").write_text(content)
    assert main([str(tmp_path / "poses.json"), "--out", str(tmp_path / "actions.json")]) == 2
    said = capsys.readouterr().err
    assert "poses.json" in said and said.count("\n") == 1


def test_files_that_are_no_arrays_are_an_error_of_one_line(tmp_path, capsys):
    np.save(tmp_path / "objects.npy", np.array([{}, []], dtype=object))
    np.save(tmp_path / "complex.npy", np.zeros((5, 4, 4), complex))
    np.savez(tmp_path / "several.npz", a=np.zeros(3))
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    (tmp_path / "latin.json").write_bytes(b"[\xe9]")
    (tmp_path / "empty.npy").touch()
    (tmp_path / "huge.npy").write_bytes(npy_header((10**12, 4, 4)))
    (tmp_path / "folder.json").mkdir()
    names = [
        "objects.npy",
        "complex.npy",
        "several.npy",
        "latin.json",
        "empty.npy",
        "huge.npy",
        "folder.json",
        "gone.npy",
    ]
    for name in names:
        assert main([str(tmp_path / name), "--out", str(tmp_path / "actions.json")]) == 2
        said = capsys.readouterr().err
        assert name in said and said.count("\n") == 1, said
    poses, out = str(CASES / "poses-good.json"), str(tmp_path / "no" / "actions.json")
    assert main([poses, "--out", out]) == 2 and out in capsys.readouterr().err


def npy_header(shape: tuple[int, ...]) -> bytes:
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text.encode()
