"""Memory guidance: a model learns to hold on to what it remembers more firmly than data alone teach it.

Guidance by a worse version of a model moves samples away from what only that version would make (Karras et al., arXiv
2406.02507). Here the worse one is the model itself with noise over all that it remembers: what both would do is not
memory. Sampled so, films recall better and long ones fade less, but every guided step takes two evaluations. Learned
into the weights (as Meng et al., arXiv 2210.03142, do with a prompt's guidance) it takes one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from infworld.sampler import MAX_TIMESTEP
from infworld.training.data import Batch
from infworld.training.flow import draw_levels

FULL_BELOW = 0.93  # noise level under which guidance is at its full strength; none at pure noise

Model = Callable[
    [Tensor, Tensor, Batch], Tensor
]  # noisy latents, timesteps (B,) and what else they depend on -> velocity


def guided_loss(student: Model, teacher: Model, batch: Batch, shift: float, guidance: float, noises: int = 1) -> Tensor:
    """Mean squared error of the student's velocities against the teacher's guided ones.

    Each of the batch's targets is met with `noises` noises, at levels as for `flow.loss`. At pure noise, where a first
    guess of the whole chunk is made (`sampler.settle`), it remains the teacher's own.
    """
    target = batch.target.repeat_interleave(noises, dim=0)
    level = draw_levels(len(target), shift, device=target.device)
    t = level.view(-1, 1, 1, 1, 1)
    noisy, timesteps = (1 - t) * target + t * torch.randn_like(target), MAX_TIMESTEP * level
    with torch.no_grad():
        faint = dataclasses.replace(batch, history=batch.history + torch.randn_like(batch.history))
        aim = teacher(noisy, timesteps, batch)
        aim = aim + guidance * strength(t) * (aim - teacher(noisy, timesteps, faint))
    return F.mse_loss(student(noisy, timesteps, batch).float(), aim.float())


def strength(level: Tensor) -> Tensor:
    """Of the guidance at noise levels in 0..1: 0 at pure noise, 1 below `FULL_BELOW`."""
    return ((1 - level) / (1 - FULL_BELOW)).clamp(max=1)
