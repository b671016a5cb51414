"""Plays a walk evenly while it is computed: how long the next chunk is, when it begins, how fast it is shown."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

RECENT = 5  # chunks that are looked back on: some take longer than others, as the memory is made anew
HEADROOM = 0.95  # of what the machine makes, that has to be enough for the film's own speed
MARGIN, MOST_MARGIN = 0.06, 0.4  # seconds that a chunk shall be there before it is needed
GAIN = 1.1  # how much more a longer chunk must bring, where even that does not reach the film's own speed
HOPE = 1.4  # how much more it is taken to bring at most, before it has been tried
MAX_DELAY = 1.3  # seconds from a key to its picture at a median: no longer chunk is worth more
FIRST = 2  # times as long as until it is shown, the first chunk of all is taken to keep the next one waiting at most
PATIENCE = 4  # chunks of a length before it is judged
SPARE, TRUST = 1.2, 20  # so much faster than needed for so many chunks, a machine may manage shorter ones again
FORGET = 200  # chunks of a length, after which what others took does not count any more


class Pace:
    """lengths: frames per chunk to choose from, shortest first. fps: the film's frames a second.

    A chunk is as short as the machine allows, since what is steered waits for the chunk after; and it is begun as late
    as it can be. Where the machine is slower than the film, it never rests, and the browser shows the frames that are
    there as slowly as it takes to have the next ones.
    """

    def __init__(self, lengths: Sequence[int], fps: float):
        self._lengths = sorted(lengths)
        self._fps = fps
        self._at = 0
        self._took: dict[int, tuple[float, float]] = {}  # by length: a chunk's seconds, and those until it is shown
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)  # the same of the last chunks
        self._seen = 0  # chunks of this length
        self._stalls = 0
        self._margin = MARGIN

    @property
    def frames(self) -> int:
        """Of the next chunk."""
        return self._lengths[self._at]

    def is_due(self, made: int, shown: int, seconds: float) -> bool:
        """Whether the next chunk has to be begun now. made: frames so far; shown: of them, `seconds` ago."""
        until_shown = max((until for _, until in self._recent), default=0.0)
        ahead = made - min(made, shown + seconds * self._fps)
        return ahead <= (until_shown + self._margin) * self._fps

    def until_next(self, until_shown: float) -> float:
        """Seconds that the frames of a chunk, which took so long until they were there, and those before them have to
        last."""
        whole = max((whole for whole, _ in self._recent), default=FIRST * until_shown)
        return max(whole, until_shown) + self._margin

    def took(self, seconds: float, until_shown: float, stalls: int = 0) -> None:
        """A chunk of `frames` frames took so many seconds until the next could begin, and until its frames were there.
        stalls: how often the browser has waited for frames so far."""
        self._recent.append((seconds, until_shown))
        self._seen += 1
        means = [sum(times) / len(self._recent) for times in zip(*self._recent, strict=True)]
        self._took[self.frames] = means[0], means[1]
        more = MARGIN if stalls > self._stalls else -MARGIN / 10
        self._margin = min(MOST_MARGIN, max(MARGIN, self._margin + more))
        self._stalls = stalls
        if self._seen >= PATIENCE:
            self._choose()

    def _choose(self) -> None:
        """A longer chunk where this one is too slow, as its fixed cost is shared by more frames; a shorter one where
        that was no help, takes too long, or is not needed any more."""
        if self._seen >= FORGET:
            self._took = {self.frames: self._took[self.frames]}
            self._seen = TRUST
        speeds = {length: length / seconds for length, (seconds, _) in self._took.items()}
        speed, needed = speeds[self.frames], self._fps / HEADROOM
        shorter, longer = (
            self._lengths[at] if 0 <= at < len(self._lengths) else None for at in (self._at - 1, self._at + 1)
        )
        if speed >= needed:
            if shorter and speed > SPARE * needed and self._seen >= TRUST:
                self._move(-1)
        elif shorter and (GAIN * speeds.get(shorter, 0.0) > speed or self._delay() > MAX_DELAY):
            self._move(-1)
        # Before it has been tried, half of a chunk's time is taken to be the same for all lengths.
        elif (
            longer
            and speeds.get(longer, needed) > GAIN * speed
            and HOPE * speed > needed
            and self._delay() * (1 + longer / self.frames) / 2 <= MAX_DELAY
        ):
            self._move(1)

    def _delay(self) -> float:
        """Seconds from a key to its picture: half a chunk's until the next one begins, and until that is shown."""
        seconds, until_shown = self._took[self.frames]
        return seconds / 2 + until_shown

    def _move(self, steps: int) -> None:
        grown = self._lengths[self._at + steps] / self.frames
        last = self._recent[-1]
        self._recent.clear()
        self._recent.append((last[0] * grown, last[1] * grown))
        self._at += steps
        self._seen = 0
