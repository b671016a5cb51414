"""How much of the sampling is done: `exact` as the spec has it, and faster ways that deviate from it.

A preset is data: a `World` reads it, sessions keep its name. What each costs and how far its films are from
exact ones is measured in docs/performance.md.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass

from infworld.config import SamplerConfig
from infworld.sampler import GUIDED_DOWN_TO, schedule


@dataclass(frozen=True)
class Preset:
    """steps: as a fraction of the model's own sampler steps. min_steps: a lower bound, unless the model has fewer.
    end_at_zero: where the steps end, see `sampler.schedule`. order: of the solver, see `sampler.sample`.
    guidance_interval: the negative prompt is evaluated every so many steps, see `sampler.guided`. narrow_attention:
    steps attend in 8 bits, where the card has a kernel for it (`kernels.use_fastest`)."""

    name: str
    steps: float = 1.0
    min_steps: int = 1
    end_at_zero: bool = False
    order: int = 1
    guidance_interval: int = 1
    narrow_attention: bool = False

    def sampler_steps(self, sampler: SamplerConfig) -> int:
        """Sampler steps per chunk for a model: 30, 15 and 8 for the released one."""
        own = sampler.num_sampling_steps
        return min(own, max(self.min_steps, math.ceil(self.steps * own)))

    def passes(self, sampler: SamplerConfig, steps: int, guidance: float) -> int:
        """How often the transformer runs for a chunk of `steps` steps, to which its time is proportional; where the
        memory guides, for any but a film's first."""

        def both_texts(count: int) -> int:
            return count if guidance == 1 else count + math.ceil(count / self.guidance_interval)

        if not sampler.memory_guidance:
            return both_texts(steps)
        timesteps = schedule(sampler, steps, end_at_zero=self.end_at_zero)
        return both_texts(steps) + both_texts(int((timesteps >= GUIDED_DOWN_TO).sum()))


EXACT = Preset("exact")
PRESETS = {
    preset.name: preset
    for preset in (
        EXACT,
        Preset("balanced", steps=1 / 2, min_steps=5, end_at_zero=True, order=2),
        Preset("fast", steps=1 / 4, min_steps=4, end_at_zero=True, order=2, guidance_interval=2, narrow_attention=True),
    )
}


def find_preset(name: str) -> Preset:
    """Raises ValueError for an unknown name."""
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"unknown preset {reprlib.repr(name)}: use {', '.join(PRESETS)}")
    return PRESETS[name]
