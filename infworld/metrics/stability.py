"""Does the picture hold? Sharpness, contrast and colour by chunk, and jumps where one chunk joins the next."""

from __future__ import annotations

import numpy as np

from infworld.measures import psnr

SEAM_REACH = 16  # steps on either side of a border that it is compared with
STILL = 0.05  # levels of 255: steps below this are rounding


def luma(frames: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 -> (...) in 0..1, by the weights of Rec. 601."""
    return frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32) / 255


def sharpness(frames: np.ndarray) -> np.ndarray:
    """Mean absolute difference of neighbouring pixels' luma, (T,)."""
    light = luma(frames)
    across, down = np.abs(np.diff(light, axis=2)), np.abs(np.diff(light, axis=1))
    return (across.mean(axis=(1, 2)) + down.mean(axis=(1, 2))) / 2


def contrast(frames: np.ndarray) -> np.ndarray:
    """Standard deviation of the luma, (T,)."""
    return luma(frames).std(axis=(1, 2))


def saturation(frames: np.ndarray) -> np.ndarray:
    """HSV saturation averaged over pixels, (T,)."""
    most, least = frames.max(axis=-1).astype(np.float32), frames.min(axis=-1)
    return ((most - least) / np.maximum(most, 1)).mean(axis=(1, 2))


def colour_shift(frames: np.ndarray, chunk: int) -> np.ndarray:
    """By chunk, the distance of its mean colour from the first chunk's, in levels of 255, (chunks,)."""
    means = _by_chunk(frames.mean(axis=(1, 2)), chunk)
    return np.linalg.norm(means - means[0], axis=1)


def drift(frames: np.ndarray, chunk: int) -> dict[str, np.ndarray]:
    """Sharpness, contrast and saturation of every chunk over the first chunk's, and the shift of its mean colour.

    frames: (1 + chunks * chunk, H, W, 3); the picture itself is in no chunk. What is in view differs from chunk to
    chunk, so single values say little: means over cases do, and films that do nothing (no-op) do.
    """
    measures = {measure.__name__: _by_chunk(measure(frames), chunk) for measure in (sharpness, contrast, saturation)}
    ratios = {name: values / max(values[0], 1e-6) for name, values in measures.items()}
    return ratios | {"colour shift": colour_shift(frames, chunk)}


def still_likeness(frames: np.ndarray) -> float:
    """PSNR in dB of the last frame against the picture: how far a film under no-op has gone from where it began."""
    return float(psnr(frames[-1], frames[0]))


def seams(frames: np.ndarray, chunk: int) -> np.ndarray:
    """At every border between chunks, the step to the next frame over the median step around it, (chunks - 1,).

    A step is the mean absolute difference of two frames that follow each other. 1: no seam.
    """
    steps = np.array([np.abs(a.astype(np.int16) - b).mean() for a, b in zip(frames, frames[1:], strict=False)])
    found = []
    for border in range(chunk, len(steps), chunk):
        around = np.r_[steps[max(0, border - SEAM_REACH) : border], steps[border + 1 : border + 1 + SEAM_REACH]]
        found.append(max(steps[border], STILL) / max(np.median(around), STILL))
    return np.array(found)


def _by_chunk(values: np.ndarray, chunk: int) -> np.ndarray:
    """Means of per-frame values (1 + chunks * chunk, ...) over each chunk: (chunks, ...)."""
    chunks, rest = divmod(len(values) - 1, chunk)
    if not chunks or rest:
        raise ValueError(f"a film is a picture and whole chunks of {chunk} frames, not {len(values)} frames")
    return values[1:].reshape(chunks, chunk, *values.shape[1:]).mean(axis=1)
