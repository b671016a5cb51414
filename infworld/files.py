"""Files that take long to make: checked before the work, written under a name of their own, by one run at a time."""

from __future__ import annotations

import glob
import json
import os
import re
import secrets
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

try:
    import fcntl
except ImportError:  # Windows: two runs with one output are not noticed, and the later one's file stays
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")

_SHORT = 40  # characters of a name that the names made from it keep, so that they fit where the name itself fits
_LONGEST = 255  # bytes of a name, on nearly all file systems


def read_json_text(path: Path) -> str:
    """The text of a JSON file, in whichever of UTF-8, 16 and 32 it is, with or without the mark that Windows writes.
    UnicodeDecodeError for none of these."""
    data = path.read_bytes()
    return data.decode(json.detect_encoding(data)).removeprefix("\ufeff")


def read_unreplaced(path: Path, read: Callable[[], T]) -> T:
    """What `read` returns or raises of the file at a path: once more if another one took its place meanwhile, as when
    a film goes on. safetensors opens a file twice, and would take the places in the old one for those in the new."""
    while True:
        before = _identity(path)
        try:
            value = read()
        except Exception:
            if _identity(path) == before:
                raise
        else:
            if _identity(path) == before:
                return value


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Tells a file from one that takes its place later; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def check_output(path: str | os.PathLike, suffix: str = ".mp4") -> Path:
    """The path, if a file can be written there; else ValueError. Meant to be called before hours of computing."""
    try:
        path = Path(path).expanduser()
        if path.suffix.lower() != suffix or "\0" in path.name:
            raise ValueError(f"the output must be a {suffix} file, not {str(path)!r}")
        if path.is_dir():
            raise ValueError(f"cannot write {path}: it is a folder")
        if not path.parent.is_dir():
            raise ValueError(f"cannot write {path}: there is no folder {path.parent}")
        if _exists(path) and not path.is_file():
            raise ValueError(f"cannot write {path}: it is not a regular file")
        if _exists(path) and not os.access(path, os.W_OK):
            raise ValueError(f"cannot write {path}: the file is write-protected")
        part = temporary_path(path)
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        part.unlink()
    except (OSError, RuntimeError) as error:  # RuntimeError: of a home folder that is not known
        raise ValueError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    except (TypeError, UnicodeError) as error:
        raise ValueError(f"{path!r} is not a file name") from error
    return path


def _exists(path: Path) -> bool:
    """As `Path.exists`; OSError for a name that cannot be, such as one that is too long."""
    try:
        return bool(os.stat(path))
    except FileNotFoundError:
        return False


def temporary_path(path: Path, end: str = "") -> Path:
    """A hidden name beside `path` that nothing else has, with this process's number: `.film.mp4.1a2b3c4d.123.part`."""
    return path.with_name(f".{_short(path.name)}.{secrets.token_hex(4)}.{os.getpid()}.part{end}")


def writer_of(temporary: Path) -> int | None:
    """The number of the process that writes this temporary file; None for a name that is none of `temporary_path`."""
    found = re.fullmatch(r"\..*\.[0-9a-f]{8}\.(\d+)\.part(\.\w+)?", temporary.name, re.DOTALL)
    return int(found[1]) if found else None


def remove_leftovers(path: Path, end: str = "") -> None:
    """Removes what runs that were killed have left under temporary names of `path`. The caller has claimed it."""
    token = "[0-9a-f]" * 8
    for part in path.parent.glob(f".{glob.escape(_short(path.name))}.{token}.[0-9]*.part{end}"):
        with suppress(OSError):
            part.unlink()


def session_beside(path: Path) -> Path:
    """Where the session of the film at `path` is kept: `film.session.safetensors`."""
    name = f"{path.stem}.session.safetensors"
    return path.with_name(name if len(os.fsencode(name)) <= _LONGEST else f"{_short(path.stem)}.session.safetensors")


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Within it no other run can claim this file; ValueError if one has. A killed run's claim ends with it."""
    if fcntl is None:
        yield
        return
    lock = path.with_name(f".{_short(path.name)}.lock")
    descriptor = _lock(lock, path)
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        os.close(descriptor)


def _lock(lock: Path, path: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(f"another run is writing {path}: wait for it, or choose another name") from None
        except OSError:  # a file system without locks
            return descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                return descriptor
        os.close(descriptor)  # the run that had it has removed it meanwhile


def _short(name: str) -> str:
    """The name, or if it is long its beginning and a number of the whole."""
    return name if len(name) <= _SHORT else f"{name[:_SHORT]}-{zlib.crc32(os.fsencode(name)):08x}"
