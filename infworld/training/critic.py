"""A judge of frames for the last part of the VAE's training: it learns to tell decoded frames from true ones.

Errors in absolute or squared difference are least where texture is averaged away; what a critic can't tell from the
truth has the truth's texture.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

TOGETHER = 3  # frames that are judged together, so that flicker is seen


class Critic(nn.Module):
    """Scores for patches of frames: above 0 for what looks true.

    It halves pictures by averaging, not by stride, so that it has no raster of its own to draw the decoder to.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        channels = [width, 2 * width, 4 * width, 4 * width, 4 * width]
        layers = [nn.Conv2d(3 * TOGETHER, width, 3, padding=1), nn.LeakyReLU(0.2)]
        for narrow, wide in pairwise(channels):
            layers += [nn.Conv2d(narrow, wide, 3, padding=1), nn.LeakyReLU(0.2), nn.AvgPool2d(2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels[-1], 1, 3, padding=1))

    def forward(self, video: Tensor) -> Tensor:
        """Video (B, 3, T, H, W) in [-1, 1], T at least 3, sides multiples of 16 -> scores (N, 1, H / 16, W / 16)."""
        frames = video.unfold(2, TOGETHER, TOGETHER)  # B 3 T' H W 3; what is left over is not judged
        return self.layers(rearrange(frames, "b c t h w k -> (b t) (c k) h w"))


def critic_loss(true: Tensor, false: Tensor) -> Tensor:
    """What the critic makes smaller: scores of the truth up to 1, of decoded frames down to -1."""
    return F.relu(1 - true).mean() + F.relu(1 + false).mean()


def judged_gradient(losses: Tensor, score: Tensor, decoded: Tensor, share: float) -> Tensor:
    """Gradient of the losses at `decoded`, and in addition that of looking truer, of `share` times its size.

    losses, score: scalars made of `decoded`; the score is to rise. The graph below `decoded` is left alone.
    """
    (toward_truth,) = torch.autograd.grad(losses, decoded, retain_graph=True)
    (toward_score,) = torch.autograd.grad(-score, decoded)
    return toward_truth + toward_score * (share * toward_truth.norm() / toward_score.norm().clamp(min=1e-12))
