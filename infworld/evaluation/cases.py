"""Cases to film: a picture, actions, a prompt and a name, from a folder in one of three layouts.

cases.json          a list of {"name", "picture", "actions", "prompt"}; actions are script text, a list with one
                    {"move", "view"} per frame, or the name of a JSON file with such a list
cases/case_*.json   WBench's data folder; its navigation cases are taken
NAME.png            with NAME.json (actions) and NAME.txt (prompt) beside it, as in examples/
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from infworld.actions import VIEW_WORDS, ActionScript
from infworld.files import read_json_text
from infworld.picture_files import SUFFIXES

SHIPPED = Path(__file__).resolve().parent.parent / "cases"
WBENCH_SECONDS = 4.0  # of every turn
WBENCH_KEYS = {
    **{"W": "forward", "S": "back", "A": "strafe left", "D": "strafe right", "stop": "wait"},
    **{"→": "right", "←": "left", "↑": "up", "↓": "down"},
    **{word: word for word in VIEW_WORDS},
}


@dataclass(frozen=True)
class Case:
    """What one film is made from. turns: first frame of each turn and the end, for suites that have turns."""

    name: str
    picture: Path
    actions: ActionScript
    prompt: str = ""
    turns: tuple[int, ...] = ()


@dataclass(frozen=True)
class Suite:
    """Cases, and the names under which their films are expected: `film_name` with the case's name in it."""

    cases: tuple[Case, ...]
    film_name: str = "{}.mp4"

    def film(self, case: str) -> str:
        """Path of a case's film within a folder of films."""
        return self.film_name.format(case)


def read_suite(folder: str | Path, fps: float) -> Suite:
    """The cases in a folder; fps: the model's, for suites that give seconds.

    Raises FileNotFoundError for a missing folder, ValueError that names the case for one that cannot be filmed.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of cases at {folder}")
    if (folder / "cases.json").is_file():
        suite = Suite(tuple(_listed(folder, entry) for entry in _json(folder / "cases.json", list)))
    elif found := sorted((folder / "cases").glob("case_*.json"), key=_number):
        cases = (_wbench(folder, _json(path, dict), fps) for path in found)
        suite = Suite(tuple(case for case in cases if case), "videos/case_{}_combined.mp4")
    else:
        suite = Suite(tuple(_beside(path) for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES))
    _check(suite, folder)
    return suite


def _listed(folder: Path, entry: Any) -> Case:
    known = {"name", "picture", "actions", "prompt"}
    if not isinstance(entry, dict) or not {"name", "picture", "actions"} <= entry.keys() <= known:
        raise ValueError(f"{folder}: a case is an object with name, picture, actions and prompt, not {entry!r:.200}")
    actions, name = entry["actions"], str(entry["name"])
    if isinstance(actions, str) and actions.endswith(".json"):
        actions = folder / actions
    try:
        return Case(name, folder / entry["picture"], ActionScript.of(actions), entry.get("prompt", ""))
    except (ValueError, OSError) as error:
        raise ValueError(f"case {name}: {error}") from error


def _beside(picture: Path) -> Case:
    prompt = picture.with_suffix(".txt")
    words = prompt.read_text(encoding="utf-8").strip() if prompt.is_file() else ""
    return Case(picture.stem, picture, ActionScript.read(picture.with_suffix(".json")), words)


def _wbench(folder: Path, data: dict, fps: float) -> Case | None:
    """A case of WBench, None if nothing in it is navigation. Its other turns, such as events, become waiting."""
    turns = [_keys(turn.get("action", turn.get("action_key", "stop"))) for turn in data.get("interactions", [])]
    if not any(turn is not None and turn != "wait" for turn in turns):
        return None
    frames = round(WBENCH_SECONDS * fps)
    settings = data.get("settings", {})
    return Case(
        name=str(data["id"]),
        picture=_find(folder, settings.get("initial_image", "")),
        actions=ActionScript.parse(", ".join(f"{turn or 'wait'} {frames}" for turn in turns)),
        prompt=data.get("description") or settings.get("scene", {}).get("attribute", ""),
        turns=tuple(accumulate([frames] * len(turns), initial=0)),
    )


def _keys(action: str) -> str | None:
    """WBench's keys ("W+→") in the words of the script, None for an action that is no navigation."""
    keys = [key.strip() for key in action.split("+")]
    return "+".join(WBENCH_KEYS[key] for key in keys) if all(key in WBENCH_KEYS for key in keys) else None


def _find(folder: Path, picture: str) -> Path:
    """A picture that is named relative to the folder, to one above it, or to a folder that is called otherwise here."""
    places = [base / picture for base in (folder, *folder.resolve().parents[:2])]
    return next((place for place in places if place.is_file()), folder / "images" / Path(picture).name)


def _json(path: Path, kind: type) -> Any:
    try:
        data = json.loads(read_json_text(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, kind):
        raise ValueError(f"{path} must hold a {kind.__name__}, not a {type(data).__name__}")
    return data


def _number(path: Path) -> tuple[int, str]:
    digits = re.findall(r"\d+", path.stem)
    return int(digits[-1]) if digits else 0, path.stem


def _check(suite: Suite, folder: Path) -> None:
    if not suite.cases:
        raise ValueError(f"no cases in {folder}: it needs a cases.json, or pictures with actions beside them")
    names = [case.name for case in suite.cases]
    for case in suite.cases:
        if not re.fullmatch(r"[\w][\w .\-]*", case.name):
            raise ValueError(f"the case name {case.name!r} cannot be a file name: use letters, digits, - and _")
        if names.count(case.name) > 1:
            raise ValueError(f"{folder} has two cases with the name {case.name}")
        if not case.picture.is_file():
            raise ValueError(f"case {case.name}: no picture at {case.picture}")
        if not len(case.actions):
            raise ValueError(f"case {case.name} has no actions")
