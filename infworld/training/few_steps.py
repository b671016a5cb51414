"""Few steps: a model learns to make, in one step, what a trained one makes of the same noise in many.

Multistep consistency distillation (Heek et al., arXiv 2403.06807) with the model itself as its own target, as in Song
and Dhariwal, arXiv 2310.14189: the way from noise to data is cut into as many segments as there will be steps. From any
point of a segment, one step has to lead to the same end as from the teacher's next point a little further on. As noise
and end stay paired, places never seen before stay crisp, where a model that regresses on data averages.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from infworld.config import SamplerConfig
from infworld.sampler import MAX_TIMESTEP, schedule

SUBSTEPS = 8  # of the teacher, per segment

Velocities = Callable[[Tensor, Tensor], Tensor]  # noisy latents (B, C, T, h, w) and t (B, 1, 1, 1, 1) -> velocity


def few_steps_loss(
    student: Velocities, fixed: Velocities, teacher: Velocities, target: Tensor, sampler: SamplerConfig, steps: int
) -> Tensor:
    """Mean squared error of the student's velocities, which will be followed for a whole segment at once.

    fixed: the student without gradients. teacher: the trained model. target: data. All of them take t from 1, noise,
    to 0. The segments end where `steps` steps of Euler with `schedule(..., end_at_zero=True)` do.
    """
    ends = schedule(sampler, steps, end_at_zero=True).to(target) / MAX_TIMESTEP
    count = len(target)
    segment = torch.randint(steps, (count,), device=target.device)
    begin, end = (_per_sample(ends[segment + i]) for i in (0, 1))
    place = _per_sample(torch.randint(SUBSTEPS, (count,), device=target.device).to(target))
    t, s = (begin + (end - begin) * (place + i) / SUBSTEPS for i in (0, 1))
    noisy = (1 - t) * target + t * torch.randn_like(target)
    with torch.no_grad():
        first = teacher(noisy, t)
        second = teacher(noisy - (t - s) * first, s)
        later = noisy - (t - s) * (first + second) / 2  # Heun's method
        aim = (noisy - later + (s - end) * fixed(later, s)) / (t - end)
    return F.mse_loss(student(noisy, t), aim)


def _per_sample(x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1, 1)."""
    return x.view(-1, 1, 1, 1, 1)
