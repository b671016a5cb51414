"""One pass through a film: where it is cut, and the keyframes that its poses are found by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from infworld.video import FPS
from infworld.videos.reading import Film, at_rate, frames

SPACING = 4  # frames from one keyframe to the next
LONGER_SIDE = 640  # pixels of a keyframe
SMALL = (32, 18)  # width and height of the pictures that are compared
CHANGE = 0.06  # of black to white: a cut changes more than this on average
TIMES_USUAL = 2.5  # and more than this many times what any of the frames around does: else it is a flash, or a jerk
AROUND = 3  # frames before and after
PAUSE = 1.0  # seconds without a frame: the recording went on later
LATE = 0.1  # seconds that a frame may be from the instant it is shown for; beyond, the film has lost frames


@dataclass
class Scan:
    """What a film is like at FPS frames a second.

    change: (T,) mean difference to the frame shown before, 0 to 1; 0 for the same frame again. off: (T,) seconds to the
    instant that the frame is shown for. keyframes: (K,) frame numbers and keyframe_at: (K,) where in frames the
    pictures really are; files: (K,) the pictures.
    """

    change: np.ndarray
    off: np.ndarray
    keyframes: np.ndarray
    keyframe_at: np.ndarray
    files: list[Path]

    @property
    def lost(self) -> np.ndarray:
        """(T,) bool: instants for which the film has no frame."""
        return self.off > LATE


def scan(film: Film, folder: Path, progress: Callable[[int], object]) -> Scan:
    """Reads a film once and writes its keyframes to a folder. progress: hears the number of frames."""
    size = _within(film.size, LONGER_SIDE)
    change: list[float] = []
    off: list[float] = []
    keys: list[int] = []
    at: list[float] = []
    files: list[Path] = []
    before, last = None, -1.0
    for number, shown in enumerate(at_rate(frames(film, size), FPS)):
        change.append(0.0)
        if shown.time != last:
            small = np.asarray(Image.fromarray(shown.picture).resize(SMALL, Image.Resampling.BOX), dtype=np.float32)
            change[-1] = 0.0 if before is None else float(np.abs(small - before).mean()) / 255
            before = small
        if number % SPACING == 0 and (not at or shown.time * FPS > at[-1]):
            files.append(folder / f"{number:07d}.jpg")
            Image.fromarray(shown.picture).save(files[-1], quality=95)
            keys.append(number)
            at.append(shown.time * FPS)
        off.append(shown.off)
        last = shown.time
        progress(number + 1)
    return Scan(np.array(change), np.array(off), np.array(keys), np.array(at), files)


def find_shots(found: Scan) -> list[tuple[int, int]]:
    """First and last + 1 frame of every shot: the film between its cuts and pauses."""
    cuts = find_cuts(found.change)
    gaps = np.flatnonzero(found.off > PAUSE / 2)
    pauses = gaps[np.append(True, np.diff(gaps) > 1)] if len(gaps) else gaps
    bounds = sorted({0, len(found.change), *cuts, *pauses.tolist(), *_ends(gaps)})
    return [(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if not (found.off[a:b] > PAUSE / 2).all()]


def find_cuts(change: np.ndarray) -> list[int]:
    """Frames that begin another shot: unlike the frame before, and much more so than the frames around are."""
    seen = np.flatnonzero(change > 0)  # frames that are shown again, in a film of fewer a second, say nothing
    if not len(seen):
        return []
    values = change[seen]
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, AROUND, mode="edge"), 2 * AROUND + 1)
    most = np.delete(windows, AROUND, axis=1).max(1)
    return seen[(values > CHANGE) & (values > TIMES_USUAL * most)].tolist()


def _ends(gaps: np.ndarray) -> list[int]:
    """The frames after each run of frames."""
    return (gaps[np.append(np.diff(gaps) > 1, True)] + 1).tolist() if len(gaps) else []


def _within(size: tuple[int, int], longer: int) -> tuple[int, int]:
    factor = min(1, longer / max(size))
    return round(size[0] * factor / 2) * 2, round(size[1] * factor / 2) * 2
