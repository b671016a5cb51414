"""What an evaluation is read from: the table of figures with what they must reach, and contact sheets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from infworld.training.measures import Figure

DRIFT_CHUNKS = 13  # 1041 frames
SHEET_WORLDS = 5  # shown on a contact sheet
LABEL_HEIGHT = 12  # pixels under every picture of a sheet


@dataclass(frozen=True)
class Row:
    """A line of the table: a test's measure with what it must reach and what is aimed at, and the same for the gain."""

    test: str
    what: str
    unit: str = "dB"
    measure: str = "value"
    bar: float | None = None
    aim: float | None = None
    gain_bar: float | None = None
    gain_aim: float | None = None


ROWS = (
    Row("vae", "VAE round trip", bar=33, aim=35),
    Row("start", "first 16 frames of chunk 1 against the truth", bar=22, aim=25),
    Row("turn", "turn right 80 and back, true first visit, last 20 frames", bar=23, aim=26, gain_bar=10, gain_aim=12),
    Row("circle", "full circle of 4 chunks, last 20 frames against truth", bar=21, aim=24, gain_bar=8.5, gain_aim=10),
    Row("forward", "forward 80 and back, true first visit, last 20 frames", bar=21, aim=24, gain_bar=9, gain_aim=11),
    Row("mirror_forward", "own rollout forward 80 and back, last 20", bar=21, aim=25, gain_bar=5, gain_aim=8),
    Row("mirror_turn", "own rollout right 80 and back, last 20", bar=21, aim=25, gain_bar=5, gain_aim=8),
    Row("far", "own rollout, 8 chunks between visit and return", gain_bar=5, gain_aim=7),
    Row("far_true", "the same, all but the return true"),
    Row("live_turn", "live: right 80 and back, last 16 against first", bar=22, aim=26, gain_bar=9, gain_aim=12),
    Row("live_circle", "live: a full circle, next 16 against first", bar=20, aim=24, gain_bar=8, gain_aim=10),
    Row("live_forward", "live: forward 80 and back, last 16 against first", bar=20, aim=24, gain_bar=8, gain_aim=11),
    Row("view", "view obeyed, of nine", "%", bar=98, aim=99.5),
    Row("move", "move obeyed, of nine", "%", bar=96, aim=98.5),
    Row("words", "colours follow another caption, 50 is chance", "%"),
    Row("words", "own caption over another's, 80 right of one picture", measure="own words"),
    Row("photo_turn", "photographs: turning 10 frames, the part that stays in view", bar=24, aim=27),
    Row("photo_turn", "sharpness of that part over the truth's", "", "sharpness", bar=0.8, aim=0.9),
    Row("photo_turn", "share of its finest detail that is a raster", "%", "raster"),
    Row("photo_turn", "the same share of the truth", "%", "true raster"),
    Row("photo_return", "photographs: 40 right and 40 left, against the photograph", bar=22.5, aim=25),
    Row("photo_return", "sharpness then over the photograph's", "", "sharpness", bar=0.75, aim=0.9),
    Row("photo_forward", "photographs: forward 40 and back 40, against the photograph", bar=20, aim=23),
    Row("photo_forward", "sharpness then over the photograph's", "", "sharpness", bar=0.75, aim=0.9),
    Row("drift", "contrast of chunk 13 over the truth's", "", f"contrast {DRIFT_CHUNKS}", bar=0.85, aim=0.95),
    Row("drift", "saturation of chunk 13 over the truth's", "", f"saturation {DRIFT_CHUNKS}", bar=0.85, aim=0.95),
    Row("drift", "sharpness of chunk 13 over the truth's", "", f"sharpness {DRIFT_CHUNKS}", bar=0.88, aim=0.97),
)


Results = dict[str, dict[str, Figure]]


def table(results: Results) -> str:
    """The results as a Markdown table, and drift by chunk below it."""
    head = ("what", "model", "wrong memory", "over wrong memory", "still picture", "sharpness", "bar", "aim", "reached")
    lines = [head, ("---",) * len(head)]
    lines += [_cells(row, results[row.test]) for row in ROWS if row.measure in results.get(row.test, {})]
    if "drift" in results:
        lines += [(), ("chunk", *map(str, range(1, DRIFT_CHUNKS + 1))), ("---",) * (DRIFT_CHUNKS + 1)]
        for name in ("contrast", "saturation", "sharpness"):
            figures = (results["drift"][f"{name} {chunk + 1}"] for chunk in range(DRIFT_CHUNKS))
            lines.append((f"{name} over the truth's", *(f"{figure.mean:.2f}" for figure in figures)))
    return "\n".join(f"| {' | '.join(line)} |" if line else "" for line in lines) + "\n"


def _cells(row: Row, figures: dict[str, Figure]) -> tuple[str, ...]:
    digits = 1 if row.unit else 2
    value, gain = figures[row.measure], figures.get("gain")

    def show(name: str, form: Callable[[Figure], str]) -> str:
        return form(figures[name]) if name in figures else ""

    def spread(figure: Figure, sign: str = "") -> str:
        return f"{figure.mean:{sign}.{digits}f} [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"

    return (
        row.what,
        f"{spread(value)} {row.unit}".strip(),
        show("wrong", lambda f: f"{f.mean:.1f}"),
        show("gain", lambda f: spread(f, "+")),
        show("still", lambda f: f"{f.mean:.1f}"),
        show("sharpness", lambda f: f"{f.mean:.2f}"),
        _goal(row.bar, row.gain_bar),
        _goal(row.aim, row.gain_aim),
        _reached(row, value, gain),
    )


def _goal(value: float | None, gain: float | None) -> str:
    return "; ".join(([f"{value:g}"] if value is not None else []) + ([f"+{gain:g}"] if gain is not None else []))


def _reached(row: Row, value: Figure, gain: Figure | None) -> str:
    # A ratio should be 1: too much is as wrong as too little.
    reached = (value.mean if row.unit else min(value.mean, 1 / value.mean), gain.mean if gain else 0)

    def reaches(*goals: float | None) -> bool:
        return all(goal is None or mean >= goal for mean, goal in zip(reached, goals, strict=True))

    if row.bar is None and row.gain_bar is None:
        return ""
    return "aim" if reaches(row.aim, row.gain_aim) else "yes" if reaches(row.bar, row.gain_bar) else "no"


@dataclass(frozen=True)
class Strip:
    """One row of a contact sheet: pictures (N, H, W, 3) uint8 and a label under each."""

    pictures: np.ndarray
    labels: tuple[str, ...]


def strips(rows: dict[str, Tensor], columns: Sequence[int]) -> list[Strip]:
    """Contact sheet rows of the first worlds: for each, a row per entry (B, T, H, W, 3) with these of its frames."""
    shown = min(SHEET_WORLDS, *(len(frames) for frames in rows.values()))
    return [
        Strip(frames[world, list(columns)].cpu().numpy(), tuple(f"{name} {column}" for column in columns))
        for world in range(shown)
        for name, frames in rows.items()
    ]


def write_sheet(sheet: Sequence[Strip], path: Path) -> None:
    """A PNG with one row per strip and a label under every picture."""
    height, width = sheet[0].pictures.shape[1:3]
    picture = Image.new("RGB", (width * max(len(s.pictures) for s in sheet), (height + LABEL_HEIGHT) * len(sheet)))
    draw = ImageDraw.Draw(picture)
    for row, strip in enumerate(sheet):
        top = row * (height + LABEL_HEIGHT)
        for column, (pixels, label) in enumerate(zip(strip.pictures, strip.labels, strict=True)):
            picture.paste(Image.fromarray(pixels), (column * width, top))
            draw.text((column * width + 2, top + height), label, fill=(230, 230, 230))
    picture.save(path)
