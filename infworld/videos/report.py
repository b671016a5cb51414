"""What was made of films, as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape

from infworld.actions import MOVES, UNCERTAIN, VIEWS
from infworld.videos.dataset import FOLDER, Clip
from infworld.videos.labelling import from_above
from infworld.videos.prepare import FilmRecord, Part

COLOURS = {
    **{"forward or up": "#0f766e", "back or down": "#b45309", "left": "#4f46e5", "right": "#be185d"},
    **{"nothing": "#e5e7eb", "uncertain": "#9ca3af"},
}
_WORDS = {"forward": 0, "up": 0, "back": 1, "down": 1, "left": 2, "right": 3}
POSES = {
    "colmap": "poses estimated",
    "turning": "the camera only turned",
    "file": "poses from a file",
    "none": "no poses",
}
PATH_POINTS = 400


def write_report(folder: Path, records: Mapping[str, FilmRecord]) -> Path:
    """Writes report.html for the films in these records; returns its path."""
    parts = {name: [_part(folder, part) for part in record.parts] for name, record in records.items()}
    films = [{"name": name, "record": record, "parts": parts[name]} for name, record in records.items()]
    clips = [part["clip"] for some in parts.values() for part in some if part["clip"]]
    frames = sum(clip.frames for clip in clips)
    environment = Environment(loader=PackageLoader("infworld.videos", "."), autoescape=select_autoescape())
    html = environment.get_template("report.html").render(
        films=films,
        clips=len(clips),
        seconds=sum(clip.frames / clip.info.fps for clip in clips),
        seen=sum(record.seconds for record in records.values()),
        uncertain=sum(clip.uncertain * clip.frames for clip in clips) / max(frames, 1),
        failed=sum(bool(record.error) for record in records.values()),
        colours=COLOURS,
    )
    (folder / "report.html").write_text(html, encoding="utf-8")
    return folder / "report.html"


def _part(folder: Path, part: Part) -> dict:
    shown = {"start": part.start, "end": part.end, "reason": part.reason, "clip": None}
    if not part.clip:
        return shown
    clip = Clip(folder / FOLDER / f"{part.clip}.safetensors")
    lines = path_from_above(clip)
    picture = folder / "thumbnails" / f"{part.clip}.jpg"
    return shown | {
        "clip": clip,
        "poses": POSES[clip.info.poses],
        "returning": (clip.read("returns") >= 0).float().mean().item(),
        "actions": [(row, _runs(clip.actions[row, :-1].tolist(), names)) for row, names in enumerate((MOVES, VIEWS))],
        "thumbnails": base64.b64encode(picture.read_bytes()).decode(),
        "path": [" ".join(f"{x:.1f},{y:.1f}" for x, y in line) for line in lines],
        "start_point": lines[0][0].round(1).tolist() if lines else None,
    }


def _runs(labels: list[int], names: tuple[str, ...]) -> list[dict]:
    """The same label held, as first frame, number of frames, name and colours."""
    runs, first = [], 0
    for label, group in groupby(labels):
        count = len(list(group))
        runs.append({"first": first, "count": count, "name": names[label], "colours": _colours(label, names[label])})
        first += count
    return runs


def _colours(label: int, name: str) -> list[str]:
    colours = list(COLOURS.values())
    if label in (0, UNCERTAIN):
        return [COLOURS["uncertain" if label else "nothing"]]
    return [colours[_WORDS[word]] for word in name.split() if word in _WORDS]


def path_from_above(clip: Clip) -> list[np.ndarray]:
    """Where the camera went, pieces (N, 2) without a gap, within -100 to 100; the first sight is upwards."""
    poses = clip.read("poses").double().numpy()
    known = np.flatnonzero(np.isfinite(poses).all((1, 2)))
    if not len(known):
        return []
    places = from_above(poses[known])[:, :2]
    places -= (places.max(0) + places.min(0)) / 2
    places *= 100 / max(np.abs(places).max(), 1e-9) if clip.info.pace else 0
    drawn = np.stack([-places[:, 1], -places[:, 0]], 1)  # x ahead, y to the left
    pieces = np.split(drawn, np.flatnonzero(np.diff(known) > 1) + 1)
    return [piece[:: max(1, len(known) // PATH_POINTS)] for piece in pieces]
