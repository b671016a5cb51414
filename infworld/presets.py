"""How much of the sampling is done: `exact` as the spec has it, and faster ways that deviate from it.

A preset is data: `rollout.World` reads it, sessions keep its name. What each costs and how far its films are from
exact ones is measured in docs/performance.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from infworld.config import SamplerConfig


@dataclass(frozen=True)
class Preset:
    """steps: part of a model's own sampler steps, but at `least` so many unless the model has fewer. even: where the
    steps end, see `sampler.schedule`. order: of the solver, see `sampler.sample`. guided: every how many steps the
    negative prompt is asked, see `sampler.guided`."""

    name: str
    steps: float = 1.0
    least: int = 1
    even: bool = False
    order: int = 1
    guided: int = 1

    def steps_of(self, sampler: SamplerConfig) -> int:
        """Sampler steps per chunk for a model: 30, 15 and 8 for the released one."""
        own = sampler.num_sampling_steps
        return min(own, max(self.least, math.ceil(self.steps * own)))

    def passes(self, steps: int, guidance: float) -> int:
        """How often the transformer runs for a chunk of so many steps: what its time goes with."""
        return steps if guidance == 1 else steps + math.ceil(steps / self.guided)


EXACT = Preset("exact")
PRESETS = {
    preset.name: preset
    for preset in (
        EXACT,
        Preset("balanced", steps=1 / 2, least=5, even=True, order=2),
        Preset("fast", steps=1 / 4, least=4, even=True, order=2, guided=2),
    )
}


def find_preset(name: str) -> Preset:
    """ValueError for a name that is none."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: use {', '.join(PRESETS)}")
    return PRESETS[name]
