"""How alike two pictures are: PSNR and SSIM, for the page, training, measuring and benchmarks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d

MAX_PSNR = 60.0  # dB, of equal pictures
_SIGMA, _RADIUS = 1.5, 5  # pixels, of SSIM's Gaussian window
_C1, _C2 = 0.01**2, 0.03**2


def to_db(squared_error: Tensor) -> Tensor:
    """Mean squared errors of values in 0..1 as PSNR in dB, at most `MAX_PSNR`."""
    return -10 * squared_error.clamp(min=10 ** (-MAX_PSNR / 10)).log10()


def psnr(frames: Tensor | np.ndarray, reference: Tensor | np.ndarray) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture, at most `MAX_PSNR`; uint8 (..., H, W, 3) -> (...).

    Either may have one picture only, which is compared with all.
    """
    frames, reference = torch.as_tensor(frames), torch.as_tensor(reference)
    return to_db((frames.float() - reference.float()).div(255).square().mean((-3, -2, -1)))


def ssim(frames: Tensor | np.ndarray, reference: Tensor | np.ndarray) -> Tensor:
    """Structural similarity of each picture, 1 for equal ones (Wang et al. 2004); uint8 (..., H, W, 3) -> (...).

    Gaussian window of 1.5 pixels, 11 pixels wide, mean over channels and over the windows that lie inside.
    """
    a, b = (torch.as_tensor(x).double().div(255).movedim(-1, -3) for x in (frames, reference))
    shape, (height, width) = a.shape[:-3], a.shape[-2:]
    if min(height, width) <= 2 * _RADIUS:
        raise ValueError(f"SSIM needs pictures of at least {2 * _RADIUS + 1} pixels a side, not {height} x {width}")
    a, b = (x.reshape(-1, 1, height, width) for x in (a, b))
    mean_a, mean_b, aa, bb, ab = (_blur(x) for x in (a, b, a * a, b * b, a * b))
    variances, covariance = aa + bb - mean_a**2 - mean_b**2, ab - mean_a * mean_b
    alike = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
    alike = alike / ((mean_a**2 + mean_b**2 + _C1) * (variances + _C2))
    return alike.mean((-3, -2, -1)).reshape(*shape, -1).mean(-1)


def _blur(pictures: Tensor) -> Tensor:
    """The Gaussian window's means, where it lies inside: N 1 H W -> N 1 (H - 10) (W - 10)."""
    offsets = torch.arange(-_RADIUS, _RADIUS + 1, dtype=pictures.dtype, device=pictures.device)
    window = (-(offsets**2) / (2 * _SIGMA**2)).exp()
    window = window / window.sum()
    return conv2d(conv2d(pictures, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
