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
    """steps: part of the model's own sampler steps. order: of the solver, see `sampler.sample`. guided: every how many
    steps the negative prompt is asked, see `sampler.guided`."""

    name: str
    steps: float
    order: int
    guided: int

    def steps_of(self, sampler: SamplerConfig) -> int:
        """Sampler steps per chunk for a model: 30, 15 and 8 for the released one."""
        return math.ceil(self.steps * sampler.num_sampling_steps)

    def passes(self, steps: int, guidance: float) -> int:
        """How often the transformer runs for a chunk of so many steps: what its time goes with."""
        return steps if guidance == 1 else steps + math.ceil(steps / self.guided)


EXACT = Preset("exact", steps=1, order=1, guided=1)
PRESETS = {
    preset.name: preset
    for preset in (
        EXACT,
        Preset("balanced", steps=1 / 2, order=2, guided=2),
        Preset("fast", steps=1 / 4, order=2, guided=2),
    )
}


def find_preset(name: str) -> Preset:
    """ValueError for a name that is none."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: use {', '.join(PRESETS)}")
    return PRESETS[name]
