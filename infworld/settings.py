"""What a person asks of a film, validated once for every door: page, endpoint, command line, session file."""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass

from infworld.actions import ActionScript
from infworld.config import ModelConfig
from infworld.presets import find_preset

MAX_PROMPT = 1000  # characters
MAX_STEPS = 100
MAX_SEED = 2**63 - 1
MAX_GUIDANCE = 100.0  # of either sign


@dataclass(frozen=True)
class FilmSettings:
    """How a film is made. `actions` are the whole film's, from its first frame on.

    Raises ValueError that names the field, its value and what is allowed.
    """

    actions: ActionScript
    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance: float
    preset: str

    def __post_init__(self):
        if not isinstance(self.actions, ActionScript):
            raise ValueError(f"actions must be an ActionScript, not {type(self.actions).__name__}")
        _check_text("prompt", self.prompt)
        _check_text("negative prompt", self.negative_prompt)
        check_seed(self.seed)
        if type(self.steps) is not int or not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"steps must be a whole number from 1 to {MAX_STEPS}, not {reprlib.repr(self.steps)}")
        if type(self.guidance) not in (int, float) or not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be a finite number, not {reprlib.repr(self.guidance)}")
        if abs(self.guidance) > MAX_GUIDANCE:
            raise ValueError(f"guidance must be from {-MAX_GUIDANCE:g} to {MAX_GUIDANCE:g}, not {self.guidance:g}")
        find_preset(self.preset)

    @staticmethod
    def for_model(
        config: ModelConfig,
        actions=None,
        prompt: str = "",
        *,
        negative_prompt: str | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        preset: str | None = None,
    ) -> FilmSettings:
        """Settings with the model's own values for what is None; the steps are then the preset's.

        actions: anything that `ActionScript.of` takes.
        """
        sampler = config.val_scheduler_cfg
        found = find_preset(sampler.preset if preset is None else preset)
        return FilmSettings(
            actions=ActionScript.of(actions),
            prompt=prompt,
            negative_prompt=config.negative_prompt if negative_prompt is None else negative_prompt,
            seed=seed,
            steps=found.sampler_steps(sampler) if steps is None else steps,
            guidance=sampler.text_cfg_scale if guidance is None else guidance,
            preset=found.name,
        )


def check_seed(seed: object) -> None:
    """Raises ValueError for an invalid seed."""
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"the seed must be a whole number from 0 to {MAX_SEED}, not {reprlib.repr(seed)}")


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise ValueError(f"the {name} must be text, not {reprlib.repr(text)}")
    if len(text) > MAX_PROMPT:
        raise ValueError(f"the {name} may have at most {MAX_PROMPT} characters, not {len(text)}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"the {name} is not valid Unicode text")
