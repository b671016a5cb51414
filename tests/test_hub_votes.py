"""Votes in a dataset of the Hub: a local server that speaks its API, and huggingface_hub's own client."""

from __future__ import annotations

import csv
import io
import time

import pytest
from hub_server import TOKEN, HubServer, connect

from infworld.arena import hub_votes
from infworld.arena.hub_votes import open_votes
from infworld.arena.matches import Pair
from infworld.arena.votes import Votes
from infworld.cli import arena
from infworld.transfer import HubError

NAME = "somebody/votes"
WHERE = f"hf://datasets/{NAME}"


@pytest.fixture
def server(monkeypatch, tmp_path):
    with HubServer() as server:
        connect(server, monkeypatch, tmp_path)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def films(tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    return folder


def vote(votes: Votes, number: int, voter: str = "a-voter-of-ours") -> None:
    assert votes.add(voter, Pair(f'case {number}, a "hall"', "a", "b"), "overall", "first", bool(number % 2))


def committed(server: HubServer) -> list[dict]:
    return list(csv.DictReader(io.StringIO(server.repos[NAME].files["votes.csv"].decode())))


def until(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_votes_are_committed_and_taken_up_again_where_nothing_else_is_left(server, films, tmp_path):
    with open_votes(films, WHERE) as votes:
        for number in range(3):
            vote(votes, number)
        before = votes.all()
    assert server.repos[NAME].kind == "dataset" and "private" in str(server.repos[NAME].settings)
    assert [row["case"] for row in committed(server)] == [vote.case for vote in before]
    commits = list(server.repos[NAME].messages)
    assert commits[-1] == "3 votes"
    (films / "votes.sqlite").unlink()  # as when a Space has started again
    with open_votes(films, WHERE) as votes:
        assert votes.all() == before
        assert not votes.add("a-voter-of-ours", before[0].pair, "overall", "second", True)  # nobody votes twice
    assert server.repos[NAME].messages == commits  # nothing new, no commit


def test_new_votes_are_committed_while_the_page_runs(server, films, monkeypatch):
    monkeypatch.setattr(hub_votes, "MINUTES", 0.1 / 60)
    with open_votes(films, WHERE) as votes:
        for number in range(2):
            vote(votes, number)
            until(lambda number=number: NAME in server.repos and len(server.repos[NAME].files) > 1)
            until(lambda number=number: len(committed(server)) == number + 1)


def test_votes_that_another_server_has_committed_meanwhile_stay(server, films, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    with open_votes(films, WHERE) as votes:
        with open_votes(other, WHERE) as others:
            vote(others, 1, "another-voter")
        vote(votes, 2)
    assert [row["voter"] for row in committed(server)] == ["another-voter", "a-voter-of-ours"]


def test_a_hub_that_fails_meanwhile_loses_no_vote(server, films, caplog):
    with open_votes(films, WHERE) as votes:
        vote(votes, 1)
        server.status["/commit/"] = [(403, {})] * 20
        server.status["/preupload/"] = [(403, {})] * 20
    assert "the newest votes are in" in caplog.text and TOKEN not in caplog.text
    with open_votes(films, str(films / "votes.sqlite")) as votes:
        assert len(votes.all()) == 1


@pytest.mark.parametrize(
    ("status", "message"), [(401, "private, not there, or the token"), (403, "asks for permission")]
)
def test_a_dataset_out_of_reach_is_said_at_the_start(server, films, status, message):
    server.status["/api/repos/create"] = [(status, {})] * 20
    with pytest.raises(HubError, match=message), open_votes(films, WHERE):
        pass


def test_a_file_that_holds_no_votes_is_refused_and_stays(server, films):
    server.repo(NAME, {"votes.csv": b"name,age\nx,3\n"}, "dataset")
    with pytest.raises(ValueError, match="no votes"), open_votes(films, WHERE):
        pass
    assert len(server.repos[NAME].commits) == 1


def test_a_dataset_is_named_by_the_environment_and_exported(server, films, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("INFWORLD_VOTES", WHERE)
    with open_votes(films) as votes:
        votes.add("a-voter-of-ours", Pair("hall", "a", "b"), "overall", "first", True)
    (films / "votes.sqlite").unlink()
    assert arena.main([str(films), "--export", str(tmp_path / "votes.json")]) == 0
    assert "overall" in capsys.readouterr().out and '"case": "hall"' in (tmp_path / "votes.json").read_text()
    assert arena.main([str(films), "--votes", str(tmp_path / "gone.sqlite"), "--export", str(tmp_path / "v.csv")]) == 2
    assert "no votes at" in capsys.readouterr().err and not (tmp_path / "gone.sqlite").exists()
