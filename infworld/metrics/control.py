"""Does the camera do what the actions say? From dense optical flow (OpenCV's DIS, Kroeger et al. 2016)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from infworld.actions import MOVES, VIEWS

DEAD_ZONE = 0.1  # of a picture's width per 100 frames, and of its size for the zoom: less is no motion
ONSET = 8  # frames of a film in which an action may still be starting


@dataclass(frozen=True)
class Motion:
    """The camera's apparent motion from frame to frame, each (T - 1,), in shares of the picture's width.

    right: positive when the picture's contents go left, as in turning or stepping right. up: positive when they go
    down. zoom: positive when they grow, as in going forward. speed: how far they go in any direction.
    """

    right: np.ndarray
    up: np.ndarray
    zoom: np.ndarray
    speed: np.ndarray


@dataclass(frozen=True)
class Control:
    """How an action was obeyed: sign, the share of frames that move in its direction (of its worst direction, where it
    has several); steadiness, mean over mean + standard deviation of that motion, 1 for an even one; obeyed, whether the
    motion as a whole goes that way."""

    sign: float
    steadiness: float
    obeyed: bool


def flows(frames: np.ndarray, interval: int = 1) -> Iterator[np.ndarray]:
    """Optical flow (H, W, 2) in pixels, x right and y down, from each `interval`-th frame to the next such."""
    method = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames[::interval]]
    for first, second in zip(grey, grey[1:], strict=False):
        yield method.calc(first, second, None)  # type: ignore[call-overload]  # it makes room for the flow itself


def motion(frames: np.ndarray) -> Motion:
    """The camera's motion: the median flow and the least-squares growth about the centre, over the half of the pixels
    with the strongest gradients (flow across an even sky or floor is a guess)."""
    height, width = frames.shape[1:3]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = x - (width - 1) / 2, y - (height - 1) / 2
    found = []
    for frame, flow in zip(frames, flows(frames), strict=False):
        textured = _textured(frame)
        u, v = flow[textured].T
        dx, dy = x[textured], y[textured]
        right, up = np.median(u), np.median(v)
        # Growth about the centre that is left when the whole picture's shift is taken away.
        zoom = np.sum(dx * (u - right) + dy * (v - up)) / np.sum(dx**2 + dy**2)
        found.append((-right / width, up / width, zoom, np.median(np.hypot(u, v)) / width))
    return Motion(*np.array(found, dtype=float).reshape(-1, 4).T)


def expected(move: int, view: int) -> dict[str, int]:
    """The signs of `Motion` that an action should have. Where going and turning pull opposite ways, or a turn hides the
    growth of going forward, nothing is expected; *uncertain* expects nothing."""
    words = {*MOVES[move].split(), *(f"turn {word}" for word in VIEWS[view].split())}
    aside = _sign(words, "right", "left")
    turn, tilt = _sign(words, "turn right", "turn left"), _sign(words, "turn up", "turn down")
    signs = {"right": 0 if aside * turn < 0 else aside or turn, "up": tilt, "zoom": _sign(words, "forward", "back")}
    return {name: sign for name, sign in signs.items() if sign}


def control(frames: np.ndarray, move: int, view: int) -> Control | None:
    """How a film obeys an action that is held all through it; None for an action that expects no motion.

    Sign of the flow as in the paper's lineage of interactive models (GameWorld Score, Matrix-Game, measure it by
    an inverse dynamics network; this is the light version that needs none).
    """
    seen = motion(frames[min(ONSET, len(frames) - 2) :])
    parts = [sign * getattr(seen, name) for name, sign in expected(move, view).items()]
    if not parts:
        return None
    least = DEAD_ZONE / 100
    return Control(
        sign=min(float((part > least).mean()) for part in parts),
        steadiness=min(max(0.0, part.mean()) / (abs(part.mean()) + part.std() + 1e-9) for part in parts),
        obeyed=all(part.mean() > least for part in parts),
    )


def residual_motion(frames: np.ndarray) -> float:
    """How far the contents of a film go per frame, in percent of the picture's width: what should be 0 under no-op."""
    return float(100 * motion(frames).speed.mean())


def _textured(frame: np.ndarray) -> np.ndarray:
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    strength = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    return strength >= np.median(strength)


def _sign(words: set[str], plus: str, minus: str) -> int:
    return (plus in words) - (minus in words)
