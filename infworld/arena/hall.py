"""Who sees what next: pairs in random order and on random sides, with nothing that tells whose films they are."""

from __future__ import annotations

import os
import random
import re
import secrets
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from infworld.arena.matches import Matches, Pair, segments
from infworld.arena.votes import FIRST, QUESTIONS, SAME, SECOND, Votes

VOTER = re.compile(r"[\w\-.@]{8,64}")
CHOICES = ("left", "same", "right")
LIFETIME = 6 * 3600  # seconds that a pair which was shown can be voted on


@dataclass(frozen=True)
class Showing:
    """A pair as one voter sees it: copies of both films under names that say nothing."""

    pair: Pair
    voter: str
    first_is_left: bool
    left: Path
    right: Path
    began: float


class Hall:
    """Shows pairs and takes votes. stage: an empty folder that the page may serve files from, for the copies.

    Raises ValueError for what no page would send.
    """

    def __init__(self, matches: Matches, votes: Votes, stage: str | Path, seed: int | None = None):
        self.matches, self.votes = matches, votes
        self.stage = Path(stage).resolve()
        self.stage.mkdir(parents=True, exist_ok=True)
        self._random = random.Random(seed)
        self._showings: dict[str, Showing] = {}
        self._lock = threading.Lock()

    def next(self, voter: str) -> dict | None:
        """What the page shows a voter next, as plain values; None when there is nothing left for this voter."""
        _check_voter(voter)
        answered = self.votes.answered(voter)
        pairs = self.matches.pairs()
        left = [pair for pair in pairs if len(answered.get(pair, ())) < len(QUESTIONS)]
        begun = [pair for pair in left if pair in answered]
        self._random.shuffle(left)
        for pair in begun + left:
            try:
                token = self._show(pair, voter)
            except OSError:  # a film has gone since
                continue
            return self.view(token)
        return None

    def view(self, token: str) -> dict | None:
        """A pair that is being shown, as plain values with the questions that are left; None if there are none."""
        with self._lock:
            showing = self._showings[token]
        pair, answered = showing.pair, self.votes.answered(showing.voter)
        questions = [question for question in QUESTIONS if question not in answered.get(pair, ())]
        if not questions:
            return None
        pairs, entry = self.matches.pairs(), self.matches.entry(pair.case, pair.first)
        return {
            "pair": token,
            "left": str(showing.left),
            "right": str(showing.right),
            "questions": questions,
            "fps": entry.fps,
            "revisit": list(entry.revisit) if entry.revisit else None,
            "actions": segments(entry.actions),
            "done": sum(len(answered.get(other, ())) == len(QUESTIONS) for other in pairs),
            "pairs": len(pairs),
        }

    def vote(self, voter: str, token: str, question: str, choice: str) -> bool:
        """Takes an answer; it is on the disk when this returns. False if it had been answered already."""
        _check_voter(voter)
        if question not in QUESTIONS or choice not in CHOICES:
            raise ValueError(f"a vote is one of {', '.join(CHOICES)} on one of {', '.join(QUESTIONS)}")
        with self._lock:
            showing = self._showings.get(token)
        if showing is None or showing.voter != voter:
            raise ValueError("this pair has expired: go on with the next one")
        first = FIRST if showing.first_is_left else SECOND
        second = SECOND if showing.first_is_left else FIRST
        better = {"left": first, "same": SAME, "right": second}[choice]
        return self.votes.add(voter, showing.pair, question, better, showing.first_is_left)

    def _show(self, pair: Pair, voter: str) -> str:
        films = [self.matches.entry(pair.case, name).path for name in (pair.first, pair.second)]
        copies = [self._copy(film) for film in films]
        first_is_left = self._random.random() < 0.5
        left, right = copies if first_is_left else reversed(copies)
        token = secrets.token_urlsafe(12)
        showing = Showing(pair, voter, first_is_left, left, right, time.time())
        with self._lock:
            self._sweep(voter)
            self._showings[token] = showing
        return token

    def _copy(self, film: Path) -> Path:
        """The same file under a name that says nothing: a hard link where that can be, else a copy."""
        copy = self.stage / f"{secrets.token_urlsafe(12)}.mp4"
        try:
            os.link(film, copy)
        except OSError:
            shutil.copyfile(film, copy)
        return copy

    def _sweep(self, voter: str) -> None:
        """Takes away what this voter saw before the last pair, and what anybody saw long ago."""
        own = [token for token, showing in self._showings.items() if showing.voter == voter][:-1]
        old = [token for token, showing in self._showings.items() if time.time() - showing.began > LIFETIME]
        for token in {*own, *old}:
            showing = self._showings.pop(token)
            showing.left.unlink(missing_ok=True)
            showing.right.unlink(missing_ok=True)


def _check_voter(voter: object) -> None:
    if not isinstance(voter, str) or not VOTER.fullmatch(voter):
        raise ValueError("a voter has a name of 8 to 64 letters and digits")
