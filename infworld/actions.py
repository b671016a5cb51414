"""What the person does: move and view per frame, and the script of segments that says it (spec section 3).

One script has three forms that convert into each other: segments, one (move, view) pair per frame, and text such
as `forward 80, right 40, forward+left 60`. The exchange format is a JSON list of {"move": ..., "view": ...}.
Action i moves the camera from frame i to frame i + 1.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

from infworld.files import read_json_text

MOVES = (
    "no-op",
    "go forward",
    "go back",
    "go left",
    "go right",
    "go forward and go left",
    "go forward and go right",
    "go back and go left",
    "go back and go right",
    "uncertain",
)
VIEWS = (
    "no-op",
    "turn up",
    "turn down",
    "turn left",
    "turn right",
    "turn up and turn left",
    "turn up and turn right",
    "turn down and turn left",
    "turn down and turn right",
    "uncertain",
)
NO_OP = (0, 0)
MAX_FRAMES = 20_000  # of a script
MAX_CHARACTERS = 200 * MAX_FRAMES  # of a script's text or JSON

# The words of the text form. A plain "left" turns the head, as in a car's directions; "strafe left" steps aside.
MOVE_WORDS = {"forward": (1, 0), "back": (-1, 0), "strafe left": (0, -1), "strafe right": (0, 1)}
VIEW_WORDS = {"up": (1, 0), "down": (-1, 0), "left": (0, -1), "right": (0, 1)}
WAIT_WORD = "wait"
_INDEX = {
    (0, 0): 0,
    (1, 0): 1,
    (-1, 0): 2,
    (0, -1): 3,
    (0, 1): 4,
    (1, -1): 5,
    (1, 1): 6,
    (-1, -1): 7,
    (-1, 1): 8,
}
_DIRECTION = {index: direction for direction, index in _INDEX.items()}
UNCERTAIN = 9


@dataclass(frozen=True)
class Segment:
    """The same move and view (indices into MOVES and VIEWS) held for `frames` >= 1 frames."""

    move: int
    view: int
    frames: int

    def __post_init__(self):
        for name, value, names in (("move", self.move, MOVES), ("view", self.view, VIEWS)):
            if type(value) is not int or not 0 <= value < len(names):
                raise ValueError(f"{name} must be 0 to {len(names) - 1}, not {reprlib.repr(value)}")
        if type(self.frames) is not int or self.frames < 1:
            raise ValueError(f"a segment lasts 1 frame or more, not {reprlib.repr(self.frames)}")


@dataclass(frozen=True)
class ActionScript:
    """What is done in every frame, as segments in order. Past its end nothing is done (no-op).

    segments: any iterable of them, kept as a tuple. Raises ValueError beyond `MAX_FRAMES` frames in all.
    """

    segments: tuple[Segment, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "segments", tuple(_within_limit(self.segments)))

    @staticmethod
    def of(actions: ActionScript | str | Path | Iterable | None) -> ActionScript:
        """A script from whatever a caller has: a script, a JSON path, script text, or a list of action dicts."""
        if actions is None:
            return ActionScript()
        if isinstance(actions, ActionScript):
            return actions
        if isinstance(actions, Path) or (isinstance(actions, str) and actions.lower().endswith(".json")):
            return ActionScript.read(actions)
        if isinstance(actions, str):
            return ActionScript.parse(actions)
        return ActionScript.from_list(actions)

    @staticmethod
    def from_pairs(pairs: Iterable[tuple[int, int]]) -> ActionScript:
        """From one (move, view) index pair per frame; equal neighbours become one segment."""
        runs = ((pair, sum(1 for _ in run)) for pair, run in groupby(islice(pairs, MAX_FRAMES + 1)))
        return ActionScript(Segment(int(move), int(view), frames) for (move, view), frames in runs)  # type: ignore[arg-type]

    @staticmethod
    def from_list(actions: Iterable) -> ActionScript:
        """From the exchange format, one {"move": name, "view": name} per frame. ValueError names what is wrong."""
        if isinstance(actions, dict) or not isinstance(actions, Iterable):
            raise ValueError(f"actions must be a list with one entry per frame, not {type(actions).__name__}")
        return ActionScript.from_pairs(_pair(action, frame) for frame, action in enumerate(actions))

    @staticmethod
    def from_json(text: str) -> ActionScript:
        """From the exchange format as JSON text."""
        _check_length(len(text))
        try:
            actions = json.loads(_plain(text))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the actions are not valid JSON: {error}") from error
        if not isinstance(actions, list):
            raise ValueError(f"the action JSON must be a list with one entry per frame, not {type(actions).__name__}")
        return ActionScript.from_list(actions)

    @staticmethod
    def read(path: str | Path) -> ActionScript:
        """From a JSON file in the exchange format. FileNotFoundError if there is none."""
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no action file at {path}")
        try:
            _check_length(path.stat().st_size)
            return ActionScript.from_json(read_json_text(path))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a JSON text file") from error

    @staticmethod
    def parse(text: str) -> ActionScript:
        """From text: comma- or line-separated `words frames`, as in `forward 80, right 40, strafe left+up 12`."""
        _check_length(len(text))
        parts = (part.strip() for part in re.split(r"[,;\n]", _plain(text)))
        return ActionScript(_parse_segment(part) for part in parts if part)  # type: ignore[arg-type]

    def text(self) -> str:
        """The text form, which `parse` reads back. *Uncertain* is a label only and has no words: it reads `wait`."""
        return ", ".join(f"{words(segment)} {segment.frames}" for segment in self.segments)

    def pairs(self, start: int = 0, stop: int | None = None) -> list[tuple[int, int]]:
        """(move, view) per frame of [start, stop), padded with no-op past the end; all frames by default."""
        every = [(s.move, s.view) for s in self.segments for _ in range(s.frames)]
        stop = len(every) if stop is None else stop
        return every[start:stop] + [NO_OP] * (stop - max(start, len(every)))

    def to_list(self) -> list[dict[str, str]]:
        """The exchange format, one dict per frame."""
        return [{"move": MOVES[move], "view": VIEWS[view]} for move, view in self.pairs()]

    def to_json(self) -> str:
        """The exchange format as JSON text, one frame per line."""
        return "[\n" + ",\n".join(json.dumps(action) for action in self.to_list()) + "\n]\n"

    def cut(self, frames: int) -> ActionScript:
        """Exactly the first `frames` frames, padded with no-op: so that what is added begins right there."""
        return ActionScript.from_pairs(self.pairs(0, frames))

    def __len__(self) -> int:
        """Frames."""
        return sum(segment.frames for segment in self.segments)

    def __add__(self, other: ActionScript) -> ActionScript:
        """This script, then the other."""
        return ActionScript(self.segments + other.segments)


def _within_limit(segments: Iterable[Segment]) -> Iterator[Segment]:
    """The segments, as long as their frames are not too many: before anything is made of them."""
    frames = 0
    for segment in segments:
        frames += segment.frames
        if frames > MAX_FRAMES:
            raise ValueError(f"the actions may last at most {MAX_FRAMES} frames")
        yield segment


def _plain(text: str) -> str:
    """The text with plain blanks and line ends in place of Unicode's others, and without byte order marks."""
    return re.sub(r"[^\S\n]|[\ufeff\u200b]", " ", re.sub("[\u2028\u2029]", "\n", text))


def _check_length(characters: int) -> None:
    if characters > MAX_CHARACTERS:
        raise ValueError(f"the actions may have at most {MAX_CHARACTERS} characters, not {characters}")


def words(segment: Segment) -> str:
    """A segment's move and view in the words of the text form: `forward+left`, `wait`."""
    move = _words(_DIRECTION.get(segment.move, (0, 0)), MOVE_WORDS)
    view = _words(_DIRECTION.get(segment.view, (0, 0)), VIEW_WORDS)
    return "+".join(move + view) or WAIT_WORD


def _words(direction: tuple[int, int], vocabulary: dict[str, tuple[int, int]]) -> list[str]:
    parts = ((direction[0], 0), (0, direction[1]))
    return [word for part in parts for word, d in vocabulary.items() if d == part and part != (0, 0)]


def _pair(action: object, frame: int) -> tuple[int, int]:
    if not isinstance(action, dict) or set(action) != {"move", "view"}:
        raise ValueError(f'action of frame {frame} must be {{"move": ..., "view": ...}}, not {reprlib.repr(action)}')
    for key, names in (("move", MOVES), ("view", VIEWS)):
        if not isinstance(action[key], str) or action[key] not in names:
            raise ValueError(
                f"unknown {key} {reprlib.repr(action[key])} in frame {frame}; known are: {', '.join(names)}"
            )
    return MOVES.index(action["move"]), VIEWS.index(action["view"])


def _parse_segment(part: str) -> Segment:
    match = re.fullmatch(r"([a-z +\-]*[a-z])\s+(\d{1,9})", part.lower())
    if not match:
        raise ValueError(
            f"cannot read {reprlib.repr(part)}: write what to do and for how many frames, such as 'forward+left 60'"
        )
    move = view = (0, 0)
    for word in (re.sub(r"[\s\-]+", " ", w).strip() for w in match[1].split("+")):
        if word in MOVE_WORDS:
            move = _join(move, MOVE_WORDS[word], part)
        elif word in VIEW_WORDS:
            view = _join(view, VIEW_WORDS[word], part)
        elif word != WAIT_WORD:
            known = ", ".join([*MOVE_WORDS, *VIEW_WORDS, WAIT_WORD])
            raise ValueError(f"unknown action {word!r} in {part!r}; known are: {known}")
    return Segment(_INDEX[move], _INDEX[view], int(match[2]))


def _join(a: tuple[int, int], b: tuple[int, int], part: str) -> tuple[int, int]:
    if any(x and y for x, y in zip(a, b, strict=True)):
        raise ValueError(f"{part!r} goes both ways at once")
    return (a[0] + b[0], a[1] + b[1])
