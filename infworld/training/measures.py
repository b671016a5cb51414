"""What is measured on pictures, and how sure a mean over worlds is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

RESAMPLES = 2000  # of the bootstrap


def luma(frames: Tensor) -> Tensor:
    """uint8 (..., 3) -> (...) in 0..1."""
    return frames.float() @ frames.new_tensor((0.299, 0.587, 0.114), dtype=torch.float32) / 255


def sharpness(frames: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels' luma, averaged over frames: (B, T, H, W, 3) -> (B,)."""
    light = luma(frames)
    return (light.diff(dim=3).abs().mean((1, 2, 3)) + light.diff(dim=2).abs().mean((1, 2, 3))) / 2


def raster(frames: Tensor, period: int) -> Tensor:
    """The share of the finest detail that repeats every `period` pixels, averaged over frames: (B, T, H, W, 3) -> (B,).

    1 / 64 for detail without a raster. A decoder that makes squares of so many pixels may draw one in place of texture
    that it does not know, and `sharpness` takes it for detail.
    """
    light = luma(frames)[:, None]
    fine = windows((light - smooth(light)).flatten(0, 2), period)
    drawn = repeating(fine).square().mean((1, 2, 3, 4))
    share = drawn / fine.square().mean((1, 2, 3, 4, 5, 6)).clamp(min=1e-12)
    return share.unflatten(0, frames.shape[:2]).mean(1)


def smooth(video: Tensor) -> Tensor:
    """Video (B, C, T, H, W), each pixel the mean of the 5 x 5 around it."""
    frames = F.pad(video.flatten(0, 2)[:, None], (2, 2, 2, 2), mode="reflect")
    return F.avg_pool2d(frames, 5, stride=1).view_as(video)


def windows(pictures: Tensor, period: int) -> Tensor:
    """Pictures (N, H, W) in windows of 8 x 8 squares of `period` pixels, fewer in a smaller picture:
    (N, rows, columns, 8, period, 8, period). What is left over at the lower and right edge is dropped.
    """
    down, across = (min(8, side // period) for side in pictures.shape[1:])
    height, width = (
        side - side % (many * period) for side, many in zip(pictures.shape[1:], (down, across), strict=True)
    )
    whole = pictures[:, :height, :width]
    return rearrange(whole, "n (r a y) (c b x) -> n r c a y b x", a=down, y=period, b=across, x=period)


def repeating(windows: Tensor) -> Tensor:
    """What all squares of a window have in common, but for its mean: (N, rows, columns, period, period)."""
    common = windows.mean((-4, -2))
    return common - common.mean((-2, -1), keepdim=True)


def contrast(frames: Tensor) -> Tensor:
    """Standard deviation of a frame's luma, averaged over frames: (B, T, H, W, 3) -> (B,)."""
    return luma(frames).flatten(2).std(2).mean(1)


def saturation(frames: Tensor) -> Tensor:
    """HSV saturation averaged over pixels and frames: (B, T, H, W, 3) -> (B,)."""
    most, least = frames.float().amax(-1), frames.float().amin(-1)
    return ((most - least) / most.clamp(min=1)).flatten(1).mean(1)


def colours(frames: Tensor) -> Tensor:
    """Mean colour of a picture's upper and lower half, over frames: (B, T, H, W, 3) -> (B, 6) in 0..1."""
    halves = frames.float().div(255).unflatten(2, (2, -1))
    return halves.mean((1, 3, 4)).flatten(1)


def ratio(measure: Callable[[Tensor], Tensor], frames: Tensor, reference: Tensor) -> Tensor:
    """A measure of frames and of their reference, (B, 2): the means over worlds are divided, not world by world."""
    return torch.stack([measure(frames), measure(reference)], dim=1)


@dataclass(frozen=True)
class Figure:
    """A mean over worlds with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    worlds: int


def summarize(values: Tensor) -> Figure:
    """Mean of a measure (W,), or ratio of means (W, 2), over the worlds that count (no NaN)."""
    values = values.double().cpu().reshape(len(values), -1)
    values = values[~values.isnan().any(1)]
    if not len(values):
        return Figure(*[float("nan")] * 3, worlds=0)
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    means = torch.cat([values.mean(0, keepdim=True), values[picks].mean(1)])
    means = means[:, 0] / means[:, 1] if means.shape[1] == 2 else means[:, 0]
    low, high = means[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Figure(means[0].item(), low.item(), high.item(), len(values))
