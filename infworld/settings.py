"""What a person asks of a film, checked. Knows no Gradio."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from infworld.actions import ActionScript
from infworld.presets import EXACT, find_preset
from infworld.session import MAX_SEED, Session

MAX_PROMPT = 1000  # characters
MAX_STEPS = 100


@dataclass(frozen=True)
class FilmSettings:
    """How the frames to come shall be made. `actions` are the whole film's, from its first frame on.

    Raises ValueError for what no page would send.
    """

    actions: ActionScript
    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance: float
    preset: str = EXACT.name

    def __post_init__(self):
        if max(len(self.prompt), len(self.negative_prompt)) > MAX_PROMPT:
            raise ValueError(f"a prompt may have at most {MAX_PROMPT} characters")
        if not isinstance(self.seed, int) or not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"the seed must be a whole number from 0 to {MAX_SEED}, not {self.seed}")
        if not isinstance(self.steps, int) or not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"the number of steps must be 1 to {MAX_STEPS}, not {self.steps}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be a number, not {self.guidance}")
        find_preset(self.preset)

    @staticmethod
    def of(session: Session) -> FilmSettings:
        """What a session was asked for."""
        return FilmSettings(**{field.name: getattr(session, field.name) for field in dataclasses.fields(FilmSettings)})

    def for_rest_of(self, session: Session) -> Session:
        """The session with these settings for the frames to come; what was done stays. The seed is not touched."""
        rest = ActionScript.from_pairs(self.actions.pairs(session.num_frames - 1))
        session = session.with_actions(rest).with_prompt(self.prompt, self.negative_prompt)
        return dataclasses.replace(session, steps=self.steps, guidance=self.guidance, preset=self.preset)
