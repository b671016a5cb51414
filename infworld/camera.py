"""Where the actions lead, by dead reckoning: nobody tells the model, and nothing stops at a wall."""

from __future__ import annotations

import numpy as np

from infworld.actions import MOVES, VIEWS, ActionScript

# What one frame of an action does, in the worlds that the tiny model was trained on.
TURN_DEGREES = 1.125
PITCH_DEGREES = 0.75
PITCH_LIMIT = 22.5
STEP = 0.04  # units

# When two views are of the same: the places this close and the directions this close.
NEAR = 4 * STEP
ALIKE_DEGREES = 6.0
# When the view has been left in between: turned away or gone by this much at least.
AWAY = 20 * STEP
AWAY_DEGREES = 35.0


def _directions(names: tuple[str, ...], plus: str, minus: str) -> np.ndarray:
    return np.array([(plus in name) - (minus in name) for name in names])


_FORWARD, _ASIDE = _directions(MOVES, "forward", "back"), _directions(MOVES, "right", "left")
_UP, _RIGHT = _directions(VIEWS, "up", "down"), _directions(VIEWS, "right", "left")


def walk(actions: ActionScript, frames: int) -> np.ndarray:
    """The camera in each of the first `frames` frames: x (right), z (ahead), yaw and pitch in degrees; frames x 4."""
    moves, views = np.array(actions.pairs(0, frames - 1), dtype=int).reshape(-1, 2).T
    yaw = np.concatenate([[0.0], np.cumsum(_RIGHT[views] * TURN_DEGREES)])
    heading = np.radians((yaw[1:] + yaw[:-1]) / 2)
    ahead, aside = _FORWARD[moves].astype(float), _ASIDE[moves].astype(float)
    length = np.maximum(np.hypot(ahead, aside), 1)  # a diagonal step is no longer than a straight one
    ahead, aside = STEP * ahead / length, STEP * aside / length
    x = np.concatenate([[0.0], np.cumsum(ahead * np.sin(heading) + aside * np.cos(heading))])
    z = np.concatenate([[0.0], np.cumsum(ahead * np.cos(heading) - aside * np.sin(heading))])
    pitch = np.zeros(frames)
    for frame, step in enumerate(_UP[views] * PITCH_DEGREES):  # not a sum: it stops at the limit
        pitch[frame + 1] = np.clip(pitch[frame] + step, -PITCH_LIMIT, PITCH_LIMIT)
    return np.stack([x, z, yaw, pitch], axis=1)


def revisits(poses: np.ndarray, most: int = 6) -> list[tuple[int, int, int]]:
    """Frames (first, away, again): the same view from the same place, with another one in between.

    At most `most`, spread over all there are, in order of the return.
    """
    found = []
    for again in range(len(poses) - 1, 0, -max(1, len(poses) // 160)):
        distance, degrees = _difference(poses[:again], poses[again])
        same = np.flatnonzero((distance < NEAR) & (degrees < ALIKE_DEGREES))
        if not len(same):
            continue
        first = same[np.argmin(distance[same] / NEAR + degrees[same] / ALIKE_DEGREES)]
        distance, degrees = _difference(poses[first:again], poses[first])
        away = np.maximum(distance / AWAY, degrees / AWAY_DEGREES)
        if away.max() >= 1:
            found.append((int(first), int(first + away.argmax()), again))
    found.reverse()
    chosen = np.unique(np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int))
    return [found[i] for i in chosen]


def _difference(poses: np.ndarray, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance of the places in units, and the larger of the two angles between the directions in degrees."""
    x, z, yaw, pitch = (poses - pose).T
    yaw = np.abs((yaw + 180) % 360 - 180)
    return np.hypot(x, z), np.maximum(yaw, np.abs(pitch))
