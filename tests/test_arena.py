"""The arena without a page: which films meet, what is kept of a vote, what the ratings are."""

import csv
import io
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from infworld.arena.hall import Hall
from infworld.arena.matches import Matches, Pair
from infworld.arena.ranking import BASE, PRIOR, bradley_terry, elo, standings
from infworld.arena.votes import QUESTIONS, Vote, Votes
from infworld.video import write_mp4

VOTERS = ("voter-number-1", "voter-number-2")


def make_films(folder, contestants=("alpha", "beta", "gamma"), cases=("hall", "yard"), **index):
    """Films of 3 frames in a shade of its own for every contestant."""
    for number, contestant in enumerate(contestants):
        (folder / contestant).mkdir(parents=True)
        for case in cases:
            frames = np.full((9, 32, 48, 3), 40 * (number + 1), np.uint8)
            write_mp4(folder / contestant / f"{case}.mp4", frames)
        if index:
            entries = [{"case": case, "film": f"{case}.mp4", **index} for case in cases]
            (folder / contestant / "films.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_films(tmp_path / "films", actions="right 4, left 4", fps=30, frames=9, revisit=[1, 7])


@pytest.fixture
def votes(tmp_path):
    votes = Votes(tmp_path / "votes.sqlite")
    yield votes
    votes.close()


@pytest.fixture
def hall(folder, votes, tmp_path):
    return Hall(Matches.read(folder), votes, tmp_path / "stage", seed=0)


def vote_of(first: str, second: str, better: str, time: float = 0, voter: str = "v" * 8, case: str = "c") -> Vote:
    return Vote(time, voter, case, first, second, "overall", better, True)


# --- matches


def test_every_two_contestants_meet_once_on_every_case(folder):
    pairs = Matches.read(folder).pairs()
    assert len(set(pairs)) == 2 * 3
    assert Pair("hall", "alpha", "gamma") in pairs


def test_films_that_are_missing_or_of_other_actions_are_skipped(folder):
    matches = Matches.read(folder)
    (folder / "beta" / "hall.mp4").unlink()
    assert {pair for pair in matches.pairs() if pair.case == "hall"} == {Pair("hall", "alpha", "gamma")}
    entries = json.loads((folder / "gamma" / "films.json").read_text())
    entries[0]["actions"] = "wait 8"
    (folder / "gamma" / "films.json").write_text(json.dumps(entries))
    assert not [pair for pair in Matches.read(folder).pairs() if pair.case == "hall"]


def test_films_without_an_index_are_known_by_their_names(tmp_path):
    assert len(Matches.read(make_films(tmp_path / "films")).pairs()) == 6


def test_nothing_to_compare_is_an_error(tmp_path):
    make_films(tmp_path / "films", contestants=("alone",))
    with pytest.raises(ValueError, match="nothing to compare"):
        Matches.read(tmp_path / "films")
    with pytest.raises(FileNotFoundError):
        Matches.read(tmp_path / "none")


# --- the hall


def test_a_showing_tells_nothing_of_whose_films_they_are(hall, folder):
    for _ in range(6):
        shown = json.dumps(hall.next(VOTERS[0]))
        for word in ("alpha", "beta", "gamma", "hall", "yard", str(folder)):
            assert word not in shown


def test_order_and_sides_are_random_and_remembered(folder, tmp_path):
    firsts, sides = set(), set()
    for seed in range(12):
        votes = Votes(tmp_path / f"{seed}.sqlite")
        hall = Hall(Matches.read(folder), votes, tmp_path / "stage", seed)
        token = hall.next(VOTERS[0])["pair"]
        hall.vote(VOTERS[0], token, "memory", "left")
        (vote,) = votes.all()
        firsts.add(vote.pair)
        sides.add(vote.first_was_left)
        assert vote.better == ("first" if vote.first_was_left else "second")
        votes.close()
    assert len(firsts) >= 3 and sides == {True, False}


def test_the_left_film_is_the_one_that_a_vote_for_left_is_for(hall, folder):
    showing = hall.next(VOTERS[0])
    hall.vote(VOTERS[0], showing["pair"], "overall", "left")
    (vote,) = hall.votes.all()
    winner = getattr(vote, vote.better)
    assert Path(showing["left"]).read_bytes() == (folder / winner / f"{vote.case}.mp4").read_bytes()


def test_a_voter_votes_once_on_a_pair_and_comes_to_an_end(hall):
    seen = []
    while showing := hall.next(VOTERS[0]):
        assert showing["questions"] == list(QUESTIONS)
        for question in QUESTIONS:
            assert hall.vote(VOTERS[0], showing["pair"], question, "same")
            assert not hall.vote(VOTERS[0], showing["pair"], question, "left")
        seen.append(showing["done"])
    assert seen == list(range(6))
    assert len(hall.votes.all()) == 6 * len(QUESTIONS)
    assert {vote.better for vote in hall.votes.all()} == {"same"}
    assert hall.next(VOTERS[1])["done"] == 0  # another voter has all pairs before them


def test_a_pair_that_was_begun_is_gone_on_with(hall, folder, tmp_path):
    token = hall.next(VOTERS[0])["pair"]
    hall.vote(VOTERS[0], token, "memory", "left")
    (first,) = hall.votes.all()
    again = Hall(Matches.read(folder), hall.votes, tmp_path / "other-stage")  # as after a restart
    showing = again.next(VOTERS[0])
    assert showing["questions"] == ["fidelity", "action", "overall"]
    again.vote(VOTERS[0], showing["pair"], "overall", "right")
    assert {vote.pair for vote in hall.votes.all()} == {first.pair}
    with pytest.raises(ValueError, match="expired"):
        again.vote(VOTERS[0], token, "fidelity", "left")  # of the hall that has ended


def test_a_pair_is_voted_on_by_whom_it_was_shown_to_alone(hall):
    token = hall.next(VOTERS[0])["pair"]
    with pytest.raises(ValueError, match="expired"):
        hall.vote(VOTERS[1], token, "memory", "left")
    for voter, question, choice in (
        (VOTERS[0], "beauty", "left"),
        (VOTERS[0], "memory", "both"),
        ("x", "memory", "left"),
    ):
        with pytest.raises(ValueError):
            hall.vote(voter, token, question, choice)
    assert hall.votes.all() == []


def test_a_film_that_goes_missing_meanwhile_is_passed_over(hall, folder):
    for case in ("hall", "yard"):
        (folder / "alpha" / f"{case}.mp4").unlink()
    showing = hall.next(VOTERS[0])
    assert showing["pairs"] == 2


# --- votes


def test_votes_go_out_as_csv_and_json(votes):
    votes.add(VOTERS[0], Pair("hall", "a", "b"), "memory", "first", False)
    (row,) = csv.DictReader(io.StringIO(votes.as_csv()))
    (entry,) = json.loads(votes.as_json())
    assert row["voter"] == entry["voter"] == VOTERS[0]
    assert (entry["better"], entry["first_was_left"], row["case"]) == ("first", False, "hall")


def test_two_writers_at_once_lose_nothing(tmp_path):
    path = tmp_path / "votes.sqlite"

    def cast(voter):
        own = Votes(path)
        for number in range(25):
            assert own.add(voter, Pair(f"case {number}", "a", "b"), "overall", "first", True)
        own.close()

    threads = [threading.Thread(target=cast, args=(voter,)) for voter in VOTERS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Votes(path).all()) == 50


def test_kill_9_while_voting_loses_no_confirmed_vote(tmp_path):
    path = tmp_path / "votes.sqlite"
    program = f"""
from infworld.arena.matches import Pair
from infworld.arena.votes import Votes
votes = Votes({str(path)!r})
for number in range(100000):
    votes.add("a-busy-voter", Pair(f"case {{number}}", "a", "b"), "overall", "first", True)
    print(number, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    for _ in range(40):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    confirmed = 40 + len(process.stdout.read().splitlines())
    process.wait()
    kept = {vote.case for vote in Votes(path).all()}
    assert {f"case {number}" for number in range(confirmed)} <= kept
    assert sqlite3.connect(path).execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_another_file_is_not_taken_for_votes(tmp_path):
    (tmp_path / "votes.sqlite").write_text("this is a text" * 100)
    with pytest.raises(ValueError, match="no file of votes"):
        Votes(tmp_path / "votes.sqlite")


# --- ratings


def test_elo_agrees_with_a_hand_computed_example():
    """Both at 1500: the winner gains 16. Then 1516 meets 1484 and loses: expected 0.5459, so it falls by 17.47."""
    votes = [vote_of("a", "b", "first"), vote_of("a", "b", "second")]
    ratings = elo(["a", "b"], votes)
    expected = 1 / (1 + 10 ** (-32 / 400))
    assert ratings["a"] == pytest.approx(1516 - 32 * expected)
    assert ratings["a"] == pytest.approx(1498.53, abs=0.01)
    assert ratings["a"] + ratings["b"] == pytest.approx(2 * BASE)
    assert elo(["a", "b"], [vote_of("a", "b", "same")]) == {"a": BASE, "b": BASE}


def test_bradley_terry_of_two_agrees_with_the_odds():
    """With two, the likelihood is greatest where the odds are those of the wins: 30 to 10 are 3 to 1, 190.8 points."""
    ratings = bradley_terry(np.array([[0, 30.0], [10.0, 0]]))
    odds = (30 + PRIOR) / (10 + PRIOR)
    assert ratings[0] - ratings[1] == pytest.approx(400 * math.log10(odds))
    assert ratings[0] - ratings[1] == pytest.approx(190.8, abs=2)
    assert ratings.mean() == pytest.approx(BASE)


def test_bradley_terry_of_a_chain_adds_up():
    """a beats b 2 to 1, b beats c 2 to 1, and a and c never met: a is 4 to 1 over c."""
    wins = 1000 * np.array([[0, 2.0, 0], [1, 0, 2], [0, 1, 0]])
    ratings = bradley_terry(wins)
    assert ratings[0] - ratings[2] == pytest.approx(400 * math.log10(4), abs=1)


def test_standings_are_ordered_and_their_intervals_hold_the_rating():
    votes = [vote_of("a", "b", "first")] * 12 + [vote_of("a", "b", "second")] * 4 + [vote_of("b", "c", "same")] * 6
    table = standings(votes)
    assert [line.name for line in table] == ["a", "b", "c"] or [line.name for line in table] == ["a", "c", "b"]
    best = table[0]
    assert (best.wins, best.draws, best.losses) == (12, 0, 4)
    assert all(line.low <= line.rating <= line.high for line in table)
    assert best.low > table[-1].rating
    assert math.isfinite(standings([vote_of("a", "b", "first")] * 5)[0].rating)  # unbeaten
    assert standings([]) == []
