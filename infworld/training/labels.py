"""Actions from camera poses: what a pose estimator saw in real footage becomes training labels (spec section 3).

Poses are camera-to-world matrices (T, 4, 4) in the OpenCV convention: x right, y down, z forward, so column 2 of the
rotation is the direction of sight and column 3 the eye. Their scale is arbitrary. Step i leads from frame i to i + 1.

Translation and rotation are labelled apart, each with two thresholds: slower than `still` is no-op, faster than
`moving` is an action, and between the two lies *uncertain*, so that doubtful frames teach the model nothing wrong.

    infworld train labels poses.json --fps 30 --out actions.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infworld.actions import UNCERTAIN, ActionScript
from infworld.cli.console import exit_code
from infworld.training.worlds import EYE_HEIGHT


@dataclass(frozen=True)
class Thresholds:
    """Speeds below which nothing moves and above which something does, 0 <= still <= moving."""

    still: float
    moving: float

    def __post_init__(self):
        if not 0 <= self.still <= self.moving:
            raise ValueError(f"thresholds {self.still} and {self.moving}: expected 0 <= still <= moving")


MOVE_THRESHOLDS = Thresholds(0.2, 0.5)  # times the clip's typical walking speed
VIEW_THRESHOLDS = Thresholds(4.0, 12.0)  # degrees per second
WINDOW = 5  # steps of the median that quiets the estimator's jitter; it keeps changes of action where they are
DIAGONAL_RATIO = math.tan(math.radians(22.5))  # the lesser component counts from this share of the greater one on
COHERENT = 5.0  # how far a clip's motion must exceed its jitter to count as walking at all: jitter alone reaches 2.8
STRIDE = 10  # steps over which that is judged
TOLERANCE = 0.01  # of a pose's rotation, as its entries are rounded in files
FARTHEST = 1e9  # units from the origin; far beyond, differences of positions are lost in rounding

# Index of (ahead or up, left): rows back, none, ahead; columns right, none, left. The same for moves and views.
_INDEX = torch.tensor([[8, 2, 7], [4, 0, 3], [6, 1, 5]])


def label_actions(
    matrices: Tensor,
    fps: float = 30.0,
    move_thresholds: Thresholds = MOVE_THRESHOLDS,
    view_thresholds: Thresholds = VIEW_THRESHOLDS,
) -> tuple[Tensor, Tensor]:
    """Labels of the steps between frames.

    Args: matrices: (T, 4, 4) camera to world, T >= 2. fps: frames per second.
    Returns: move, view: (T - 1,) int64 indices of spec section 3.
    Raises: ValueError for another shape, a frame whose matrix is no pose, or an fps that is not positive and finite.
    """
    if matrices.dim() != 3 or matrices.shape[1:] != (4, 4) or len(matrices) < 2:
        raise ValueError(f"poses of shape {tuple(matrices.shape)}: expected (T, 4, 4) with T >= 2")
    if not 0 < fps < math.inf:
        raise ValueError(f"fps is {fps}, expected a finite number above 0")
    matrices = matrices.double()
    check_poses(matrices)
    steps = _median(_steps(matrices))
    typical = _typical_step(matrices[:, :3, 3], steps)
    move = _directions(steps[:, 2], -steps[:, 0], steps[:, 1], typical, move_thresholds)
    turns = torch.rad2deg(_median(_turns(matrices))) * fps
    view = _directions(turns[:, 0], -turns[:, 1], turns[:, 2], 1.0, view_thresholds)
    return move, view


def walking_pace(matrices: Tensor) -> float:
    """The usual length of a step between frames of (T, 4, 4) while the camera walks; infinite if it never does."""
    return _typical_step(matrices[:, :3, 3], _median(_steps(matrices)))


def check_poses(matrices: Tensor) -> None:
    """Raises ValueError for matrices (T, 4, 4) of which one is no pose; names the first such frame, counted from 0."""
    rotation = matrices[:, :3, :3]
    gram = rotation.mT @ rotation
    size = gram.diagonal(dim1=1, dim2=2).mean(-1).sqrt()
    bent = (gram / size.square()[:, None, None] - torch.eye(3, dtype=gram.dtype)).abs().amax((1, 2))
    last = (matrices[:, 3] - torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=matrices.dtype)).abs().amax(-1)
    checks = [
        (torch.isfinite(matrices).all(-1).all(-1), "has values that are not finite: leave out frames that were lost"),
        (last <= TOLERANCE, "does not end in the row 0 0 0 1: expected a camera-to-world matrix, columns the axes"),
        (matrices[:, :3, 3].abs().amax(-1) <= FARTHEST, f"has the eye more than {FARTHEST:.0e} away"),
        (bent <= TOLERANCE, "has axes that are not at right angles or not of one length: its rotation is none"),
        ((size - 1).abs() <= TOLERANCE, "has a rotation that is scaled: its columns must have length 1"),
        (
            torch.linalg.det(rotation.nan_to_num()) > 0,
            "is mirrored (determinant -1): expected x right, y down, z forward",
        ),
    ]
    for right, problem in checks:
        if not right.all():
            raise ValueError(f"frame {int((~right).nonzero()[0])} {problem}")


def naive_labels(matrices: Tensor, fps: float = 30.0) -> tuple[Tensor, Tensor]:
    """`label_actions` with one threshold, midway, and no *uncertain*: the ablation."""
    move, view = ((t.still + t.moving) / 2 for t in (MOVE_THRESHOLDS, VIEW_THRESHOLDS))
    return label_actions(matrices, fps, Thresholds(move, move), Thresholds(view, view))


def _steps(matrices: Tensor) -> Tensor:
    """Translations (T - 1, 3) in the axes of the camera: right, down, forward."""
    return torch.einsum("tij,ti->tj", matrices[:-1, :3, :3], matrices[1:, :3, 3] - matrices[:-1, :3, 3])


def _turns(matrices: Tensor) -> Tensor:
    """Rotation vectors (T - 1, 3) in radians about the camera's axes: turning up, turning right, rolling."""
    relative = matrices[:-1, :3, :3].mT @ matrices[1:, :3, :3]
    skew = relative - relative.mT
    axis = 0.5 * torch.stack((skew[:, 2, 1], skew[:, 0, 2], skew[:, 1, 0]), -1)  # sin(angle) times the unit axis
    sine = axis.norm(dim=-1)
    angle = torch.atan2(sine, 0.5 * (relative.diagonal(dim1=1, dim2=2).sum(-1) - 1))
    return axis * torch.where(sine > 1e-9, angle / sine.clamp(min=1e-9), 1.0)[:, None]


def _median(values: Tensor) -> Tensor:
    """Running median over WINDOW steps, (T, C) -> (T, C)."""
    reach = WINDOW // 2
    padded = torch.cat((values[:1].expand(reach, -1), values, values[-1:].expand(reach, -1)))
    return padded.unfold(0, WINDOW, 1).median(-1).values


def _typical_step(eyes: Tensor, steps: Tensor) -> float:
    """The clip's usual length of a step while it moves: the scale by which moves are judged; infinite if it never does.

    Jitter goes to and fro while walking goes on, so the length of STRIDE steps together tells one from the other.
    """
    stride = min(STRIDE, len(eyes) - 1)
    along = (eyes[stride:] - eyes[:-stride]).norm(dim=-1) / stride
    brisk = along.quantile(0.95)
    bends = (eyes[2:] - 2 * eyes[1:-1] + eyes[:-2]).norm(dim=-1)
    jitter = bends.median() / 3.75 if len(bends) else bends.new_zeros(())  # the deviation of one coordinate
    if brisk <= COHERENT * jitter * math.sqrt(2) / stride:
        return math.inf
    planar = torch.hypot(steps[:, 0], steps[:, 2])
    return planar[planar > 0.4 * brisk].median().item() if (planar > 0.4 * brisk).any() else brisk.item()


def _directions(ahead: Tensor, left: Tensor, other: Tensor, unit: float, thresholds: Thresholds) -> Tensor:
    """Nine directions, no-op or *uncertain* of two components; motion mostly along the third one is *uncertain*."""
    speed = torch.hypot(ahead, left) / unit
    greater = torch.maximum(ahead.abs(), left.abs())
    signs = (torch.where(c.abs() >= DIAGONAL_RATIO * greater, c.sign(), 0.0).long() for c in (ahead, left))
    row, column = signs
    label = _INDEX.to(ahead.device)[row + 1, column + 1]
    label = torch.where(speed < thresholds.moving, UNCERTAIN, label)
    label = torch.where(speed < thresholds.still, 0, label)
    aside = (other.abs() / unit >= thresholds.moving) & (other.abs() > unit * speed)
    return torch.where(aside & (thresholds.still < thresholds.moving), UNCERTAIN, label)


def poses_to_matrices(poses: Tensor) -> Tensor:
    """Poses (..., 4) of `worlds` -> camera-to-world matrices (..., 4, 4)."""
    x, y, yaw, pitch = poses.unbind(-1)
    zero = torch.zeros_like(x)
    right = torch.stack((yaw.sin(), -yaw.cos(), zero, zero), -1)
    forward = torch.stack((pitch.cos() * yaw.cos(), pitch.cos() * yaw.sin(), pitch.sin(), zero), -1)
    down = torch.stack((pitch.sin() * yaw.cos(), pitch.sin() * yaw.sin(), -pitch.cos(), zero), -1)
    eye = torch.stack((x, y, torch.full_like(x, EYE_HEIGHT), torch.ones_like(x)), -1)
    return torch.stack((right, down, forward, eye), -1)


def jitter(
    matrices: Tensor,
    generator: torch.Generator | None = None,
    position: float = 0.004,
    degrees: float = 0.1,
    scale: float = 1.0,
) -> Tensor:
    """What a pose estimator makes of matrices (T, 4, 4): independent noise in every frame, and another scale.

    Args: position: deviation of each coordinate in the units of the matrices, before `scale`. degrees: deviation of the
    rotation about each axis.
    """
    noise = torch.randn(2, len(matrices), 3, generator=generator, dtype=matrices.dtype)
    x, y, z = (torch.deg2rad(noise[0] * degrees)).unbind(-1)
    zero = torch.zeros_like(x)
    spin = torch.linalg.matrix_exp(torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), -1).unflatten(-1, (3, 3)))
    noisy = matrices.clone()
    noisy[:, :3, :3] = matrices[:, :3, :3] @ spin
    noisy[:, :3, 3] = (matrices[:, :3, 3] + noise[1] * position) * scale
    return noisy


def read_matrices(path: Path) -> Tensor:
    """Matrices (T, 4, 4) from a .npy file or a JSON list of T lists of 4 lists of 4 numbers.

    Raises: ValueError for a file that holds no such numbers.
    """
    try:
        text = None if path.suffix == ".npy" else path.read_text(encoding="utf-8-sig")
        values = np.load(path) if text is None else np.array(json.loads(text))
    except (ValueError, TypeError, EOFError, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"not a (T, 4, 4) array of numbers: {_first_line(error)}") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        kind = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
        raise ValueError(f"not a (T, 4, 4) array of numbers, but {kind}")
    return torch.from_numpy(values.astype(np.float64))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Label camera poses with actions, one per step between frames.")
    parser.add_argument("poses", type=Path, help="camera-to-world matrices (OpenCV axes), .json or .npy")
    parser.add_argument("--fps", type=float, default=30.0, help="frames per second of the poses")
    parser.add_argument("--out", type=Path, default=Path("actions.json"), help="where the actions go, as JSON")
    options = parser.parse_args(arguments)
    return exit_code(lambda: _label(options.poses, options.fps, options.out), "stopped; nothing was written")


def _label(poses: Path, fps: float, out: Path) -> None:
    try:
        move, view = label_actions(read_matrices(poses), fps)
    except ValueError as error:
        raise ValueError(f"{poses}: {error}") from error
    script = ActionScript.from_pairs(zip(move.tolist(), view.tolist(), strict=True))
    out.write_text(script.to_json(), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
