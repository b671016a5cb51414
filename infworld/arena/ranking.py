"""From votes to a table: Bradley-Terry ratings with bootstrap intervals, and Elo beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import choix
import numpy as np

from infworld.arena.votes import FIRST, SAME, Vote

BASE = 1500.0  # the mean of all ratings
SCALE = 400 / math.log(10)  # ten to one odds are 400 points apart
ELO_STEP = 32.0
PRIOR = 0.1  # votes either way between every two, so that an unbeaten contestant has a finite rating
RESAMPLES = 200


@dataclass(frozen=True)
class Standing:
    """A contestant's line in the table. rating: Bradley-Terry on Elo's scale, with its 95 % bootstrap interval."""

    name: str
    rating: float
    low: float
    high: float
    elo: float
    wins: int
    draws: int
    losses: int


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Ratings (N,) with the mean `BASE` from how often each beat each (N, N), a draw being half a win for both.

    The maximum of the Bradley-Terry likelihood by iterative Luce spectral ranking (choix; Maystre and Grossglauser
    2015), after `PRIOR` wins more for everybody against everybody.
    """
    count = len(wins)
    if count < 2:
        return np.full(count, BASE)
    strengths = choix.ilsr_pairwise_dense(wins + PRIOR * (1 - np.eye(count)))
    return BASE + SCALE * (strengths - strengths.mean())


def elo(names: Sequence[str], votes: Sequence[Vote]) -> dict[str, float]:
    """Elo ratings after the votes in their order: each begins at `BASE`, steps of `ELO_STEP`, a draw is half a win."""
    ratings = dict.fromkeys(names, BASE)
    for vote in votes:
        difference = ratings[vote.second] - ratings[vote.first]
        expected = 1 / (1 + 10 ** (difference / 400))
        change = ELO_STEP * (_score(vote) - expected)
        ratings[vote.first] += change
        ratings[vote.second] -= change
    return ratings


def standings(votes: Sequence[Vote]) -> list[Standing]:
    """The table of the contestants that were voted on, the best first. votes: on one question, in order."""
    names = sorted({name for vote in votes for name in (vote.first, vote.second)})
    if not names:
        return []
    wins = _wins(names, votes)
    ratings = bradley_terry(wins)
    random = np.random.default_rng(0)
    again = [bradley_terry(_wins(names, [votes[i] for i in random.integers(len(votes), size=len(votes))]))
             for _ in range(RESAMPLES)]  # fmt: skip
    low, high = np.quantile(again, [0.025, 0.975], axis=0)
    elos = elo(names, votes)
    lines = [
        Standing(name, float(ratings[i]), float(low[i]), float(high[i]), elos[name], *_tally(name, votes))
        for i, name in enumerate(names)
    ]
    return sorted(lines, key=lambda line: -line.rating)


def _score(vote: Vote) -> float:
    """Of the first contestant: 1 for a win, 0.5 for a draw."""
    return {FIRST: 1.0, SAME: 0.5}.get(vote.better, 0.0)


def _wins(names: Sequence[str], votes: Sequence[Vote]) -> np.ndarray:
    index = {name: i for i, name in enumerate(names)}
    wins = np.zeros((len(names), len(names)))
    for vote in votes:
        wins[index[vote.first], index[vote.second]] += _score(vote)
        wins[index[vote.second], index[vote.first]] += 1 - _score(vote)
    return wins


def _tally(name: str, votes: Sequence[Vote]) -> tuple[int, int, int]:
    """Wins, draws and losses."""
    scores = [_score(v) if name == v.first else 1 - _score(v) for v in votes if name in (v.first, v.second)]
    return scores.count(1.0), scores.count(0.5), scores.count(0.0)
