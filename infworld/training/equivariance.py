"""Latents that move as pictures do: shifted or halved latents have to be decoded to the shifted or halved picture.

A world model makes new latents of old ones seen from elsewhere. That is easiest where a shift of the picture by a part
of a token is nearly a linear map of latents (after EQ-VAE, Kouzelis et al. 2025).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

HALVED = 1 / 3  # of the clips that are changed; the others are shifted
SHIFT = (0.3, 0.7)  # of a latent, down and right


def changed(latents: Tensor, video: Tensor, space: int) -> tuple[Tensor, Tensor]:
    """Latents (B, C, T', h, w) and their video (B, 3, T, H, W), both shifted or both of half the size, at random."""
    if torch.rand(()) < HALVED:
        return _half(latents), _half(video)
    down, right = torch.randint(space, (2,)).tolist()
    return shifted(latents, down / space, right / space), _cut(video, down, right, space)


def shifted(latents: Tensor, down: float, right: float) -> Tensor:
    """What lies that part of a latent below and to the right of each, between neighbours: (B, C, T', h - 1, w - 1)."""
    rows = latents[..., :-1, :] * (1 - down) + latents[..., 1:, :] * down
    return rows[..., :-1] * (1 - right) + rows[..., 1:] * right


def _cut(video: Tensor, down: int, right: int, space: int) -> Tensor:
    height, width = video.shape[-2:]
    return video[..., down : down + height - space, right : right + width - space]


def _half(video: Tensor) -> Tensor:
    frames = F.avg_pool2d(rearrange(video, "b c t h w -> (b t) c h w"), 2)
    return rearrange(frames, "(b t) c h w -> b c t h w", b=len(video))


@torch.no_grad()
def shift_error(encode: Callable[[Tensor], Tensor], video: Tensor, space: int) -> float:
    """How far a linear map of a latent and its eight neighbours is from the latent of the picture shifted by `SHIFT`:
    mean squared error over the variance. Fitted on one half of the clips, tested on the other.

    encode: video -> latents. video: (B, 3, T, H, W), B at least 2.
    """
    height, width = (side - space for side in video.shape[-2:])
    down, right = (round(part * space) for part in SHIFT)
    there = encode(video[..., :height, :width])
    then = encode(video[..., down : down + height, right : right + width])
    channels = there.shape[1]
    around = F.unfold(rearrange(there.float(), "b c t h w -> (b t) c h w"), 3)  # (B T', 9 C, places)
    wanted = rearrange(then[..., 1:-1, 1:-1].float(), "b c t h w -> (b t) c (h w)")
    pairs = [rearrange(x, "n c p -> (n p) c").double() for x in (around, wanted)]
    middle = len(pairs[0]) // 2
    (seen, answer), (test, truth) = ([x[:middle] for x in pairs], [x[middle:] for x in pairs])
    seen, test = (torch.cat([x, torch.ones_like(x[:, :1])], 1) for x in (seen, test))
    ridge = 1e-4 * middle * torch.eye(9 * channels + 1, dtype=seen.dtype, device=seen.device)
    weights = torch.linalg.solve(seen.T @ seen + ridge, seen.T @ answer)
    return ((test @ weights - truth).square().mean() / truth.var(0).mean()).item()
