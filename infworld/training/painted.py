"""What a world model makes of walks, beside what it should have shown: more for a decoder to learn from.

A world model's latents lack detail that encoded ones have, and no picture has such latents, so that what is drawn for
them is left to chance. Where they are a chunk's true latents, noised and denoised again, the truth is known.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from infworld.config import load_config
from infworld.loading import load_vae
from infworld.training.data import WalkPool
from infworld.training.frames import to_video
from infworld.training.run import autocast, compute_dtype
from infworld.training.scenes import WALK_FRAMES
from infworld.training.train_world import Trainee, load_teacher, paint


class PaintedPool(WalkPool):
    """First chunks of walks: the latents that a world model paints, (size, C, 21, h, w), and the true frames,
    (size, 81, H, W, 3) uint8."""

    def __init__(self, world: Path, vae: Path, config_name: str, device: torch.device, **pool):
        """world, vae: trained weights of that config. pool: as of `WalkPool`."""
        config = load_config(config_name)
        lengths = dataclasses.replace(config.validation_data, chunk_lengths=(WALK_FRAMES - 1,))
        config = dataclasses.replace(config, validation_data=lengths)
        self.model: Trainee = load_teacher(world, config, device)
        encoder = load_vae(config, device, compute_dtype(device), vae)
        super().__init__(encoder, self.model.text, config, chunks=1, device=device, **pool)
        self.painted = torch.zeros_like(self.targets[:, 0].movedim(1, 2))
        self.frames_shown = torch.zeros(self.size, WALK_FRAMES, *config.buckets[0], 3, dtype=torch.uint8, device=device)

    def clips(self, count: int, frames: int) -> tuple[Tensor, Tensor]:
        """Beginnings of random walks: latents (count, C, T', h, w) and video (count, 3, frames, H, W) in [-1, 1]."""
        walks = torch.randint(self.filled, (count,), device=self.device)
        latents = self.painted[walks, :, : 1 + (frames - 1) // 4]
        return latents.float(), to_video(self.frames_shown[walks, :frames])

    def _encode(self, slots: Tensor, frames: Tensor) -> None:
        super()._encode(slots, frames)
        slots = slots.to(self.device)
        self.frames_shown[slots] = frames[:, :WALK_FRAMES]
        with autocast(self.device):
            painted = paint(self.model, self.select(slots, torch.zeros_like(slots), 0), self.config.val_scheduler_cfg)
        self.painted[slots] = painted.to(self.painted)
