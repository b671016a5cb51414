"""Makes training data of your own films: camera poses, actions, latents, and a page that shows what was found.

    infworld prepare-videos films/ --out data/
    infworld prepare-videos films/ --out data/ --model infinite-world --captions captions.json
    infworld prepare-videos films/ --out data/ --poses poses/

Interrupted, the same command goes on where it was. What cannot be used is told, here and in data/report.html, and the
rest goes on. How to film, and what to expect: docs/own-videos.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from infworld.cli.console import StopSignals, exit_code
from infworld.config import load_config
from infworld.devices import pick_device

if TYPE_CHECKING:
    from infworld.videos.prepare import FilmRecord

AXES = ("opencv", "opengl")


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    return exit_code(lambda: run(args), "stopped; the same command goes on from here")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="infworld prepare-videos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="folder of films, with all folders in it")
    add("--out", type=Path, required=True, metavar="DATA", help="folder to write to, and to go on in")
    add("--model", default="tiny", help="whose VAE and sizes to use: tiny, infinite-world, or the path of a YAML file")
    add("--captions", type=Path, help='JSON file: {"film.mp4": "a walk in a garden", ...}')
    add("--poses", type=Path, metavar="DIR", help="folder of camera poses, film.txt for film.mp4; others are estimated")
    add("--axes", choices=AXES, default="opencv", help="of the cameras in TUM files and matrices; opengl: y is up")
    add("--device", default="auto", help="auto (default), cpu or cuda: for the VAE")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Prepares and reports; returns 1 if a film could not be read or nothing became a clip."""
    try:
        from infworld.videos.prepare import Preparation
        from infworld.videos.report import write_report
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing: pip install 'infworld[videos]'") from error

    preparation = Preparation(
        args.folder,
        args.out,
        load_config(args.model),
        pick_device(args.device),
        read_captions(args.captions) if args.captions else {},
        args.poses,
        args.axes,
    )
    console = Console(len(preparation.names))
    try:
        with StopSignals(), without_warnings():  # what is told there is told below
            records = preparation.run(console.film_begins, console.progress)
    finally:
        console.close()
    for name, record in records.items():
        tell(name, record)
    page = write_report(args.out, records)
    clips = sum(bool(part.clip) for record in records.values() for part in record.parts)
    print(f"{clips} clips in {args.out}; what was found: {page}")
    return 1 if not clips or any(record.error for record in records.values()) else 0


@contextmanager
def without_warnings() -> Iterator[None]:
    """In which the project logs errors only."""
    log = logging.getLogger("infworld")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def read_captions(path: Path) -> dict[str, str]:
    """Captions by film. Raises ValueError for a file that is not a JSON object of texts."""
    try:
        captions = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise ValueError(f"cannot read the captions in {path}: {error}") from error
    if not isinstance(captions, dict) or not all(isinstance(text, str) for text in captions.values()):
        raise ValueError(f'{path} must be a JSON object such as {{"film.mp4": "a walk in a garden"}}')
    return captions


def tell(name: str, record: FilmRecord) -> None:
    """Says what became of a film, a line for each thing."""
    if record.error:
        print(f"{name}: {record.error}", file=sys.stderr)
    for problem in record.problems:
        print(f"{name}: {problem}")
    for part in record.parts:
        print(f"{name} {part.start:.1f} to {part.end:.1f} s: {part.clip or f'left out, {part.reason}'}")


class Console:
    """One bar for the film at hand, with the time that its stage has left, and that of all films once one is done."""

    def __init__(self, films: int):
        self.films, self.done, self.began = films, 0, time.monotonic()
        self.stage = ""
        self.name = ""
        self.bar = tqdm(total=1, dynamic_ncols=True, disable=None)

    def film_begins(self, number: int, name: str) -> None:
        each = (time.monotonic() - self.began) / self.done if self.done else None
        left = f", about {each * (self.films - number) / 60:.0f} min left in all" if each else ""
        self.name = f"{number + 1} of {self.films}{left}: {name}"
        self.done += 1
        self.stage = ""

    def progress(self, stage: str, done: int, total: int) -> None:
        if stage != self.stage:
            self.stage = stage
            self.bar.set_description_str(f"{self.name}, {stage}", refresh=False)
            self.bar.reset(total=total)
        self.bar.total = total
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        self.bar.close()


if __name__ == "__main__":
    sys.exit(main())
