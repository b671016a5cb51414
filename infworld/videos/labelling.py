"""From the keyframes' poses to every frame's pose and action, with *uncertain* wherever the camera was lost."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from scipy.spatial.transform import Rotation, Slerp
from torch import Tensor

from infworld.actions import UNCERTAIN
from infworld.training.labels import label_actions, walking_pace
from infworld.training.walks import revisits
from infworld.training.worlds import STEP
from infworld.videos.mapping import Tracks

SHORTEST = 6  # frames that an action lasts at least; between two keyframes two actions look like a third one
BRIDGED = 3  # keyframes in a row that may be missing between two of one model
APART = 1.5  # degrees between what a model says and what the matches of a camera in place show
LEG = 4  # keyframes of a walk, at least, by which its pace is judged
UNEVEN = 2.0  # times as fast or as slow as the longest leg of a model: beyond, it is the scale that differs
ROUGH = 0.75  # of a model's usual step: places that jump about by more are not where the camera was
RETURNS_EVERY = 4  # frames from one to the next that `returns` looks at


@dataclass
class Poses:
    """Poses (T, 4, 4) of a shot's frames, NaN where lost, each in the scale and axes of its `model` (T,), -1 where
    lost. still: (T - 1,) bool, the camera is known to stay in place from a frame to the next. source: of `ClipInfo`.
    fov_degrees: horizontal, of the whole picture."""

    matrices: np.ndarray
    model: np.ndarray
    still: np.ndarray
    source: str
    fov_degrees: float


def from_tracks(tracks: Tracks, at: np.ndarray, frames: int) -> Poses:
    """The poses of frames 0 to `frames` - 1 from those of the keyframes, which show the rising instants `at` (K,), in
    frames. Those beyond the first and the last keyframe of a model, but not far, have its pose."""
    model, poses = _extend(tracks)
    matrices, models, instants = np.full((frames, 4, 4), np.nan), np.full(frames, -1), np.arange(frames)
    for number in range(model.max() + 1):
        known = np.flatnonzero(model == number)
        for run in filter(len, np.split(known, np.flatnonzero(np.diff(known) > BRIDGED + 1) + 1)):
            first = 0.0 if run[0] == 0 else at[run[0]]
            last = frames if run[-1] == len(at) - 1 else at[run[-1]]
            inside = instants[(instants >= first) & (instants <= last)]
            matrices[inside] = interpolate(at[run], poses[run], inside.clip(at[run[0]], at[run[-1]]))
            models[inside] = number
    step = np.searchsorted(at, instants[:-1], side="right").clip(1, max(1, len(tracks.still))) - 1
    still = tracks.still[step] if len(tracks.still) else np.zeros(frames - 1, bool)
    source = "none" if model.max() < 0 else "turning" if tracks.model.max() < 0 else "colmap"
    return Poses(matrices, models, still, source, 2 * math.degrees(math.atan(0.5 / float(tracks.focal))))


def interpolate(at: np.ndarray, poses: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Poses (N, 4, 4) at rising instants `at` -> those at instants `wanted` within them."""
    if len(at) == 1:
        return np.repeat(poses, len(wanted), 0)
    between = np.tile(np.eye(4), (len(wanted), 1, 1))
    between[:, :3, :3] = Slerp(at, Rotation.from_matrix(poses[:, :3, :3]))(wanted).as_matrix()
    between[:, :3, 3] = np.stack([np.interp(wanted, at, axis) for axis in poses[:, :3, 3].T], 1)
    return between


def _extend(tracks: Tracks) -> tuple[np.ndarray, np.ndarray]:
    """Models and poses with those of keyframes that COLMAP lost while the camera only turned.

    From a keyframe with a pose on, both ways, turns go on as long as the camera stays in place; where no keyframe has
    one, turns alone make a model.
    """
    tracks = replace(tracks, poses=_at_one_scale(tracks))
    model, poses = np.where(_rough(tracks) | _apart(tracks), -1, tracks.model), tracks.poses
    count = len(model)

    def turned(from_: int, to: int) -> None:
        step = np.eye(4)
        step[:3, :3] = tracks.turns[from_] if to > from_ else tracks.turns[to].T
        model[to], poses[to] = model[from_], poses[from_] @ step

    def spread() -> None:
        for a in range(count - 1):
            if tracks.still[a] and model[a] >= 0 > model[a + 1]:
                turned(a, a + 1)
        for a in range(count - 2, -1, -1):
            if tracks.still[a] and model[a + 1] >= 0 > model[a]:
                turned(a + 1, a)

    spread()
    for a in range(count - 1):
        if tracks.still[a] and model[a] < 0:
            model[a], poses[a] = model.max() + 1, np.eye(4)
            spread()
    return model, poses


def _at_one_scale(tracks: Tracks) -> np.ndarray:
    """Poses (K, 4, 4) whose walks before and after a turn in place have one scale, as far as their paces tell.

    Such a turn shows nothing of distances, so COLMAP's scale may differ tenfold there. In place, nothing moves.
    """
    poses = tracks.poses.copy()
    for number in np.unique(tracks.model[tracks.model >= 0]):
        known = np.flatnonzero(tracks.model == number)
        steps, apart = np.diff(poses[known, :3, 3], axis=0), np.diff(known)[:, None]
        walks = np.array([not tracks.still[a:b].all() for a, b in pairwise(known)], bool)
        steps[~walks] = 0
        bounds = np.flatnonzero(np.diff(walks, prepend=False, append=False)).reshape(-1, 2)
        legs = sorted((slice(a, b) for a, b in bounds if b - a >= LEG), key=lambda leg: leg.start - leg.stop)
        paces = [_pace(steps[leg] / apart[leg]) for leg in legs]
        usual = next(filter(None, paces), 0.0)
        for leg, pace in zip(legs, paces, strict=True):
            if pace and not 1 / UNEVEN < pace / usual < UNEVEN:
                steps[leg] *= usual / pace
        poses[known[1:], :3, 3] = poses[known[0], :3, 3] + steps.cumsum(0)
    return poses


def _pace(steps: np.ndarray) -> float:
    """The usual length of steps (N, 3) from keyframe to keyframe; 0 if they lead to and fro, as a hand shakes."""
    usual = np.median(np.linalg.norm(steps, axis=1))
    along = np.linalg.norm(np.lib.stride_tricks.sliding_window_view(steps, LEG, axis=0).mean(-1), axis=1)
    return float(usual) if np.quantile(along, 0.75) > usual / 2 else 0.0


def _rough(tracks: Tracks) -> np.ndarray:
    """Keyframes (K,) whose places jump about, as COLMAP has them where it was misled; not where the camera stood."""
    rough = np.zeros(len(tracks.model), bool)
    for number in range(tracks.model.max() + 1):
        known = np.flatnonzero(tracks.model == number)
        middle = known[1:-1][(known[2:] - known[:-2]) == 2]
        if not len(middle):
            rough[known] = True
            continue
        before, here, after = (tracks.poses[middle + offset, :3, 3] for offset in (-1, 0, 1))
        usual = np.quantile(np.linalg.norm(after - before, axis=1) / 2, 0.75)
        bends = np.pad(np.linalg.norm(after - 2 * here + before, axis=1), 2, mode="edge")
        jumping = np.median(np.lib.stride_tricks.sliding_window_view(bends, 5), axis=1) > ROUGH * usual
        rough[known] = jumping[np.abs(known[:, None] - middle).argmin(1)]
    stood = np.append(tracks.still, False) | np.append(False, tracks.still)
    return rough & ~stood


def _apart(tracks: Tracks) -> np.ndarray:
    """Keyframes (K,) by which a camera in place turned in another way than its matches show: COLMAP was misled."""
    both = tracks.still & (tracks.model[1:] >= 0) & (tracks.model[1:] == tracks.model[:-1])
    apart = np.zeros(len(tracks.model), bool)
    for a in np.flatnonzero(both):
        turned = tracks.poses[a, :3, :3].T @ tracks.poses[a + 1, :3, :3] @ tracks.turns[a].T
        if Rotation.from_matrix(turned).magnitude() > math.radians(APART):
            apart[a] = apart[a + 1] = True
    return apart


def label(poses: Poses, lost: np.ndarray, fps: float) -> tuple[np.ndarray, np.ndarray]:
    """Move and view of the T frames of a shot, (T,) each; the last one's are *uncertain*.

    lost: (T,) bool, frames that the film does not have. Uncertain is every step from or to a frame without a pose, and
    between two models.
    """
    move, view = (np.full(len(poses.model), UNCERTAIN) for _ in range(2))
    for number in range(poses.model.max() + 1):
        known = np.flatnonzero(poses.model == number)
        steps = known[:-1][np.diff(known) == 1]
        if not len(steps):
            continue
        whole = np.arange(known[0], known[-1] + 1)
        matrices = torch.from_numpy(interpolate(known, poses.matrices[known], whole))
        for labels, found in zip((move, view), label_actions(matrices, fps), strict=True):
            labels[steps] = found.numpy()[steps - known[0]]
    known_still = np.append(poses.still, False) & (poses.model >= 0) & (move != UNCERTAIN)
    move[known_still] = 0
    gone = lost | np.append(lost[1:], False)
    move[gone] = view[gone] = UNCERTAIN
    return _without_short(move), _without_short(view)


def _without_short(labels: np.ndarray) -> np.ndarray:
    """Labels (T,) that hold for less than SHORTEST frames made *uncertain*, except at the beginning and the end."""
    begins = np.flatnonzero(np.append(True, np.diff(labels) != 0))
    lengths = np.diff(np.append(begins, len(labels)))
    short = lengths < SHORTEST
    short[0] = short[-1] = False
    return np.where(np.repeat(short, lengths), UNCERTAIN, labels)


def at_one_pace(poses: Poses) -> tuple[np.ndarray, float]:
    """Poses of all models with the usual step while walking as their unit, and 1.0; or 0.0 if no model walks, and then
    as they are."""
    matrices, walks = poses.matrices.copy(), 0.0
    for number in range(poses.model.max() + 1):
        known = np.flatnonzero(poses.model == number)
        if len(known) < 2:
            continue
        whole = interpolate(known, poses.matrices[known], np.arange(known[0], known[-1] + 1))
        pace = walking_pace(torch.from_numpy(whole))
        if math.isfinite(pace):
            matrices[known, :3, 3] /= pace
            walks = 1.0
    return matrices, walks


def find_returns(matrices: np.ndarray, model: np.ndarray, pace: float, fov_degrees: float) -> Tensor:
    """`returns` of `dataset.Clip` for poses (T, 4, 4) whose unit is a step: as `walks.revisits` in each model."""
    returns = torch.full((len(matrices),), -1, dtype=torch.int32)
    for number in range(model.max() + 1):
        known = np.flatnonzero(model == number)[::RETURNS_EVERY]
        if not len(known):
            continue
        flat = torch.from_numpy(from_above(matrices[known])).float()
        flat[:, :2] *= STEP * pace
        found = revisits(flat[None], aside=math.radians(fov_degrees / 2 if fov_degrees else 40))[0]
        found = torch.where(found >= 0, torch.from_numpy(known)[found.clamp(min=0)], -1).int()
        for index, seen in zip(known, found, strict=True):
            returns[index : index + RETURNS_EVERY] = seen
    return returns


def from_above(matrices: np.ndarray) -> np.ndarray:
    """Poses (N, 4, 4) -> x, y, yaw, pitch (N, 4) in a level plane; the camera is upright on the whole."""
    up = -matrices[:, :3, 1].sum(0)
    up /= np.linalg.norm(up)
    ahead = matrices[0, :3, 2] - matrices[0, :3, 2] @ up * up
    ahead /= np.linalg.norm(ahead)
    level = np.stack([ahead, np.cross(up, ahead), up])
    eyes, sight = (matrices[:, :3, 3] - matrices[0, :3, 3]) @ level.T, matrices[:, :3, 2] @ level.T
    yaw, pitch = np.unwrap(np.arctan2(sight[:, 1], sight[:, 0])), np.arcsin(sight[:, 2].clip(-1, 1))
    return np.stack([eyes[:, 0], eyes[:, 1], yaw, pitch], 1)
