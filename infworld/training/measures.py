"""What is measured on pictures, and how sure a mean over worlds is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

RESAMPLES = 2000  # of the bootstrap
WINDOW = 32  # pixels a side, of a spectrum
FINEST = 6.4  # pixels, the largest detail in which a raster is looked for


def luma(frames: Tensor) -> Tensor:
    """uint8 (..., 3) -> (...) in 0..1."""
    return frames.float() @ frames.new_tensor((0.299, 0.587, 0.114), dtype=torch.float32) / 255


def sharpness(frames: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels' luma, averaged over frames: (B, T, H, W, 3) -> (B,)."""
    light = luma(frames)
    return (light.diff(dim=3).abs().mean((1, 2, 3)) + light.diff(dim=2).abs().mean((1, 2, 3))) / 2


def raster(frames: Tensor) -> Tensor:
    """The share of the finest detail that is a regular pattern, averaged over frames: (B, T, H, W, 3) -> (B,) in 0..1.

    Texture has a spectrum without lines, a pattern that repeats every few pixels has little else: what counts is the
    power that exceeds four times the median around it, among details of at most `FINEST` pixels. 0 for most
    photographs; straight edges along rows or columns count too, in a few up to 0.35, so look at the truth's beside it.
    A decoder that makes squares of pixels may draw such a pattern in place of texture that it does not know, and
    `sharpness` takes it for detail.
    """
    power = fine_spectrum(luma(frames).flatten(0, 1))
    around = F.pad(power[:, None], (2, 2, 2, 2), mode="reflect").unfold(2, 5, 1).unfold(3, 5, 1)
    lines = (power - 4 * around.flatten(-2).median(-1).values[:, 0]).clamp(min=0)
    side = power.shape[1]
    down, across = torch.arange(-(side // 2), side // 2).abs()[:, None], torch.arange(side // 2 + 1)
    fine = (down.maximum(across) >= side / FINEST).to(power)
    share = (lines * fine).sum((1, 2)) / (power * fine).sum((1, 2)).clamp(min=1e-12)
    return share.unflatten(0, frames.shape[:2]).mean(1)


def fine_spectrum(light: Tensor) -> Tensor:
    """Mean power of what pictures (N, H, W) show beyond the mean of 5 x 5 pixels, over windows that tile them:
    (N, side, side / 2 + 1), frequency 0 in the middle row and the first column; a side of `WINDOW`, less in a smaller
    picture."""
    side = min(WINDOW, *light.shape[1:]) // 2 * 2
    padded = F.pad(light[:, None], (2, 2, 2, 2), mode="reflect")
    detail = light - F.avg_pool2d(padded, 5, stride=1)[:, 0]
    windows = detail.unfold(1, side, side).unfold(2, side, side)
    bell = torch.hann_window(side, device=light.device)
    power = torch.fft.rfft2(windows * bell[:, None] * bell).abs().square().mean((1, 2))
    return power.roll(side // 2, dims=1)


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
