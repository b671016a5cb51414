"""Votes in an SQLite file: written before they are confirmed, one for each voter, pair and question."""

from __future__ import annotations

import csv
import io
import json
import os
import sqlite3
import threading
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from infworld.arena.matches import Pair

SPACE_STORAGE = Path("/data")  # where a Space's attached storage is
QUESTIONS = ("memory", "fidelity", "action", "overall")
PATIENCE = 30  # seconds to wait for another process that writes
FIRST, SAME, SECOND = "first", "same", "second"  # which of a pair is better

_TABLE = """
CREATE TABLE IF NOT EXISTS votes (
    time REAL NOT NULL, voter TEXT NOT NULL, "case" TEXT NOT NULL, first TEXT NOT NULL, second TEXT NOT NULL,
    question TEXT NOT NULL, better TEXT NOT NULL CHECK (better IN ('first', 'same', 'second')),
    first_was_left INTEGER NOT NULL,
    UNIQUE (voter, "case", first, second, question)
)
"""


@dataclass(frozen=True)
class Vote:
    """What a voter answered to one question on one pair. better: "first", "same" or "second" of the pair."""

    time: float
    voter: str
    case: str
    first: str
    second: str
    question: str
    better: str
    first_was_left: bool

    @property
    def pair(self) -> Pair:
        return Pair(self.case, self.first, self.second)


def default_path(films: Path) -> Path:
    """Where the votes on a folder of films are kept: beside them, on a Space with storage there."""
    kept = "SPACE_ID" in os.environ and os.access(SPACE_STORAGE, os.W_OK)
    return SPACE_STORAGE / "infworld-votes.sqlite" if kept else films / "votes.sqlite"


class Votes:
    """The votes of one file. Any number of threads and processes may write at once (write-ahead log).

    A vote is on the disk when `add` returns: nothing that ends the process afterwards loses it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            self._use_write_ahead_log()
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute(_TABLE)
        except sqlite3.OperationalError:  # locked, a full disk, no permission
            self._connection.close()
            raise
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise ValueError(f"{self.path} is no file of votes: {error}") from error

    def add(self, voter: str, pair: Pair, question: str, better: str, first_was_left: bool) -> bool:
        """Whether the vote was taken: False if this voter has answered this question on this pair already."""
        values = (time.time(), voter, pair.case, pair.first, pair.second, question, better, first_was_left)
        with self._lock:
            done = self._connection.execute(f"INSERT OR IGNORE INTO votes VALUES ({', '.join('?' * 8)})", values)
            return done.rowcount == 1

    def add_csv(self, text: str) -> None:
        """Adds the votes that `as_csv` gave of another file, but for those that are here already. ValueError for other
        text."""
        try:
            rows = [
                (
                    float(row["time"]),
                    *(row[field.name] for field in fields(Vote)[1:-1]),
                    row["first_was_left"] == "True",
                )
                for row in csv.DictReader(io.StringIO(text))
            ]
            with self._lock:
                self._connection.executemany(f"INSERT OR IGNORE INTO votes VALUES ({', '.join('?' * 8)})", rows)
        except (KeyError, TypeError, ValueError, sqlite3.IntegrityError) as error:
            raise ValueError(f"these are no votes: {error!r}") from error

    def answered(self, voter: str) -> dict[Pair, set[str]]:
        """The questions that a voter has answered, by pair."""
        found: dict[Pair, set[str]] = {}
        for vote in self._select("WHERE voter = ?", voter):
            found.setdefault(vote.pair, set()).add(vote.question)
        return found

    def all(self) -> list[Vote]:
        """Every vote, in the order in which they were cast."""
        return self._select("")

    def as_csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(field.name for field in fields(Vote))
        writer.writerows(asdict(vote).values() for vote in self.all())
        return text.getvalue()

    def as_json(self) -> str:
        return json.dumps([asdict(vote) for vote in self.all()], indent=1)

    def close(self) -> None:
        self._connection.close()

    def _use_write_ahead_log(self) -> None:
        """SQLite's own timeout does not cover this: of two that open a new file at once, one is refused at once."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _select(self, where: str, *values: str) -> list[Vote]:
        with self._lock:
            rows = self._connection.execute(f"SELECT * FROM votes {where} ORDER BY time, rowid", values).fetchall()
        return [Vote(*[*row[:-1], bool(row[-1])]) for row in rows]
