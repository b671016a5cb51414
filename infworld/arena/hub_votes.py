"""Votes in a dataset of the Hub, for a Space without storage: taken from it at the start, committed as they come.

A server's own file of votes stays the one that is written first; the dataset has them in `votes.csv`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitInfo, CommitScheduler, HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError

from infworld.arena.votes import Votes, default_path
from infworld.transfer import NETWORK_ERRORS, HubError, explain

log = logging.getLogger(__name__)

DATASET = "hf://datasets/"  # what the name of a dataset begins with
FILE = "votes.csv"
MINUTES = 2.0  # between two commits: what is lost at most if the machine is taken away


def place(films: Path, where: str | Path | None) -> str:
    """Where the votes on a folder of films are: a file, or "hf://datasets/USER/NAME". None: INFWORLD_VOTES, else
    `default_path`."""
    return str(where or os.environ.get("INFWORLD_VOTES") or default_path(films))


@contextmanager
def open_votes(films: Path, where: str | Path | None = None) -> Iterator[Votes]:
    """The votes on a folder of films, closed in the end. where: as for `place`; a dataset that is not there is made, a
    private one. Raises HubError for a dataset out of reach."""
    where = place(films, where)
    votes = Votes(default_path(films) if where.startswith(DATASET) else where)
    try:
        if where.startswith(DATASET):
            with _kept_on_hub(votes, where.removeprefix(DATASET)):
                yield votes
        else:
            yield votes
    finally:
        votes.close()


@contextmanager
def _kept_on_hub(votes: Votes, dataset: str) -> Iterator[None]:
    try:
        commits = _Commits(votes, dataset)
    except NETWORK_ERRORS as error:
        raise HubError(f"{explain(error, f'datasets/{dataset}')} (it needs a token that may write)") from error
    try:
        yield
    finally:
        try:
            commits.trigger().result()
        except NETWORK_ERRORS as error:
            log.error("the newest votes are in %s alone: %s", votes.path, explain(error, f"datasets/{dataset}"))
        commits.stop()


class _Commits(CommitScheduler):
    """Commits the votes when there are new ones. Votes that another server has added meanwhile are kept."""

    def __init__(self, votes: Votes, dataset: str):
        self._votes, self._dataset, self._committed = votes, dataset, ""
        api = HfApi()
        api.create_repo(dataset, repo_type="dataset", private=True, exist_ok=True)
        self._take(api)
        folder = votes.path.parent  # which the scheduler asks for, though only one text is committed
        super().__init__(repo_id=dataset, repo_type="dataset", folder_path=folder, every=MINUTES, hf_api=api)

    def push_to_hub(self) -> CommitInfo | None:
        if self._votes.as_csv() == self._committed:
            return None
        self._take(self.api)
        text = self._votes.as_csv()
        if text == self._committed:
            return None
        done = self.api.upload_file(
            path_or_fileobj=text.encode(),
            path_in_repo=FILE,
            repo_id=self._dataset,
            repo_type="dataset",
            commit_message=f"{text.count(chr(10)) - 1} votes",
        )
        self._committed = text
        return done

    def _take(self, api: HfApi) -> None:
        """Adds the dataset's votes to the file's."""
        try:
            path = api.hf_hub_download(self._dataset, FILE, repo_type="dataset")
        except RemoteEntryNotFoundError:  # a new dataset
            return
        self._committed = Path(path).read_text(encoding="utf-8")
        self._votes.add_csv(self._committed)
