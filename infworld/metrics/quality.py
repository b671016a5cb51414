"""Motion smoothness and dynamic degree after VBench (Huang et al. 2024), in light versions that need no weights.

What VBench measures with networks (AMT for interpolation, RAFT for flow) is measured here with DIS optical flow, so
the numbers are close to VBench's in kind and not comparable in value. Its imaging and aesthetic quality are networks
through and through (MUSIQ, a CLIP head); they are not here.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from infworld.metrics.control import flows

SAMPLES_PER_SECOND = 8  # frame rate at which VBench measures the dynamic degree


@dataclass(frozen=True)
class Dynamics:
    """dynamic: VBench's verdict on the film. flow: the mean motion of its fastest 5 % of pixels between two samples, in
    percent of the picture's shorter side: the verdict says yes to nearly every walk."""

    dynamic: bool
    flow: float


def motion_smoothness(frames: np.ndarray) -> float:
    """(255 - mean |frame - interpolated|) / 255 over every second frame, in 0..1.

    VBench leaves out every second frame, has AMT-S interpolate it from its two neighbours and compares. Here it is
    interpolated halfway along the flow between the neighbours, from both sides.
    """
    kept, left_out = frames[::2], frames[1::2]
    if len(kept) < 2:
        raise ValueError(f"motion smoothness takes 3 frames and more, not {len(frames)}")
    differences = []
    there, back = flows(kept), _reversed(kept)
    for first, second, out, ahead, behind in zip(kept, kept[1:], left_out, there, back, strict=False):
        middle = (_warp(first, ahead / 2) + _warp(second, behind / 2)) / 2
        differences.append(np.abs(middle - out).mean())
    return float((255 - np.mean(differences)) / 255)


def dynamic_degree(frames: np.ndarray, fps: float) -> Dynamics:
    """VBench's dynamic degree with DIS in place of RAFT: sampled 8 times a second, a step counts as motion where the
    mean length of the longest 5 % of the flow exceeds 6 pixels per 256 of the shorter side; the film is dynamic if a
    quarter of its samples move."""
    interval, side = max(1, round(fps / SAMPLES_PER_SECOND)), min(frames.shape[1:3])
    longest = np.array([_fastest(flow) for flow in flows(frames, interval)])
    samples = len(longest) + 1
    moving = (longest > 6 * side / 256).sum()
    return Dynamics(bool(moving >= max(1, round(samples / 4))), float(100 * longest.mean() / side))


def _fastest(flow: np.ndarray) -> float:
    lengths = np.sort(np.hypot(*np.moveaxis(flow, -1, 0)), axis=None)
    return float(lengths[-max(1, int(0.05 * lengths.size)) :].mean())


def _reversed(frames: np.ndarray) -> list[np.ndarray]:
    """The flow of each frame's successor back to it."""
    return list(flows(frames[::-1]))[::-1]


def _warp(frame: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """What `frame` shows after its contents have gone along `flow`, by looking back along it: float32."""
    height, width = flow.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    places = x - flow[..., 0], y - flow[..., 1]
    return cv2.remap(frame, *places, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE).astype(np.float32)
