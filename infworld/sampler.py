"""Noise -> latents: rectified flow with Euler steps and guidance (spec section 8). Knows no transformer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from infworld.config import SamplerConfig

MAX_TIMESTEP = 1000.0


def schedule(config: SamplerConfig, steps: int) -> Tensor:
    """The timesteps of `steps` Euler steps and the final 0, (steps + 1,) float32, falling from 1000."""
    if type(steps) is not int or not 1 <= steps <= MAX_TIMESTEP:
        raise ValueError(f"sampling steps must be a whole number from 1 to {MAX_TIMESTEP:.0f}, not {steps!r}")
    u = torch.linspace(MAX_TIMESTEP, 1, steps, dtype=torch.float64) / MAX_TIMESTEP
    if config.use_timestep_transform:
        u = config.shift * u / (1 + (config.shift - 1) * u)
    return torch.cat([u, torch.zeros(1)]).mul(MAX_TIMESTEP).float()


def sample(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    timesteps: Tensor,
    on_step: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Integrates from noise to data: `velocity(z, t)` is noise minus data at timestep t, a scalar tensor.

    timesteps: on the CPU, as `schedule` makes them. `on_step` hears how many steps are done after each one; on a GPU
    the last of them may still be under way then.
    """
    z = noise
    fed = timesteps.to(noise.device)  # all at once: copying one to a GPU at every step would wait for the step before
    for step in range(len(timesteps) - 1):
        z = z - velocity(z, fed[step]) * (timesteps[step] - timesteps[step + 1]) / MAX_TIMESTEP
        on_step(step + 1)
    return z


def guide(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: away from the negative prompt's velocity, towards the prompt's."""
    return negative + scale * (positive - negative)
