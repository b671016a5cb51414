"""Where the actions lead, by dead reckoning: nobody tells the model, and nothing stops at a wall.

The one home of what an action does to the camera (numbers: `CameraConfig`) and of when a view was seen before. The
page's map is given `motion` and does the same in the browser.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from infworld.actions import MOVES, VIEWS, ActionScript
from infworld.config import CameraConfig

DEFAULT = CameraConfig()

# When two frames are of one view: places this close and directions this close. The halves keep whole numbers of steps,
# which many walks are apart, off the border.
NEAR_STEPS = 4.5
ALIKE_DEGREES = 6.0
# When a view has been left in between: gone this far, or turned away by half the field of view.
AWAY_STEPS = 20.5


def _directions(names: tuple[str, ...], plus: str, minus: str) -> np.ndarray:
    return np.array([(plus in name) - (minus in name) for name in names], dtype=float)


# Of every move, right and ahead; a diagonal is no longer than the others. Of every view, right and up.
MOVE_DIRECTIONS = np.stack([_directions(MOVES, "right", "left"), _directions(MOVES, "forward", "back")], axis=1)
MOVE_DIRECTIONS /= np.maximum(np.linalg.norm(MOVE_DIRECTIONS, axis=1, keepdims=True), 1)
VIEW_DIRECTIONS = np.stack([_directions(VIEWS, "right", "left"), _directions(VIEWS, "up", "down")], axis=1)


def motion(camera: CameraConfig = DEFAULT) -> dict[str, Any]:
    """What one frame of every action does, and when a view was seen before, for JSON.

    moves: [right, ahead] in units by index of `MOVES`; views: [turn, pitch] in degrees by index of `VIEWS`.
    """
    return {
        "moves": (MOVE_DIRECTIONS * camera.step).tolist(),
        "views": (VIEW_DIRECTIONS * (camera.turn_degrees, camera.pitch_degrees)).tolist(),
        "pitch_limit": camera.pitch_limit,
        "fov_degrees": camera.fov_degrees,
        "step": camera.step,
        "near": NEAR_STEPS * camera.step,
        "alike_degrees": ALIKE_DEGREES,
        "away": AWAY_STEPS * camera.step,
        "away_degrees": camera.fov_degrees / 2,
    }


def walk(actions: ActionScript, frames: int, camera: CameraConfig = DEFAULT) -> np.ndarray:
    """The camera in each of the first `frames` frames: x (right), z (ahead), yaw and pitch in degrees; frames x 4.

    A move goes along the mean of the old and the new yaw, so that the opposite actions backwards retrace the way.
    """
    table = motion(camera)
    moves, views = np.array(actions.pairs(0, frames - 1), dtype=int).reshape(-1, 2).T
    aside, ahead = np.array(table["moves"])[moves].T
    turn, rise = np.array(table["views"])[views].T
    yaw = np.concatenate([[0.0], np.cumsum(turn)])
    heading = np.radians(yaw[:-1] + turn / 2)
    x = np.concatenate([[0.0], np.cumsum(ahead * np.sin(heading) + aside * np.cos(heading))])
    z = np.concatenate([[0.0], np.cumsum(ahead * np.cos(heading) - aside * np.sin(heading))])
    pitch = np.zeros(frames)
    for frame, step in enumerate(rise):  # not a sum: it stops at the limit
        pitch[frame + 1] = np.clip(pitch[frame] + step, -camera.pitch_limit, camera.pitch_limit)
    return np.stack([x, z, yaw, pitch], axis=1)


def seen_before(poses: np.ndarray, frame: int, camera: CameraConfig = DEFAULT, *, view: bool = True) -> np.ndarray:
    """The earlier frames (indices, in order) of the same view from the same place, which was left since then.

    view=False: of the same place, wherever the camera looked; it must then be left by walking.
    """
    distance, degrees = _difference(poses[:frame], poses[frame], camera)
    degrees = degrees if view else np.zeros_like(degrees)
    away = np.flatnonzero((distance > AWAY_STEPS) | (degrees > camera.fov_degrees / 2))
    last_away = away[-1] if len(away) else 0
    return np.flatnonzero((distance[:last_away] < NEAR_STEPS) & (degrees[:last_away] < ALIKE_DEGREES))


def revisits(poses: np.ndarray, most: int = 6, camera: CameraConfig = DEFAULT) -> list[tuple[int, int, int]]:
    """Frames (first, away, again): the same view from the same place, with another one in between.

    Of all frames that have `seen_before` the view at most `most`, spread evenly, in order of the return; `first` is
    the earlier frame that is closest to it, `away` the frame in between that is farthest from it.
    """
    found = []
    for again in range(len(poses) - 1, 0, -max(1, len(poses) // 160)):
        same = seen_before(poses, again, camera)
        if not len(same):
            continue
        distance, degrees = _difference(poses[:again], poses[again], camera)
        first = same[np.argmin(distance[same] / NEAR_STEPS + degrees[same] / ALIKE_DEGREES)]
        apart = np.maximum(distance / AWAY_STEPS, degrees / (camera.fov_degrees / 2))
        found.append((int(first), int(first + apart[first:].argmax()), again))
    found.reverse()
    chosen = np.unique(np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int))
    return [found[i] for i in chosen]


def _difference(poses: np.ndarray, pose: np.ndarray, camera: CameraConfig) -> tuple[np.ndarray, np.ndarray]:
    """Distance of the places in steps, and the larger of the two angles between the directions in degrees."""
    x, z, yaw, pitch = (poses - pose).T
    yaw -= 360 * np.round(yaw / 360)
    return np.hypot(x, z) / camera.step, np.maximum(np.abs(yaw), np.abs(pitch))
