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
    """Scores for patches of frames: the higher, the truer they look.

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
    """What the critic makes smaller: the truth is to score more than what was decoded of it, place by place.

    Only the difference counts (relativistic pairing, Jolicoeur-Martineau 2019), as what a picture shows moves both
    scores by more than how well it was decoded: with a fixed margin for each, the critic learned next to nothing.
    The decoder makes smaller what the same loss is with both exchanged.
    """
    return F.softplus(false - true).mean()


def judged_gradient(losses: Tensor, judgement: Tensor, decoded: Tensor, share: float) -> Tensor:
    """Gradient of the losses at `decoded`, and in addition that of the judgement, of `share` times its size.

    losses, judgement: scalars made of `decoded`, both to fall. The graph below `decoded` is left alone.
    """
    (of_losses,) = torch.autograd.grad(losses, decoded, retain_graph=True)
    (of_judgement,) = torch.autograd.grad(judgement, decoded)
    return of_losses + of_judgement * (share * of_losses.norm() / of_judgement.norm().clamp(min=1e-12))
