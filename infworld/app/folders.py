"""Folders below the system's temporary folder, which other users of the machine can write to as well."""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

log = logging.getLogger(__name__)

_PROCESS = "process-"  # begins the name of a folder that belongs to one
_CLOCK = 1.0  # seconds that the system's time of a process's start may be off


def own_folder(name: str) -> Path:
    """A folder that is this user's alone, the same at every start; where somebody has taken its name, a new one."""
    user = f"-{os.getuid()}" if hasattr(os, "getuid") else ""
    folder = Path(tempfile.gettempdir()).resolve() / f"infinite-world{user}-{name}"
    try:
        make_private(folder)
    except OSError as error:
        folder = Path(tempfile.mkdtemp(prefix=f"infinite-world-{name}-")).resolve()
        log.warning("%s; using %s", error, folder)
    return folder


def make_private(folder: Path) -> None:
    """Makes a folder that only this user can enter, or sees to it that it is one.

    Raises PermissionError if it is a link, or somebody else's.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or (hasattr(os, "getuid") and found.st_uid != os.getuid()):
        raise PermissionError(f"{folder} is a link or not this user's own folder: remove it")
    if stat.S_IMODE(found.st_mode) & 0o077:
        folder.chmod(0o700)


def folder_of_this_process(parent: Path) -> Path:
    """A new folder below `parent` for this process alone. Those of processes that have ended are removed."""
    own = parent / f"{_PROCESS}{os.getpid()}"
    for folder in parent.glob(f"{_PROCESS}*"):
        if folder == own or not _in_use(folder):
            shutil.rmtree(folder, ignore_errors=True)
    make_private(own)
    return own


def is_of_a_process(folder: Path) -> bool:
    """Whether `folder_of_this_process` has made it, here or in another process."""
    return re.fullmatch(rf"{_PROCESS}\d+", folder.name) is not None


def _in_use(folder: Path) -> bool:
    pid = folder.name.removeprefix(_PROCESS)
    with suppress(FileNotFoundError):
        return not pid.isdecimal() or was_running(int(pid), folder.lstat().st_mtime)
    return True  # another process is removing it


def was_running(pid: int, when: float) -> bool:
    """Whether the process of this number runs, and did at that time (seconds since 1970): later ones are others."""
    try:
        return psutil.Process(pid).create_time() <= when + _CLOCK
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # it is not ours to ask
        return True


def old_files(folder: Path, seconds: float) -> Iterator[Path]:
    """The files anywhere below a folder that have not been written to for so long. Links are not followed."""
    oldest = time.time() - seconds
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            with suppress(FileNotFoundError):
                if path.lstat().st_mtime < oldest:
                    yield path


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder.

    Raises OSError for a folder that cannot be read: what is in it would count as nothing.
    """

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # else it was removed meanwhile
            raise error

    total = 0
    for place, _, names in os.walk(folder, onerror=fail):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def remove_empty_folders(folder: Path) -> None:
    """Removes the folders below this one that have nothing in them."""
    for place, _, _ in os.walk(folder, topdown=False):
        if place != str(folder):
            with suppress(OSError):  # it has something
                os.rmdir(place)
