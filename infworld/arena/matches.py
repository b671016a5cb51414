"""Which films meet: a folder with one folder of films for each contestant, as `infworld evaluate --films` writes them.

films/tiny/circles.mp4        films/tiny/films.json      optional: actions, frame rate, a revisited pair
films/tiny-fast/circles.mp4   films/tiny-fast/films.json
"""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from infworld.actions import ActionScript, words
from infworld.config import RolloutConfig

log = logging.getLogger(__name__)
INDEX = "films.json"


@dataclass(frozen=True)
class Entry:
    """A contestant's film of a case. revisit: a frame and a later one that should show the same view."""

    path: Path
    actions: ActionScript = ActionScript()
    fps: float = RolloutConfig.fps
    revisit: tuple[int, int] | None = None


@dataclass(frozen=True, order=True)
class Pair:
    """Two contestants' films of one case; the names in alphabetical order."""

    case: str
    first: str
    second: str


@dataclass(frozen=True)
class Matches:
    """All films, by case and contestant."""

    films: dict[str, dict[str, Entry]]

    @staticmethod
    def read(folder: str | Path) -> Matches:
        """From a folder of contestants' folders. Raises ValueError if no two of them have a film of the same name."""
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder of films at {folder}")
        films: dict[str, dict[str, Entry]] = {}
        for contestant in sorted(path for path in folder.iterdir() if path.is_dir()):
            for case, entry in _films(contestant).items():
                films.setdefault(case, {})[contestant.name] = entry
        matches = Matches(films)
        if not matches.pairs():
            raise ValueError(
                f"there is nothing to compare in {folder}: it needs a folder for each of two or more models or "
                "settings, with films of the same names in them"
            )
        return matches

    def pairs(self) -> list[Pair]:
        """Every two films that are of the same case and actions and are both there now."""
        found = []
        for case, entries in self.films.items():
            there = sorted(name for name, entry in entries.items() if entry.path.is_file())
            for first, second in itertools.combinations(there, 2):
                if entries[first].actions == entries[second].actions:
                    found.append(Pair(case, first, second))
        return found

    def entry(self, case: str, contestant: str) -> Entry:
        return self.films[case][contestant]


def segments(actions: ActionScript) -> list[list]:
    """[words, frames] of each segment, for the page."""
    return [[words(segment), segment.frames] for segment in actions.segments]


def _films(folder: Path) -> dict[str, Entry]:
    """A contestant's films: those of its index, else every mp4 by its name."""
    index = folder / INDEX
    if not index.is_file():
        return {path.stem: Entry(path) for path in sorted(folder.glob("*.mp4"))}
    try:
        return {
            str(entry["case"]): Entry(
                folder / entry["film"],
                ActionScript.of(entry["actions"]),
                float(entry["fps"]),
                tuple(entry["revisit"]) if entry.get("revisit") else None,
            )
            for entry in json.loads(index.read_text(encoding="utf-8"))
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index} is not an index of films: {error}") from error
