"""How alike two pictures are, and on a scale from "unrelated" to "as alike as this VAE can tell"."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from infworld.measures import psnr

FLOOR_PAIRS = 64


def best_match(frames: np.ndarray, at: int, target: np.ndarray, reach: int) -> float:
    """The highest PSNR of `target` (H, W, 3) among the frames within `reach` of index `at`.

    A model that turns a little faster or slower than the actions say returns a few frames early or late; that is a
    fault of control and not of memory.
    """
    return float(psnr(frames[max(0, at - reach) : at + reach + 1], target[None]).max())


def random_floor(frames: np.ndarray, seed: int = 0) -> float:
    """PSNR in dB that two random frames of the film have on average: what no memory at all would reach."""
    pairs = np.random.default_rng(seed).integers(len(frames), size=(2, FLOOR_PAIRS))
    first, second = pairs[:, pairs[0] != pairs[1]]
    return float(psnr(frames[first], frames[second]).mean()) if len(first) else float("nan")


def round_trip_ceiling(frames: np.ndarray, round_trip: Callable[[np.ndarray], np.ndarray]) -> float:
    """PSNR in dB of frames against themselves after the VAE's encoder and decoder: what a perfect memory would reach,
    since it is read and shown through both. round_trip: frames in, as many frames out."""
    return float(psnr(round_trip(frames), frames).mean())


def normalised(value: float, floor: float, ceiling: float) -> float:
    """(value - floor) / (ceiling - floor): 0 unrelated, 1 as good as the VAE. NaN where the two are not apart, as in a
    film that stands still: it cannot show whether anything is remembered."""
    return (value - floor) / (ceiling - floor) if ceiling - floor > 1e-6 else float("nan")
