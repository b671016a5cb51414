"""Plays a walk evenly while it is computed: how long the next chunk is, when it begins, how fast it is shown."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

RECENT = 6  # chunks that are looked back on: some take longer than others, as the memory is made anew
HEADROOM = 0.95  # of what the machine makes, that is shown where it does not reach the film's own speed
MARGIN, MOST_MARGIN = 0.06, 0.5  # seconds that a chunk shall be there before it is needed
GAIN = 1.1  # how much more a longer chunk must bring, where even that does not reach the film's own speed
PATIENCE = 4  # chunks of a length before it is judged
SPARE, TRUST = 1.2, 20  # so much faster than needed for so many chunks, a machine may manage shorter ones again


class Pace:
    """lengths: frames per chunk to choose from, shortest first. fps: the film's frames a second.

    A chunk is as short as the machine allows, since what is steered waits for the chunk after; and it is begun as late
    as it can be.
    """

    def __init__(self, lengths: Sequence[int], fps: float):
        self._lengths = sorted(lengths)
        self._fps = fps
        self._at = 0
        self._seconds: dict[int, float] = {}  # that a chunk takes, until the next can begin, by length
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)  # and until it is shown
        self._until_shown = 0.0  # seconds from a chunk's beginning until its frames are there, at worst
        self._seen = 0  # chunks of this length
        self._stalls = 0
        self._margin = MARGIN

    @property
    def frames(self) -> int:
        """Of the next chunk."""
        return self._lengths[self._at]

    @property
    def speed(self) -> float:
        """Frames a second that chunks of the present length are made at; the film's own speed until that is known."""
        seconds = self._seconds.get(self.frames)
        return self.frames / seconds if seconds else self._fps

    @property
    def rate(self) -> float:
        """Frames a second to show, so that the frames last until the next ones are there."""
        return min(self._fps, HEADROOM * self.speed)

    def is_due(self, made: int, shown: int, seconds: float) -> bool:
        """Whether the next chunk has to be begun now. made: frames so far; shown: of them, `seconds` ago."""
        ahead = made - min(made, shown + seconds * self.rate)
        return ahead <= (self._until_shown + self._margin) * self.rate

    def took(self, seconds: float, until_shown: float, stalls: int = 0) -> None:
        """A chunk of `frames` frames took so many seconds, and until its frames were there. stalls: how often the
        browser has waited for frames so far."""
        self._recent.append((seconds, until_shown))
        self._seen += 1
        self._seconds[self.frames] = sum(whole for whole, _ in self._recent) / len(self._recent)
        self._until_shown = max(until for _, until in self._recent)
        if stalls > self._stalls:
            self._margin = min(MOST_MARGIN, self._margin + MARGIN)
        self._stalls = stalls
        if self._seen >= PATIENCE:
            self._choose()

    def _choose(self) -> None:
        """A longer chunk where this one is too slow, as its fixed cost is shared by more frames; a shorter one where
        that was no help, or is not needed any more."""
        needed = self._fps / HEADROOM
        speeds = {length: length / seconds for length, seconds in self._seconds.items()}
        shorter, longer = (
            self._lengths[at] if 0 <= at < len(self._lengths) else None for at in (self._at - 1, self._at + 1)
        )
        if self.speed >= needed:
            if shorter and self.speed > SPARE * needed and self._seen >= TRUST:
                self._move(-1)
        elif shorter and GAIN * speeds[shorter] > self.speed:
            self._move(-1)
        elif longer and speeds.get(longer, needed) > GAIN * self.speed:
            self._move(1)

    def _move(self, steps: int) -> None:
        self._until_shown *= self._lengths[self._at + steps] / self.frames
        self._at += steps
        self._seen = 0
        self._recent.clear()
