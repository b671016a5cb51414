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
from infworld.config import FRAMES_PER_LATENT
from infworld.files import writer_of
from infworld.session import Session
from infworld.video import Mp4Writer, concat_mp4, cut_mp4, read_mp4
from infworld.world import Chunk

_PREFIX = "film-"
PIECE_SECONDS = 10  # that a piece of a played walk lasts
KEEP_SECONDS = 2  # between two times that a played walk's session is written


@dataclass(frozen=True)
class Piece:
    """The new frames of one or more chunks, the first of them `index`, as an mp4 file. What is made again gets another
    file name."""

    path: Path
    index: int
    chunks: int
    frames: int

    @staticmethod
    def of(path: Path) -> Piece:
        index, chunks, frames, _ = path.stem.split("-")
        return Piece(path, int(index), int(chunks), int(frames))

    @property
    def end(self) -> int:
        """The first chunk after it."""
        return self.index + self.chunks


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
    def num_chunks(self) -> int:
        """Chunks whose frames are here."""
        return max((piece.end for piece in self.pieces()), default=0)

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
    def steering_path(self) -> Path:
        """Where whoever plays the film steers it."""
        return self.folder / "steering.json"

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
        replaced = self._from(chunk.index)
        self._cut(replaced, chunk.session)
        self.add_frames(chunk)
        for piece in replaced:
            piece.path.unlink()
        self._go_on_from_next(made_again=bool(replaced))

    def recover(self) -> None:
        """Takes up a chunk that was computed when the server was killed; its frames are not there, or not all."""
        if not self._next.is_file():
            return
        session = Session.load(self._next)
        index = len(session.chunk_latents) - 1
        replaced = self._from(index)
        self._cut(replaced, session)
        for piece in replaced:
            piece.path.unlink()
        self._go_on_from_next(made_again=index < len(self.session().chunk_latents))

    def _from(self, index: int) -> list[Piece]:
        """The pieces that hold the chunk of this index, or chunks after it."""
        return [piece for piece in self.pieces() if piece.end > index]

    def _cut(self, pieces: list[Piece], session: Session) -> None:
        """Keeps what the first of these pieces holds before the last chunk of a session, as another piece."""
        index = len(session.chunk_latents) - 1
        if not pieces or pieces[0].index == index:
            return
        first = pieces[0]
        before = sum(piece.frames for piece in self.pieces() if piece.end <= first.index)
        frames = session.num_frames - FRAMES_PER_LATENT * (session.chunk_latents[-1].shape[2] - 1) - before
        cut_mp4(first.path, frames, self._piece(first.index, index - first.index, frames))

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
        with PieceWriter(self) as pieces:
            pieces.add(chunk)

    def _piece(self, index: int, chunks: int, frames: int) -> Path:
        """A new piece's path."""
        return self._pieces / f"{index:03d}-{chunks}-{frames}-{secrets.token_hex(4)}.mp4"

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


class PieceWriter:
    """Writes the frames of chunks that follow each other as pieces of `frames` frames or more: `with PieceWriter(film)
    as pieces: pieces.add(chunk)`. What has been added is a piece when the block ends."""

    def __init__(self, film: Film, frames: int = 1):
        self._film = film
        self._frames = frames
        self._writer: Mp4Writer | None = None
        self._index = self._chunks = 0

    def __enter__(self) -> PieceWriter:
        return self

    def __exit__(self, *exception) -> None:
        self._end()

    def add(self, chunk: Chunk) -> bool:
        """Returns whether there is a new piece."""
        if self._writer is None:
            self._film._pieces.mkdir(exist_ok=True)
            unfinished = self._film._pieces / f"unfinished-{secrets.token_hex(4)}.mp4"
            self._writer = Mp4Writer(unfinished, self._film.fps, fragmented=True)
            self._index, self._chunks = chunk.index, 0
        self._writer.write(chunk.frames)
        self._chunks += 1
        return self._writer.frames >= self._frames and self._end()

    def _end(self) -> bool:
        if self._writer is None:
            return False
        writer, self._writer = self._writer, None
        writer.close()
        os.replace(writer.path, self._film._piece(self._index, self._chunks, writer.frames))
        return True


class Recorder:
    """Keeps the chunks of a walk that is played: `with Recorder(film) as recorder: recorder.add(chunk)`.

    The pieces are longer than a chunk, and the session is written every few seconds, as chunks are short. When the
    block ends, however it does, the film is as if each chunk had been added by `Film.add`.
    """

    def __init__(self, film: Film):
        self._film = film
        self._pieces = PieceWriter(film, round(PIECE_SECONDS * film.fps))
        self._last: Session | None = None
        self._before: Session | None = None
        self._kept_at = time.monotonic()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception) -> None:
        try:
            self._keep()
            if self._before is not None:
                self._before.save(self._film._previous)
        finally:
            self._pieces.__exit__(*exception)

    def add(self, chunk: Chunk) -> bool:
        """Returns whether there is a new piece."""
        if self._last is None:
            self._last = self._film.session()
            self._film._previous.unlink(missing_ok=True)  # from now on it is not the one before the last chunk
        self._before, self._last = self._last, chunk.session
        if time.monotonic() - self._kept_at > KEEP_SECONDS:
            self._keep()
        return self._pieces.add(chunk)

    def _keep(self) -> None:
        if self._before is not None:
            self._film._keep(self._last, self._film.session_path)
        self._kept_at = time.monotonic()


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
