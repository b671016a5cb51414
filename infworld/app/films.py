"""Films in the making, one folder each: all that the page keeps of a film between two calls.

A folder's name cannot be guessed, so that knowing it is the right to see the film. It holds the film's pieces (one
mp4 per chunk), the session to go on from, the one before the last chunk, and what can be downloaded.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from infworld.session import Session
from infworld.video import concat_mp4, read_mp4, write_mp4
from infworld.world import Chunk

log = logging.getLogger(__name__)

_PREFIX = "film-"


@dataclass(frozen=True)
class Piece:
    """One chunk's new frames as an mp4 file. A chunk that is made again gets another file name."""

    path: Path
    index: int
    frames: int

    @staticmethod
    def of(path: Path) -> Piece:
        index, frames, _ = path.stem.split("-")
        return Piece(path, int(index), int(frames))


@dataclass(frozen=True)
class Film:
    """A film by the folder it lives in, which is made when the film begins: small enough to be a browser session's
    state. fps: frames a second."""

    folder: Path
    fps: int

    def pieces(self) -> list[Piece]:
        """The film's pieces in order."""
        return sorted((Piece.of(path) for path in self._pieces.glob("[0-9]*.mp4")), key=lambda piece: piece.index)

    @property
    def num_frames(self) -> int:
        """Frames made so far, the picture included; 0 before the first chunk."""
        return sum(piece.frames for piece in self.pieces())

    @property
    def can_redo(self) -> bool:
        return self._previous.is_file()

    def session(self) -> Session:
        """The session to go on from. ValueError when there is none, as the film has expired."""
        if not self.session_path.is_file():
            raise ValueError("this film has expired; if you have downloaded its session, resume from that file")
        return Session.load(self.session_path)

    def previous(self) -> Session:
        """The session before the last chunk, to make that chunk again. ValueError where there is none."""
        if not self.can_redo:
            raise ValueError("there is no last chunk to make again: make one first")
        return Session.load(self._previous)

    @property
    def session_path(self) -> Path:
        return self.folder / "session.safetensors"

    @property
    def _previous(self) -> Path:
        return self.folder / "previous.safetensors"

    @property
    def _pieces(self) -> Path:
        return self.folder / "pieces"

    def begin(self, session: Session) -> None:
        """Makes the folder, and keeps the session of a film that has no chunk here yet."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._keep(session, self.session_path)

    def add(self, chunk: Chunk) -> None:
        """Keeps a finished chunk: frames and session. It follows the last piece, or takes its place (made again)."""
        after = self.folder / "next.safetensors"
        self._keep(chunk.session, after)
        replaced = [piece for piece in self.pieces() if piece.index >= chunk.index]
        self.add_frames(chunk)
        for piece in replaced:
            piece.path.unlink()
        if not replaced and self.session_path.exists():
            os.replace(self.session_path, self._previous)
        os.replace(after, self.session_path)

    def add_frames(self, chunk: Chunk) -> None:
        """Keeps the frames alone, of a chunk whose session is here already (`World.replay`)."""
        self._pieces.mkdir(exist_ok=True)
        name = f"{chunk.index:03d}-{len(chunk.frames)}-{secrets.token_hex(4)}.mp4"
        write_mp4(self._pieces / name, chunk.frames, self.fps, fragmented=True)

    def finish(self) -> dict[str, Path]:
        """What can be downloaded: "film" (the pieces joined to one mp4), "actions" (JSON) and "session"."""
        pieces = self.pieces()
        joined = self.folder / f"film-{pieces[-1].path.stem}.mp4"
        if not joined.exists():
            for old in self.folder.glob("film-*.mp4"):
                old.unlink()
            concat_mp4([piece.path for piece in pieces], joined)
        return {"film": joined, "actions": self._actions, "session": self.session_path}

    @property
    def _actions(self) -> Path:
        return self.folder / "actions.json"

    def _keep(self, session: Session, path: Path) -> None:
        session.save(path)
        self._actions.write_text(session.settings.actions.to_json(), encoding="utf-8")

    def frames(self, indices: list[int]) -> dict[int, np.ndarray]:
        """Single frames of the film by index: uint8 H W 3 each."""
        chosen, start = {}, 0
        for piece in self.pieces():
            wanted = [index for index in indices if start <= index < start + piece.frames]
            if wanted:
                decoded = read_mp4(piece.path)
                chosen |= {index: decoded[index - start] for index in wanted}
            start += piece.frames
        return chosen

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class FilmStore:
    """The folder of all films, `fps` frames a second. Each expires when nothing has been done with it for `lifetime`
    seconds."""

    def __init__(self, root: str | os.PathLike, lifetime: float, fps: int):
        self.root = Path(root).resolve()
        self.lifetime = lifetime
        self.fps = fps
        self.root.mkdir(parents=True, exist_ok=True)

    def new(self) -> Film:
        """A film that has not begun: nothing is on the disk yet."""
        return Film(self.root / f"{_PREFIX}{secrets.token_urlsafe(18)}", self.fps)

    def sweep(self) -> int:
        """Removes the expired films; returns how many."""
        oldest = time.time() - self.lifetime
        old = [Film(folder, self.fps) for folder in self.root.glob(f"{_PREFIX}*") if _last_change(folder) < oldest]
        for film in old:
            film.remove()
        return len(old)

    def keep_sweeping(self) -> None:
        """Sweeps from now on in the background, until the program ends."""

        def sweeper() -> None:
            while True:
                time.sleep(max(1.0, self.lifetime / 10))
                if removed := self.sweep():
                    log.info("removed %d old films", removed)

        threading.Thread(target=sweeper, name="film sweeper", daemon=True).start()


def _last_change(folder: Path) -> float:
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.glob("*")))
    except FileNotFoundError:  # written to at this very moment
        return time.time()
