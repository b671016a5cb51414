"""How far a call to a World is, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infworld.session import Session


STAGES = ("text", "memory", "sample", "decode", "encode")  # of a chunk, in order; "sample" once per step


@dataclass(frozen=True)
class Progress:
    """Where a call stands after a stage of a chunk: "text", "memory", "sample" (after each step) or "decode".

    `chunk` counts the call's chunks from 1. `frames` are those of the film before this chunk. `remaining` is an
    estimate in seconds, None before the first step. A chunk's last stage, encoding its frames into the history, is
    followed by the Chunk itself and has no Progress.
    """

    chunk: int
    chunks: int
    stage: str
    step: int
    steps: int
    frames: int
    total_frames: int
    seconds: float
    remaining: float | None


Callback = Callable[[Progress], None]


@dataclass
class ProgressTracker:
    """Counts a call's finished stages and estimates the time left from how long each kind has taken so far."""

    chunks: int
    session: Session
    chunk_frames: int
    made: int = 0
    step: int = 0
    began: float = field(default_factory=time.monotonic)
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    last: float = field(default_factory=time.monotonic)

    def begin_chunk(self) -> None:
        """A chunk begins, or begins again: what was counted of its last attempt is forgotten."""
        self._before = dict(self.spent), dict(self.counts)
        self.step, self.last = 0, time.monotonic()

    def retry_chunk(self) -> None:
        """The current chunk begins again: the stages of the failed attempt are not counted."""
        self.spent, self.counts = self._before
        self.begin_chunk()

    def done(self, stage: str, step: int = 0) -> Progress:
        """One stage of the current chunk, or one sampler step, has been finished."""
        now = time.monotonic()
        self.spent[stage] += now - self.last
        self.counts[stage] += 1
        self.last = now
        self.step = max(self.step, step)
        return Progress(
            chunk=self.made + 1,
            chunks=self.chunks,
            stage=stage,
            step=self.step,
            steps=self.session.settings.steps,
            frames=self.session.num_frames + self.made * self.chunk_frames,
            total_frames=self.session.num_frames + self.chunks * self.chunk_frames,
            seconds=now - self.began,
            remaining=self._remaining(),
        )

    def _remaining(self) -> float | None:
        if not self.counts["sample"]:
            return None
        per_step = self.spent["sample"] / self.counts["sample"]
        left = 0.0
        for stage in STAGES:
            total = self.chunks * (self.session.settings.steps if stage == "sample" else 1)
            mean = self.spent[stage] / self.counts[stage] if self.counts[stage] else per_step
            left += (total - self.counts[stage]) * mean
        return left
