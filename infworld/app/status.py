"""The line under the screen in words: how far the film is, how long it will take, what went wrong. HTML strings."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from infworld.app.compute import Report
from infworld.video import FPS

# What the model is doing when a Progress says that it has done the stage before.
NOW = {"text": "remembering", "memory": "imagining", "sample": "imagining", "decode": "looking at it"}
DRAWING = "drawing"


@dataclass(frozen=True)
class RunProgress:
    """A run in the making: the model, the chunk it is at (from 1) of its `chunks`, frames made and seconds since it
    began, the seed, and the report of the present chunk."""

    model: str
    chunk: int
    chunks: int
    frames: int
    seconds: float
    seed: int
    report: Report

    @property
    def remaining(self) -> float | None:
        """Seconds left in the run, from the chunks done and the present one's own estimate."""
        progress = self.report.progress
        if progress.remaining is None and self.chunk == 1:
            return None
        done = self.seconds - progress.seconds
        per_chunk = done / (self.chunk - 1) if self.chunk > 1 else progress.seconds + progress.remaining
        rest = per_chunk - progress.seconds if progress.remaining is None else progress.remaining
        return max(0.0, rest) + per_chunk * (self.chunks - self.chunk)

    @property
    def share(self) -> float:
        """Part of the run that is done, 0 to 1."""
        progress = self.report.progress
        return (self.chunk - 1 + progress.step / (progress.steps + 1)) / self.chunks


def making(state: RunProgress) -> str:
    progress = state.report.progress
    made = state.frames / state.seconds if state.seconds else 0.0
    title = f"Chunk {state.chunk} of {state.chunks}, step {progress.step} of {progress.steps}"
    left = "…" if state.remaining is None else duration(state.remaining)
    cards = {
        "time left": left,
        "frames made": f"{state.frames}",
        "frames a second": f"{made:.1f}" if state.frames else "…",
        "memory": f"{state.report.memory / 2**30:.1f} GB",
        "model": state.model,
        "device": state.report.device,
        "seed": f"{state.seed}",
    }
    drawing = progress.stage == "sample" and progress.step == progress.steps
    doing = DRAWING if drawing else NOW[progress.stage]
    return _panel(title, doing, _bar(state.share, f"{title}, {left} left") + _cards(cards))


def running(model: str, device: str) -> str:
    """Which model new films are made with, and where."""
    return f'<p class="running">Runs <strong>{escape(model)}</strong> on <strong>{escape(device)}</strong></p>'


def message(title: str, text: str = "", kind: str = "") -> str:
    """A title and a sentence. kind: "" or "error"."""
    return f'<div role="status">{_panel(title, text, "", kind)}</div>'


def ended(outcome: str, frames: int) -> str:
    """What a run has come to. outcome: "done", "stopped", or what went wrong."""
    there = f"The film has {frames} frames: {frames / FPS:.1f} seconds." if frames else "There is no film yet."
    if outcome in ("done", "stopped"):
        return message(outcome.capitalize(), there)
    return message("The film could not be finished", f"{outcome} {there} What was made stays.", "error")


def downloads(files: dict[str, Path]) -> str:
    """Links to a film's files, by kind: "film", "actions", "session"."""
    links = "".join(_link(kind, path) for kind, path in files.items())
    return f'<p class="downloads">Download {links}</p>'


def _link(kind: str, path: Path) -> str:
    name = f"infinite-world-{kind}{path.suffix}"
    return f'<a href="gradio_api/file={quote(str(path))}" download="{name}">{kind}</a>'


def duration(seconds: float) -> str:
    """Seconds in words as short as they are exact: 8 s, 2 min 5 s, 1 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _panel(title: str, text: str, body: str, kind: str = "") -> str:
    words = f'<p class="words"><strong>{escape(title)}</strong> <span>{escape(text)}</span></p>'
    return f'<div class="status {kind}">{words}{body}</div>'


def _bar(share: float, text: str) -> str:
    percent = round(100 * share)
    return (
        f'<div class="bar" role="progressbar" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent}" '
        f'aria-valuetext="{escape(text)}"><div style="width:{percent}%"></div></div>'
    )


def _cards(cards: dict[str, str]) -> str:
    inside = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in cards.items())
    return f'<dl class="cards">{inside}</dl>'
