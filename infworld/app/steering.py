"""What a person steers while a walk is played: written by the server, read by whatever process computes the walk.

On a ZeroGPU Space the walk is computed in a forked process whose arguments were pickled at its beginning. So steering
goes through a small file, which crosses every border.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infworld.actions import NO_OP, ActionScript, Segment

MAX_TAPS = 16  # in one message
MAX_TAP_FRAMES = 400  # waiting to be done: five quarter turns of looking about


@dataclass(frozen=True)
class Tap:
    """An action that was over before a chunk began with it: a short press, or looking about with the mouse.

    number: of the message that it began with.
    """

    number: int
    move: int
    view: int
    frames: int


@dataclass(frozen=True)
class Steering:
    """The latest message of a browser. number: counts its messages. move, view: what is held now. shown: frames that
    it has drawn so far, at the time `at` (seconds of `time.monotonic`). stalls: how often it had none to draw."""

    number: int = 0
    move: int = NO_OP[0]
    view: int = NO_OP[1]
    taps: tuple[Tap, ...] = ()
    paused: bool = False
    shown: int = 0
    stalls: int = 0
    at: float = 0.0

    @staticmethod
    def of_message(message: Any) -> Steering:
        """From what a browser sends. Raises ValueError for anything malformed."""
        if not isinstance(message, dict):
            raise ValueError("a steering message must be an object")
        numbers = {name: message.get(name, 0) for name in ("number", "move", "view", "shown", "stalls")}
        taps = message.get("taps", [])
        if not isinstance(taps, list) or len(taps) > MAX_TAPS or not all(isinstance(tap, list) for tap in taps):
            raise ValueError(f"a steering message has a list of at most {MAX_TAPS} taps")
        if not all(type(n) is int and 0 <= n < 2**53 for n in [*numbers.values(), *sum(taps, [])]):
            raise ValueError("a steering message has whole numbers from 0 on")
        if not all(len(tap) == 4 for tap in taps):
            raise ValueError("a tap has number, move, view and frames")
        for move, view, frames in [(numbers["move"], numbers["view"], 1), *(tap[1:] for tap in taps)]:
            Segment(move, view, frames)  # which checks them
        paused = message.get("paused", False) is True
        return Steering(**numbers, taps=tuple(Tap(*tap) for tap in taps), paused=paused, at=time.monotonic())


class SteeringFile:
    """The latest steering in a file. One process writes it, others may read it at any time."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, steering: Steering) -> None:
        part = self.path.with_name(f".{self.path.name}.part")
        part.write_text(json.dumps(asdict(steering)), encoding="utf-8")
        os.replace(part, self.path)

    def read(self) -> Steering:
        """The default one where nothing has been written yet."""
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return Steering()
        return Steering(**{**values, "taps": tuple(Tap(**tap) for tap in values["taps"])})


class Helm:
    """Turns steering into the actions of one chunk after the other."""

    def __init__(self) -> None:
        self._number = 0  # of the last steering that a chunk was made with
        self._taps: deque[Tap] = deque()

    def actions(self, steering: Steering, frames: int) -> ActionScript:
        """What to do in the next `frames` frames: first the taps that no chunk has seen while they were held, what does
        not fit being left for the next chunk; then what is held now."""
        waiting = sum(tap.frames for tap in self._taps)
        for tap in steering.taps:
            if tap.number > self._number and waiting + tap.frames <= MAX_TAP_FRAMES:
                self._taps.append(tap)
                waiting += tap.frames
        self._number = max(self._number, steering.number)
        segments, left = [], frames
        while self._taps and left:
            tap = self._taps.popleft()
            done = min(left, tap.frames)
            segments.append(Segment(tap.move, tap.view, done))
            left -= done
            if done < tap.frames:
                self._taps.appendleft(Tap(tap.number, tap.move, tap.view, tap.frames - done))
        if left:
            segments.append(Segment(steering.move, steering.view, left))
        return ActionScript(segments)
