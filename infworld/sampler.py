"""Noise -> latents: rectified flow with Euler steps and guidance (spec section 8), or fewer. Knows no transformer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from infworld.config import SamplerConfig

MAX_TIMESTEP = 1000.0
GUIDED_DOWN_TO = 850  # the timestep: later steps draw detail, which guidance blurs

Velocity = Callable[[Tensor, Tensor], Tensor]  # noisy latents and timestep (a scalar) -> noise minus data


def schedule(config: SamplerConfig, steps: int, *, end_at_zero: bool = False) -> Tensor:
    """The timesteps of so many steps and the final 0, (steps + 1,) float32, falling from 1000.

    Before the shift they are evenly spaced down to 1, followed by 0, as in the spec, so that the last step is tiny.
    end_at_zero: evenly spaced down to 0 instead, as always where the config says so.
    """
    if type(steps) is not int or not 1 <= steps <= MAX_TIMESTEP:
        raise ValueError(f"sampling steps must be a whole number from 1 to {MAX_TIMESTEP:.0f}, not {steps!r}")
    end_at_zero = end_at_zero or config.end_at_zero
    points = torch.linspace(MAX_TIMESTEP, 0 if end_at_zero else 1, steps + end_at_zero, dtype=torch.float64)[:steps]
    u = points / MAX_TIMESTEP
    if config.use_timestep_transform:
        u = config.shift * u / (1 + (config.shift - 1) * u)
    return torch.cat([u, torch.zeros(1)]).mul(MAX_TIMESTEP).float()


def sample(velocity: Velocity, noise: Tensor, timesteps: Tensor, **how) -> Tensor:
    """Integrates from noise to data; arguments as for `sample_steps`."""
    *_, z = sample_steps(velocity, noise, timesteps, **how)
    return z


def sample_steps(
    velocity: Velocity,
    noise: Tensor,
    timesteps: Tensor,
    *,
    order: int = 1,
    settled: float = 0.0,
    forgetful: Velocity | None = None,
    guidance: float = 0.0,
) -> Iterator[Tensor]:
    """Integrates from noise to data and yields the latents after each step.

    `velocity(z, t)` is noise minus data at timestep t, a scalar tensor. timesteps: on the CPU, as `schedule` makes
    them. On a GPU the latest step may still be under way when it is yielded. order: 1 is Euler, as the spec has it; 2
    is the two-step Adams-Bashforth method, which extrapolates from the previous velocity and needs no more
    evaluations than Euler. settled: the bound of `settle` for the final latents; 0 leaves them as they are.

    forgetful: the velocity without the memory. Steps down to `GUIDED_DOWN_TO` are guided away from it, by `guidance`
    times the difference, as text guides: what both would do is not remembered. Limited to an interval as in arXiv
    2404.07724.
    """
    if order not in (1, 2):
        raise ValueError(f"the solver's order must be 1 or 2, not {order!r}")
    z, last, steps = noise, None, len(timesteps) - 1
    fed = timesteps.to(noise.device)  # all at once: copying one to a GPU at every step would wait for the step before
    for step in range(steps):
        here = velocity(z, fed[step])
        if step == 0:
            guess = noise - here * timesteps[0] / MAX_TIMESTEP
        if forgetful is not None and timesteps[step] >= GUIDED_DOWN_TO:
            here = guide(here, forgetful(z, fed[step]), 1 + guidance)
        mean = here  # the estimated mean velocity over the step
        length = timesteps[step] - timesteps[step + 1]
        if order == 2 and last is not None:
            mean = here + (here - last) * (length / (2 * (timesteps[step - 1] - timesteps[step])))
        z, last = z - mean * length / MAX_TIMESTEP, here
        if settled and step == steps - 1:
            z = settle(z, guess, settled)
        yield z


def settle(latents: Tensor, guess: Tensor, bound: float) -> Tensor:
    """Sampled latents (B, C, T, h, w), pulled to the first step's guess of them where the two differ by little.

    At pure noise a model guesses the mean of all that it thinks possible. Where that is nearly one thing, as of what it
    remembers, the mean is nearer to the truth than any sample; where it is not, the mean is a blur, and the sample
    stays. bound: of the squared difference, averaged over channels and neighbouring places, from which on it stays
    wholly. Latents have a variance of about 1.
    """
    difference = (latents - guess).float()
    apart = _smoothed(_smoothed(difference).square().mean(1, keepdim=True))
    return (guess + (apart / bound).clamp(max=1) * difference).to(latents.dtype)


def _smoothed(x: Tensor) -> Tensor:
    """The mean of each place's 3 x 3 x 3 neighbourhood, with the edges continued: (B, C, T, h, w) -> the same."""
    return F.avg_pool3d(F.pad(x, (1,) * 6, mode="replicate"), 3, stride=1)


def guided(positive: Velocity, negative: Velocity, scale: float, every: int = 1) -> Velocity:
    """The guided velocity of one chunk, to be asked for step by step, from two texts' velocities.

    The negative prompt's is asked for at every `every`-th step only: between, the texts' difference, which changes
    slowly, is taken to be what it was.
    """
    steps = itertools.count()
    difference = torch.zeros(())  # before the first step, which always asks

    def velocity(z: Tensor, timestep: Tensor) -> Tensor:
        nonlocal difference
        v = positive(z, timestep)
        if next(steps) % every:
            return v + (scale - 1) * difference
        other = negative(z, timestep)
        difference = v - other
        return guide(v, other, scale)

    return velocity


def guide(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: away from the negative prompt's velocity, towards the prompt's."""
    return negative + scale * (positive - negative)
