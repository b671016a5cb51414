"""Keeps a film while it is made, so that nothing finished is lost, however its making ends."""

from __future__ import annotations

import logging
import secrets
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

import infworld
from infworld.video import JoinedMp4Writer

log = logging.getLogger(__name__)


class FilmWriter:
    """Writes each chunk's session, then its frames, in a thread of its own, which the next chunk does not wait for.

    What goes wrong there is raised by the next `write`, or by `finish`; then `rescue` keeps what can be kept.
    next_command: the command that goes on from a session file when the mp4 has so many frames. must_save: a session
    that cannot be saved is an error; else the film goes on without one, and `rescue` tries again.
    """

    def __init__(
        self,
        film: JoinedMp4Writer,
        session_path: Path,
        next_command: Callable[[Path, int], str],
        must_save: bool = True,
    ):
        self._film = film
        self._session_path = session_path
        self._next_command = next_command
        self._must_save = must_save
        self._session: infworld.Session | None = None  # the newest
        self._saved: tuple[Path, int] | None = None  # the newest session file and its number of frames
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future | None = None
        self._ending = threading.Lock()

    def write(self, chunk: infworld.Chunk, *, new: bool = True) -> None:
        """Takes a finished chunk; one that is not `new` was in the film's session already."""
        if new:
            self._session = chunk.session
        before, self._writing = self._writing, self._thread.submit(self._write, chunk, new)
        if before is not None:
            before.result()

    def finish(self) -> None:
        """Waits for all to be written and puts the film in its place."""
        if self._writing is not None:
            self._writing.result()
        with self._ending:
            self._thread.shutdown()
            self._film.close()

    def rescue(self) -> list[str]:
        """Ends the film as it is, from any thread and without failing; says what there is and how to go on."""
        with self._ending:
            self._thread.shutdown()
            there = []
            try:  # first, as a film that cannot be ended makes room for the session
                if self._session is None:  # of what was shown again, all is in the session that there was before
                    self._film.discard()
                self._film.close()
            except (OSError, ValueError) as error:
                there.append(f"the film could not be written: {error}")
            if self._film.frames:
                there.append(f"stopped: {describe(self._film)}")
            return [*there, *self._rescue_session()]

    def _write(self, chunk: infworld.Chunk, new: bool) -> None:
        try:
            if new:
                self._save(chunk.session, self._session_path)
        except ValueError as error:
            if self._must_save:
                raise
            log.warning("should the program be killed, the last chunk is lost: %s", error)
        finally:
            self._film.write(chunk.frames)

    def _save(self, session: infworld.Session, path: Path) -> None:
        session.save(path)
        self._saved = path, session.num_frames

    def _rescue_session(self) -> list[str]:
        if self._session is None:
            return ["no new chunk was finished"]
        problems = []
        for path in (self._session_path, _elsewhere(self._session_path)):
            if self._saved is None or self._saved[1] < self._session.num_frames:
                try:
                    self._save(self._session, path)
                except Exception as error:  # whatever it is, there is another place, and more to say
                    problems.append(f"the session could not be saved: {error}")
        if self._saved is None:
            return problems
        path, frames = self._saved
        return [
            *problems,
            f"{path} goes on from frame {frames}",
            f"go on with: {self._next_command(path, self._film.frames)}",
        ]


def _elsewhere(path: Path) -> Path:
    """Where a session is kept if its own disk is full."""
    return Path(tempfile.gettempdir()) / f"infworld-{secrets.token_hex(8)}{path.suffix}"


def describe(film: JoinedMp4Writer) -> str:
    return f"{film.path} has {film.frames} frames ({film.frames / film.fps:.1f} s)"


class Bar:
    """A progress bar over all sampler steps, with chunk, step and the time left."""

    def __init__(self, steps: int, chunks: int):
        self.chunks = chunks
        self._bar = tqdm(total=steps * chunks, bar_format="{desc} |{bar}| {n_fmt}/{total_fmt} {elapsed}{postfix}")

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()

    def show(self, progress: infworld.Progress) -> None:
        """A rollout's callback."""
        self._bar.set_description_str(f"chunk {progress.chunk}/{progress.chunks} step {progress.step}/{progress.steps}")
        if progress.remaining is not None:
            self._bar.set_postfix_str(f"{tqdm.format_interval(progress.remaining)} left", refresh=False)
        self._bar.update((progress.chunk - 1) * progress.steps + progress.step - self._bar.n)
