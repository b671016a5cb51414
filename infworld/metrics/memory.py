"""Does the film show again what it has shown? Mirror test and revisit closure, both without a true film."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from infworld.actions import MOVES, VIEWS, ActionScript, Segment
from infworld.camera import DEFAULT, revisits, walk
from infworld.config import CameraConfig
from infworld.measures import psnr, ssim
from infworld.metrics.similarity import best_match

REACH = 4  # frames before and after that a return may come and still be found
OPPOSITES = {"forward": "back", "left": "right", "up": "down"}
MANY = 200  # revisits of one film


@dataclass(frozen=True)
class Return:
    """A view and its return, as indices of frames, and how alike they are. gap: chunks between the two."""

    first: int
    again: int
    gap: float
    psnr: float
    ssim: float
    best: float


def inverse(actions: ActionScript) -> ActionScript:
    """The actions that undo these: in the opposite order, each with its opposite."""
    opposite = {**OPPOSITES, **{there: here for here, there in OPPOSITES.items()}}

    def undo(name: str) -> str:
        return " ".join(opposite.get(word, word) for word in name.split())

    moves, views = ([names.index(undo(name)) for name in names] for names in (MOVES, VIEWS))
    return ActionScript(tuple(Segment(moves[s.move], views[s.view], s.frames) for s in reversed(actions.segments)))


def mirror(frames: np.ndarray, chunk: int, every: int = 4, reach: int = REACH) -> list[Return]:
    """The mirror test (MIND): a film of L actions and then their `inverse`, frame i against frame 2L - i.

    frames: (2L + 1, H, W, 3). The picture is frame 0, so that frame L is the turning point and has no partner; suites
    that number 2L frames without the picture write 2L - 1 - i. every: compares every so many of the L pairs.
    """
    last = len(frames) - 1
    if last % 2:
        raise ValueError(f"a mirrored film has an odd number of frames, not {len(frames)}")
    return [_compare(frames, i, last - i, chunk, reach) for i in range(0, last // 2, every)]


def revisit_closure(
    frames: np.ndarray, actions: ActionScript, chunk: int, camera: CameraConfig = DEFAULT, reach: int = REACH
) -> list[Return]:
    """Every return of the walk to a view that it had left, found by dead reckoning (`camera.revisits`).

    Of equal views the earliest is what later ones are compared with, so that gaps grow with the film.
    """
    poses = walk(actions, len(frames), camera)
    return [_compare(frames, first, again, chunk, reach) for first, _, again in revisits(poses, MANY, camera)]


def by_gap(returns: list[Return]) -> dict[int, list[Return]]:
    """Returns by their gap in whole chunks, rounded; those of less than half a chunk count as 1."""
    gaps: dict[int, list[Return]] = {}
    for found in returns:
        gaps.setdefault(max(1, round(found.gap)), []).append(found)
    return dict(sorted(gaps.items()))


def _compare(frames: np.ndarray, first: int, again: int, chunk: int, reach: int) -> Return:
    a, b = frames[first], frames[again]
    # Not past the middle, where a return would be compared with itself.
    within = min(reach, max(0, (again - first - 1) // 2))
    best = best_match(frames, first, frames[again], within)
    return Return(first, again, (again - first) / chunk, float(psnr(a, b)), float(ssim(a, b)), best)
