"""The line under the screen in words: how far the film is, how long it will take, what went wrong. HTML strings."""

from __future__ import annotations

from html import escape
from pathlib import Path
from urllib.parse import quote

from infworld.app.runner import Loading, RunProgress, Waiting

# What the model is doing when a Progress says that it has done the stage before.
NOW = {"text": "remembering", "memory": "imagining", "sample": "imagining", "decode": "looking at it"}
DRAWING = "drawing"


def of(update: Waiting | Loading | RunProgress) -> str:
    """Where a run stands."""
    if isinstance(update, RunProgress):
        return _making(update)
    return message("Loading" if isinstance(update, Loading) else "Waiting", words(update))


def words(update: Waiting | Loading) -> str:
    """Why nothing is made yet, as plain text."""
    if isinstance(update, Loading):
        return f"The model {update.model} is loaded first."
    if not update.place:
        return "It is this film's turn."
    films = "1 film is" if update.place == 1 else f"{update.place} films are"
    left = "" if update.seconds is None else f" This one's turn is in about {duration(update.seconds)}."
    return f"{films} made first.{left}"


def _making(state: RunProgress) -> str:
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


def ended(outcome: str, frames: int, fps: int) -> str:
    """What a run has come to. outcome: "done", "stopped", or what went wrong."""
    there = f"The film has {frames} frames: {frames / fps:.1f} seconds." if frames else "There is no film yet."
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
