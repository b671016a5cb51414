"""The report of an evaluation: JSON, CSV and one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure as Plot
from matplotlib.ticker import MaxNLocator

from infworld.evaluation.measure import DRIFTS, Film, Row, figures, gaps, obedience
from infworld.evaluation.run import Evaluation, strip_frames, write_text
from infworld.evaluation.takes import LAST, WHOLE
from infworld.metrics.summary import Figure

NAMES = {WHOLE: "whole memory", LAST: "last frame only"}
COLOURS = {WHOLE: "#0f766e", LAST: "#b45309"}


def write_report(evaluation: Evaluation, films: Sequence[Film]) -> Path:
    """Writes report.json, films.csv, figures.csv and report.html; returns the last one's path."""
    folder = evaluation.folder
    write_text(folder / "report.json", json.dumps(as_dict(evaluation, films), indent=1))
    write_text(folder / "films.csv", _csv(_film_rows(films)))
    write_text(folder / "figures.csv", _csv(_figure_rows(films)))
    environment = Environment(loader=PackageLoader("infworld.evaluation", "."), autoescape=select_autoescape())
    html = environment.get_template("report.html").render(
        settings=evaluation.settings,
        names=NAMES,
        memories=[memory for memory in NAMES if any(film.memory == memory for film in films)],
        table=[
            (row, {memory: show(row, value) for memory, value in columns.items()}) for row, columns in figures(films)
        ],
        obedience=obedience(films),
        plots=[Markup(plot) for plot in (plot_gaps(films), *plot_drift(films)) if plot],
        strips=[
            (film, ", ".join(map(str, strip_frames(film.frames))), _picture(evaluation.strip_path(film.name)))
            for film in films
            if film.kind in ("walk", "still")
        ],
        cases=len({film.case for film in films}),
        films=len(films),
        seconds=sum(film.seconds for film in films),
        missing=evaluation.networks.missing,
    )
    write_text(folder / "report.html", html)
    return folder / "report.html"


def as_dict(evaluation: Evaluation, films: Sequence[Film]) -> dict:
    """All of an evaluation in plain values; numbers that could not be had are null."""
    rows = [
        {**dataclasses.asdict(row), **{memory: dataclasses.asdict(value) for memory, value in columns.items()}}
        for row, columns in figures(films)
    ]
    by_gap = {gap: {memory: dataclasses.asdict(v) for memory, v in c.items()} for gap, c in gaps(films).items()}
    data = {
        "settings": evaluation.settings,
        "figures": rows,
        "returns by gap": by_gap,
        "actions": obedience(films),
        "films": [dataclasses.asdict(film) for film in films],
    }
    return _without_nan(data)


def text_table(films: Sequence[Film]) -> str:
    """The figures as a Markdown table, for the terminal and for a README."""
    memories = [memory for memory in NAMES if any(film.memory == memory for film in films)]
    lines = [["", *(NAMES[memory] for memory in memories)], ["---"] * (1 + len(memories))]
    for row, columns in figures(films):
        lines.append([row.words, *(show(row, columns[m]) if m in columns else "" for m in memories)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(row: Row, value: Figure) -> str:
    """A figure with its interval and unit."""
    digits = {"dB": 1, "%": 1}.get(row.unit, 2)
    unit = f" {row.unit}" if row.unit else ""
    if value.films == 1:
        return f"{value.mean:.{digits}f}{unit}"
    return f"{value.mean:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]{unit}"


def plot_gaps(films: Sequence[Film]) -> str:
    """Memory by the chunks between a view and its return, as SVG; "" if no walk returns."""
    found = gaps(films)
    if not found:
        return ""
    plot, axes = _plot("What comes back of a view", "chunks since it was seen", "score, %")
    for memory, colour in COLOURS.items():
        points = [(gap, c[memory]) for gap, c in found.items() if memory in c and c[memory].films]
        if points:
            xs, values = zip(*points, strict=True)
            axes.plot(xs, [value.mean for value in values], "o-", color=colour, label=NAMES[memory])
            axes.fill_between(xs, [v.low for v in values], [v.high for v in values], color=colour, alpha=0.15, lw=0)
    axes.axhline(0, color="gray", lw=0.8)
    return _svg(plot)


def plot_drift(films: Sequence[Film]) -> list[str]:
    """Each drift by chunk, walking with either memory and doing nothing, as SVG."""
    plots = []
    for name in DRIFTS:
        ratio = name != "colour shift"
        plot, axes = _plot(name.capitalize(), "chunk", "over the first chunk's" if ratio else "of 255")
        for kind, memory, style in (("walk", WHOLE, "-"), ("walk", LAST, "-"), ("still", WHOLE, ":")):
            curves = [f.measures[f"{name} by chunk"] for f in films if (f.kind, f.memory) == (kind, memory)]
            if not curves:
                continue
            longest = max(map(len, curves))
            means = [_mean(curve[i] for curve in curves if i < len(curve)) for i in range(longest)]
            label = NAMES[memory] if kind == "walk" else "doing nothing"
            axes.plot(range(1, 1 + longest), means, style, color=COLOURS[memory], label=label)
        axes.axhline(1 if ratio else 0, color="gray", lw=0.8)
        plots.append(_svg(plot))
    return plots


def _film_rows(films: Sequence[Film]) -> list[list]:
    head = ["film", "kind", "case", "memory", "frames", "measure", "value"]
    rows = [
        [film.name, film.kind, film.case, film.memory, film.frames, name, value]
        for film in films
        for name, value in film.measures.items()
        if not isinstance(value, list)
    ]
    return [head, *rows]


def _figure_rows(films: Sequence[Film]) -> list[list]:
    head = ["group", "measure", "unit", "memory", "mean", "low", "high", "films"]
    rows = [
        [row.group, row.words, row.unit, memory, value.mean, value.low, value.high, value.films]
        for row, columns in figures(films)
        for memory, value in columns.items()
    ]
    return [head, *rows]


def _csv(rows: Iterable[list]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _plot(title: str, x: str, y: str):
    plot = Plot(figsize=(5.2, 3.2), layout="constrained")
    axes = plot.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # chunks
    axes.spines[["top", "right"]].set_visible(False)
    return plot, axes


def _svg(plot: Plot) -> str:
    plot.legend(loc="outside lower center", ncols=3, frameon=False)  # beside the curves, which go everywhere
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "infworld"}):
        plot.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue().split("?>", 1)[1].split(">", 1)[1]  # without XML declaration and doctype


def _picture(path: Path) -> str:
    return f"data:image/webp;base64,{base64.b64encode(path.read_bytes()).decode()}" if path.is_file() else ""


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _without_nan(data):
    """The same with None for every NaN, which JSON does not know."""
    if isinstance(data, dict):
        return {key: _without_nan(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_without_nan(value) for value in data]
    return None if isinstance(data, float) and data != data else data
