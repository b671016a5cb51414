"""Films and measures all takes of an evaluation, and keeps every one at once: what is done is not done again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from infworld.evaluation.cases import Suite
from infworld.evaluation.measure import Film, measure
from infworld.evaluation.takes import WHOLE, Take, film
from infworld.metrics.memory import revisit_closure
from infworld.metrics.networks import Networks
from infworld.progress import Progress
from infworld.video import Mp4Writer
from infworld.world import World

STRIP_PICTURES, STRIP_WIDTH = 14, 160  # of a film strip: how many, and pixels that each is wide at most
FILMS_INDEX = "films.json"


@dataclass(frozen=True)
class Evaluation:
    """Where an evaluation's results lie, and what they were made with.

    settings: everything that results depend on. Raises ValueError by `begin` if the folder has results of others.
    """

    folder: Path
    settings: dict
    networks: Networks = Networks()

    def begin(self) -> None:
        path = self.folder / "settings.json"
        (self.folder / "measured").mkdir(parents=True, exist_ok=True)
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else self.settings
        if changed := [name for name, value in self.settings.items() if before.get(name) != value]:
            raise ValueError(
                f"{self.folder} has an evaluation with other settings ({', '.join(changed)}): "
                "choose another folder with --out"
            )
        write_text(path, json.dumps(self.settings, indent=1))

    def film_path(self, take: Take) -> Path:
        return self.folder / "measured" / f"{take.name}.json"

    def strip_path(self, name: str) -> Path:
        return self.folder / "measured" / f"{name}.webp"

    def done(self, take: Take) -> Film | None:
        """The film's measures, if it has been measured."""
        path = self.film_path(take)
        return Film(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def keep(self, take: Take, frames: np.ndarray, began: float, world: World) -> Film:
        """Measures a film and keeps that. began: when filming did, by time.monotonic."""
        measures = measure(take, frames, world, self.networks)
        seconds = time.monotonic() - began
        found = Film(take.name, take.kind, take.case.name, take.memory, len(frames), seconds, measures)
        if take.kind in ("walk", "still"):
            write_strip(self.strip_path(take.name), frames)
        write_text(self.film_path(take), json.dumps(dataclasses.asdict(found), indent=1))
        return found


@dataclass(frozen=True)
class FilmFolder:
    """Where the walks' films are written, under the names that the suite expects; those with memory cut to the last
    frame in a folder of the same name and "-last-frame". An index tells other programs what was done in each."""

    folder: Path
    suite: Suite

    def of(self, memory: str) -> Path:
        return self.folder if memory == WHOLE else self.folder.with_name(f"{self.folder.name}-last-frame")

    def path(self, take: Take) -> Path:
        return self.of(take.memory) / self.suite.film(take.case.name)

    def lack(self, take: Take) -> bool:
        """Whether the take's film belongs here and is not here."""
        return take.kind == "walk" and not self.path(take).is_file()

    def write(self, take: Take, frames: np.ndarray, world: World) -> None:
        path, fps = self.path(take), world.config.validation_data.fps
        path.parent.mkdir(parents=True, exist_ok=True)
        with Mp4Writer(path, fps) as mp4:
            mp4.write(frames)
        returns = revisit_closure(frames, take.actions, world.config.chunk_frames, world.config.camera)
        far = max(returns, key=lambda found: found.gap, default=None)
        entry = {
            "case": take.case.name,
            "film": self.suite.film(take.case.name),
            "actions": take.actions.text(),
            "fps": fps,
            "frames": len(frames),
            "revisit": [far.first, far.again] if far else None,
        }
        self._add(take, entry)

    def _add(self, take: Take, entry: dict) -> None:
        index = self.of(take.memory) / FILMS_INDEX
        entries = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else []
        entries = [other for other in entries if other["case"] != entry["case"]] + [entry]
        write_text(index, json.dumps(entries, indent=1))
        if take.case.turns:
            turns = {case.name: {"turn_frames": _within(case.turns, entry["frames"])} for case in self.suite.cases}
            made = {other["case"] for other in entries}
            cases = {name: value for name, value in turns.items() if name in made}
            write_text(index.with_name("turns.json"), json.dumps({"fps": entry["fps"], "cases": cases}, indent=1))


def run(
    evaluation: Evaluation,
    world: World,
    takes: Sequence[Take],
    choices: dict,
    films: FilmFolder | None = None,
    heard: Callable[[Progress], None] | None = None,
) -> Iterator[tuple[Take, Film]]:
    """Films and measures every take, yielding each; takes that are `done` already are only read."""
    evaluation.begin()
    for take in takes:
        found = None if films and films.lack(take) else evaluation.done(take)
        if found is None:
            began = time.monotonic()
            frames = film(world, take, choices, heard)
            if films and films.lack(take):
                films.write(take, frames, world)
            found = evaluation.keep(take, frames, began, world)
        yield take, found


def digest(suite: Suite) -> str:
    """Of all pictures, actions and prompts: results of other cases are not these."""
    found = hashlib.sha256()
    for case in suite.cases:
        found.update(case.picture.read_bytes())
        found.update(f"{case.name}\0{case.actions.text()}\0{case.prompt}\0".encode())
    return found.hexdigest()[:16]


def strip_frames(frames: int) -> list[int]:
    """Which of a film's frames are in its strip."""
    return np.linspace(0, frames - 1, min(STRIP_PICTURES, frames)).round().astype(int).tolist()


def write_strip(path: Path, frames: np.ndarray) -> None:
    """Pictures from the whole film in a row, as one WebP."""
    pictures = [Image.fromarray(frames[index]) for index in strip_frames(len(frames))]
    width = min(STRIP_WIDTH, pictures[0].width)
    height = round(pictures[0].height * width / pictures[0].width)
    strip = Image.new("RGB", (width * len(pictures), height))
    for place, picture in enumerate(pictures):
        strip.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (place * width, 0))
    strip.save(path, quality=80, method=4)


def write_text(path: Path, text: str) -> None:
    """The whole text or, if this process ends, what was there before."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _within(turns: Sequence[int], frames: int) -> list[int]:
    return [min(turn, frames) for turn in turns]
