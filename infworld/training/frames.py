"""Rendered frames as the model's video, and back."""

import torch
from einops import rearrange
from torch import Tensor


def to_video(frames: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rendered frames (B, T, H, W, 3) uint8 -> video (B, 3, T, H, W) in [-1, 1]."""
    return rearrange(frames, "b t h w c -> b c t h w").to(dtype) / 127.5 - 1


def to_frames(video: Tensor) -> Tensor:
    """Video (B, 3, T, H, W) in [-1, 1] -> frames (B, T, H, W, 3) uint8; clamps what lies outside."""
    return rearrange((video.clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8), "b c t h w -> b t h w c")
