"""Films in the making, one folder each: all that the page keeps of a film between two calls.

A folder's name cannot be guessed, so that knowing it is the right to see the film. It holds the film's pieces (one
mp4 per chunk), the session to go on from, the one before the last chunk, and what can be downloaded.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from infworld.app.folders import make_private, was_running
from infworld.files import writer_of
from infworld.session import Session
from infworld.video import concat_mp4, read_mp4, write_mp4
from infworld.world import Chunk

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
    def has_begun(self) -> bool:
        return self.session_path.is_file()

    @property
    def can_redo(self) -> bool:
        return self._previous.is_file()

    def session(self) -> Session:
        """The session to go on from. ValueError when there is none, as the film has expired."""
        if not self.has_begun:
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
    def _next(self) -> Path:
        return self.folder / "next.safetensors"

    @property
    def _pieces(self) -> Path:
        return self.folder / "pieces"

    def picture(self) -> np.ndarray | None:
        """The picture that the film was begun with, uint8 H W 3; None for a film that was resumed from a file."""
        if not self._picture.is_file():
            return None
        with Image.open(self._picture) as picture:
            return np.array(picture.convert("RGB"))

    @property
    def _picture(self) -> Path:
        return self.folder / "picture.png"

    def begin(self, session: Session, picture: np.ndarray | None = None) -> None:
        """Makes the folder, and keeps the session of a film that has no chunk here yet, and its picture."""
        make_private(self.folder.parent)  # it may have been cleaned away
        make_private(self.folder)
        if picture is not None:
            Image.fromarray(picture).save(self._picture)
        self._keep(session, self.session_path)

    def add(self, chunk: Chunk) -> None:
        """Keeps a finished chunk: frames and session. It follows the last piece, or takes its place (made again)."""
        self._keep(chunk.session, self._next)
        replaced = [piece for piece in self.pieces() if piece.index >= chunk.index]
        self.add_frames(chunk)
        for piece in replaced:
            piece.path.unlink()
        self._go_on_from_next(made_again=bool(replaced))

    def recover(self) -> None:
        """Takes up a chunk that was computed when the server was killed; its frames are not there, or not all."""
        if not self._next.is_file():
            return
        index = len(Session.load(self._next).chunk_latents) - 1
        for piece in self.pieces():
            if piece.index >= index:
                piece.path.unlink()
        self._go_on_from_next(made_again=index < len(self.session().chunk_latents))

    def _go_on_from_next(self, made_again: bool) -> None:
        """At no moment is there no session."""
        if not made_again and self.has_begun:
            self._previous.unlink(missing_ok=True)
            try:
                os.link(self.session_path, self._previous)
            except OSError:  # the file system has no links
                shutil.copyfile(self.session_path, self._previous)
        os.replace(self._next, self.session_path)

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
        self.root = Path(root).parent.resolve() / Path(root).name
        self.lifetime = lifetime
        self.fps = fps
        make_private(self.root)

    def new(self) -> Film:
        """A film that has not begun: nothing is on the disk yet."""
        return Film(self.root / f"{_PREFIX}{secrets.token_urlsafe(18)}", self.fps)

    def find(self, name: object) -> Film | None:
        """The film of this folder's name, which comes from a browser; None for what cannot be one."""
        if not isinstance(name, str) or not re.fullmatch(_PREFIX + r"[\w-]{24}", name, re.ASCII):
            return None
        return Film(self.root / name, self.fps)

    def sweep(self, in_use: Set[Film] = frozenset()) -> int:
        """Removes the expired films that are not in use, and what a killed server has left in the others; returns how
        many films."""
        oldest, removed = time.time() - self.lifetime, 0
        films = {Film(folder, self.fps) for folder in self.root.glob(f"{_PREFIX}*")}
        for film in films - in_use:
            if _last_change(film.folder) < oldest:
                film.remove()
                removed += 1
            else:
                for part in film.folder.rglob(".*.part*"):
                    if not _in_use(part):
                        part.unlink(missing_ok=True)
        return removed


def _in_use(part: Path) -> bool:
    """Whether the process that writes this temporary file still runs."""
    pid = writer_of(part)
    try:
        return pid is None or was_running(pid, part.stat().st_mtime)
    except FileNotFoundError:  # it is written
        return True


def _last_change(folder: Path) -> float:
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.glob("*")))
    except FileNotFoundError:  # written to at this very moment
        return time.time()
