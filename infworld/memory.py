"""History latents -> memory latents: the hierarchical pose-free memory compressor, HPMC (spec section 6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from infworld.layers import EPS, Attention, layer_norm, rope_3d

GROUPS = 32  # of every GroupNorm
MAX_SINGLE_PASS = 80  # latents; longer histories go through in windows
WINDOWS = 5
WINDOW = 64  # latents

MapWindows = Callable[[Callable[[Tensor], Tensor], list[Tensor]], Iterable[Tensor]]


class MemoryCompressor(nn.Module):
    """Compresses any number of history latents into at most 20; up to 80 latents, fourfold in time."""

    def __init__(self, channels: int = 16, hidden: int = 256, num_heads: int = 8):
        super().__init__()
        self.conv_in = nn.Conv3d(channels, hidden, 3, padding=1)
        self.down_block1 = nn.Sequential(ResidualBlock(hidden), ResidualBlock(hidden), TimeDownsample(hidden))
        self.down_block2 = nn.Sequential(ResidualBlock(hidden), ResidualBlock(hidden), TimeDownsample(hidden))
        self.mid_block = nn.Sequential(ResidualBlock(hidden), AttentionBlock(hidden, num_heads), ResidualBlock(hidden))
        self.norm_out = nn.GroupNorm(GROUPS, hidden, eps=EPS)
        self.conv_out = nn.Conv3d(hidden, channels, 3, padding=1)

    def forward(self, history: Tensor, map_windows: MapWindows = map) -> Tensor:
        """(B, 16, T, h, w) latents of everything seen -> (B, 16, M, h, w) memory, M <= 21.

        The compressed history comes first; the last latent is appended as it is (the local memory). map_windows: takes
        the place of `map` where several devices share the windows of a long history.
        """
        return torch.cat([self.compress(history, map_windows), history[:, :, -1:]], dim=2)

    def compress(self, history: Tensor, map_windows: MapWindows = map) -> Tensor:
        """(B, 16, T, h, w) -> (B, 16, ceil(ceil(T/2)/2), h, w) up to T = 80, 20 latents beyond."""
        starts = window_starts(history.shape[2])
        if len(starts) == 1:
            return self.encode(history)
        # One by one, as a batch of them takes five times the memory.
        windows = [history[:, :, start : start + WINDOW] for start in starts]
        return self.encode(torch.cat(list(map_windows(self.encode, windows)), dim=2))

    def encode(self, latents: Tensor) -> Tensor:
        """One pass of the convolutional encoder: (B, 16, T, h, w) -> (B, 16, ceil(ceil(T/2)/2), h, w)."""
        x = self.conv_in(latents)
        x = self.mid_block(self.down_block2(self.down_block1(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


def memory_latents(latents: int) -> int:
    """How many latents M of memory a history of so many latents is compressed to: 2 to 21."""
    return 1 + math.ceil(min(latents, MAX_SINGLE_PASS) / 4)


def window_starts(latents: int) -> list[int]:
    """First latent of each window that the compressor takes from a history; one window up to 80 latents."""
    if latents <= MAX_SINGLE_PASS:
        return [0]
    return [i * max(1, (latents - WINDOW) // (WINDOWS - 1)) for i in range(WINDOWS)]


class ResidualBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, dim, eps=EPS)
        self.conv1 = nn.Conv3d(dim, dim, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, dim, eps=EPS)
        self.conv2 = nn.Conv3d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class TimeDownsample(nn.Module):
    """Halves the number of latents, rounding up."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv3d(dim, dim, 3, stride=(2, 1, 1), padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class AttentionBlock(nn.Module):
    """Attention over all positions of all latents, with the rotary embedding of their own T h w grid."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.attn = Attention(dim, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        t, h, w = x.shape[2:]
        tokens = rearrange(x, "b c t h w -> b (t h w) c")
        rope = rope_3d(range(t), h, w, x.shape[1] // self.attn.num_heads, x.device)
        normed = layer_norm(tokens)
        attended = self.attn.attend(self.attn.queries(normed, rope), *self.attn.keys_values(normed, rope))
        return x + rearrange(attended, "b (t h w) c -> b c t h w", t=t, h=h)
