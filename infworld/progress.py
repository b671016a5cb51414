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
    """Where a call stands, after a stage of a chunk is done: "text", "memory", "sample" (each step) or "decode".

    `chunk` counts from 1. `remaining` is an estimate in seconds, None before the first step. A chunk's last stage
    (taking its frames into the history) makes no Progress: it is the Chunk itself, which nothing can then lose.
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

    callback: Callback | None
    chunks: int
    session: Session
    chunk_frames: int
    chunk: int = 1
    step: int = 0
    began: float = field(default_factory=time.monotonic)
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    last: float = field(default_factory=time.monotonic)

    def done(self, stage: str, step: int = 0) -> None:
        """One stage of the current chunk, or one sampler step, has been finished."""
        now = time.monotonic()
        self.spent[stage] += now - self.last
        self.counts[stage] += 1
        self.last = now
        self.step = {"text": 0, "memory": 0, "sample": step}.get(stage, self.step)
        if stage == STAGES[-1]:
            self.chunk += 1
        elif self.callback is not None:
            self.callback(
                Progress(
                    chunk=self.chunk,
                    chunks=self.chunks,
                    stage=stage,
                    step=self.step,
                    steps=self.session.steps,
                    frames=self.session.num_frames + (self.chunk - 1) * self.chunk_frames,
                    total_frames=self.session.num_frames + self.chunks * self.chunk_frames,
                    seconds=now - self.began,
                    remaining=self._remaining(),
                )
            )

    def _remaining(self) -> float | None:
        if not self.counts["sample"]:
            return None
        per_step = self.spent["sample"] / self.counts["sample"]
        left = 0.0
        for stage in STAGES:
            total = self.chunks * (self.session.steps if stage == "sample" else 1)
            mean = self.spent[stage] / self.counts[stage] if self.counts[stage] else per_step
            left += (total - self.counts[stage]) * mean
        return left
