"""Downloads one file from the Hub: resumable, hashed, retried, with clear errors. Knows no model; `hub` calls it.

huggingface_hub's own download resumes within one call, but starts a file over when its process has died (2.4 deletes
the partial file). At 11 GB that matters, so the bytes are fetched here, with the client's session and headers.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import BinaryIO

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.utils import WeakFileLock, build_hf_headers, get_session, hf_raise_for_status

log = logging.getLogger(__name__)

ROOM = 1 << 30  # bytes that stay free on a disk
TIMEOUT = 30  # seconds without a byte
PAUSES = (1, 2, 4, 8, 16)  # seconds before another try, as long as nothing arrives
LONGEST_PAUSE = 120  # seconds that a download waits when the Hub asks to slow down

# Network errors: the client's base class, from httpx or httpx2, depending on its version.
NETWORK_ERRORS: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], OfflineModeIsEnabled)
OTHER_FOLDER = "choose another folder with INFWORLD_CHECKPOINTS (infworld download: --to)"
_BLOCK = 1 << 20
_SPEED_WINDOW = 10  # seconds
_REPORT_EVERY = 0.2  # seconds


class HubError(OSError):
    """A failure of the Hub, the network or the disk; the message says what to do."""


@dataclass(frozen=True)
class HubFile:
    """One file to download: its place on the Hub, size in bytes, hash and target path.

    digest: sha256 of a large file, git's blob SHA-1 of a small one: what the Hub lists for it.
    """

    repo: str
    commit: str
    path: str
    size: int
    digest: str
    target: Path

    @property
    def part(self) -> Path:
        """The partial file. Its name depends on the content, so that two are never mixed."""
        return self.target.with_name(f".{self.target.name}.{self.digest[:12]}.part")

    @property
    def missing(self) -> int:
        """Bytes still to come."""
        return self.size - min(self.size, self.part.stat().st_size if self.part.is_file() else 0)


@dataclass(frozen=True)
class Transfer:
    """Progress of a download: bytes of all files together, bytes per second, seconds left (None: not known yet)."""

    file: str
    done: int
    total: int
    speed: float | None = None
    remaining: float | None = None

    def __str__(self) -> str:
        """ "Wan2.1_VAE.pth: 1.2 of 14.9 GB, 85 MB/s, 2:41 left" """
        text = f"{self.file}: {size_text(self.done)} of {size_text(self.total)}"
        if self.speed:
            text += f", {size_text(self.speed)}/s"
        if self.remaining is not None:
            minutes, seconds = divmod(round(self.remaining), 60)
            text += f", {minutes}:{seconds:02} left"
        return text


def size_text(size: float) -> str:
    """Bytes as people read them, in powers of 1000 as on the Hub: "11.4 GB"."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Allows one download at a time into a folder; another process waits and then finds the files."""
    with explained_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".hub.lock").touch()
    with WeakFileLock(folder / ".hub.lock"):
        yield


def check_space(files: Iterable[HubFile]) -> None:
    """Raises HubError if a disk has no room for the files that go there, with ROOM to spare."""
    needed: dict[int, list[HubFile]] = {}
    for file in files:
        needed.setdefault(_existing(file.target).stat().st_dev, []).append(file)
    for there in needed.values():
        folder = there[0].target.parent
        missing, free = sum(file.missing for file in there), shutil.disk_usage(_existing(folder)).free
        if missing and free < missing + ROOM:
            raise HubError(
                f"{size_text(missing)} are still to be downloaded to {folder}, where {size_text(free)} are free: free "
                f"{size_text(missing + ROOM - free)} there, or {OTHER_FOLDER}"
            )


def check_room(folder: Path, size: int) -> None:
    """Raises ValueError if the folder's disk has no room for `size` bytes more, with ROOM to spare."""
    free = shutil.disk_usage(folder).free
    if free < size + ROOM:
        raise ValueError(
            f"{folder} has {free / 1e9:.1f} GB free and {(size + ROOM) / 1e9:.1f} GB are needed: make room, or choose "
            "a folder on another disk"
        )


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def download(file: HubFile, meter: TransferProgress) -> None:
    """Downloads one file to its target, complete and with the right hash or not at all; resumes from a partial file."""
    with explained_disk(file.target.parent):
        file.target.parent.mkdir(parents=True, exist_ok=True)
        if file.part.is_file() and file.part.stat().st_size > file.size:
            file.part.unlink()
        with file.part.open("a+b") as part:
            digest = hash_like(file.digest, file.size)
            part.seek(0)
            _hash_rest(part, digest)
            have = part.tell()
            if have:
                log.info("%s goes on at %s of %s", file.target.name, size_text(have), size_text(file.size))
            meter.begin(file, have)
            patience = RetryPolicy(lambda error: explain(error, file.repo, file.commit))
            while have < file.size:
                try:
                    for block in _blocks(file, have):
                        part.write(block)
                        digest.update(block)
                        have += len(block)
                        meter.add(len(block))
                        patience.renew()
                    if have < file.size:
                        patience.wait(ConnectionError("the connection was closed early"))
                except NETWORK_ERRORS as error:
                    patience.wait(error)
        if digest.hexdigest() != file.digest:
            file.part.unlink()
            raise HubError(
                f"{file.target.name} arrived damaged or changed (its hash is not the one that {file.repo} lists), and "
                "was removed: run the same again; if it happens twice, something on the way changes it (a proxy?)"
            )
        file.part.replace(file.target)
        for stale in file.target.parent.glob(f".{glob.escape(file.target.name)}.*.part"):
            stale.unlink()


def _blocks(file: HubFile, start: int) -> Iterator[bytes]:
    """The bytes of a file from `start` on. Raises the client's errors, and HubError if the size differs from the listed
    one."""
    url = hf_hub_url(file.repo, file.path, revision=file.commit)
    headers = build_hf_headers() | {"Range": f"bytes={start}-", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
        hf_raise_for_status(response)
        ranged = response.status_code == 206
        length = response.headers.get("Content-Length")
        if length and "Content-Encoding" not in response.headers:
            size = int(length) + (start if ranged else 0)
            if size != file.size:
                raise HubError(
                    f"{file.path} in {file.repo} has {size:,} bytes, not {file.size:,} as listed: it changed, or a "
                    "proxy stands in for it; try again later"
                )
        skip = 0 if ranged else start  # a server without range requests sends the whole file
        for block in response.iter_bytes():
            yield block[skip:]
            skip = max(0, skip - len(block))


def hash_like(digest: str, size: int):
    """A new hash of the kind that the Hub lists: git's blob SHA-1 for small files, sha256 for large ones."""
    if len(digest) == 40:
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    return hashlib.sha256()


def is_same(path: Path, size: int, digest: str) -> bool:
    """Whether a file on the disk is the one that the Hub lists with this size and digest."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    found = hash_like(digest, size)
    with path.open("rb") as file:
        _hash_rest(file, found)
    return found.hexdigest() == digest


def _hash_rest(file: BinaryIO, digest) -> None:
    """Hashes from the stream's position to its end."""
    while block := file.read(_BLOCK):
        digest.update(block)


class TransferProgress:
    """Reports the progress of all files together; the speed is that of the last seconds."""

    def __init__(self, files: Iterable[HubFile], progress: Callable[[Transfer], None] | None):
        self._progress = progress
        self._total = sum(file.size for file in files)
        self._done = 0
        self._name = ""
        self._recent: deque[tuple[float, int]] = deque()  # time, bytes that came over the network since the last one
        self._reported = 0.0

    def begin(self, file: HubFile, have: int) -> None:
        self._name = file.target.name
        self._done += have
        self._recent.append((monotonic(), 0))
        self._report()

    def add(self, arrived: int) -> None:
        now = monotonic()
        self._done += arrived
        self._recent.append((now, arrived))
        while self._recent[0][0] < now - _SPEED_WINDOW:
            self._recent.popleft()
        if now - self._reported >= _REPORT_EVERY or self._done == self._total:
            self._report()

    def _report(self) -> None:
        if self._progress is None:
            return
        now = self._reported = monotonic()
        elapsed = now - self._recent[0][0] if self._recent else 0.0
        speed = sum(arrived for _, arrived in self._recent) / elapsed if elapsed else None
        remaining = (self._total - self._done) / speed if speed else None
        self._progress(Transfer(self._name, self._done, self._total, speed, remaining))


class RetryPolicy:
    """Waits after a transient error, longer each time while nothing arrives; raises HubError for permanent ones."""

    def __init__(self, explain: Callable[[Exception], str], pauses: tuple[int, ...] = PAUSES):
        self._explain, self._pauses = explain, pauses
        self._failures = 0

    def renew(self) -> None:
        self._failures = 0

    def wait(self, error: Exception) -> None:
        status, asked = status_of(error), _asked_pause(error)
        passing = not isinstance(error, OfflineModeIsEnabled) and (
            status is None or status in (408, 429) or status >= 500
        )
        if not passing or self._failures >= len(self._pauses) or asked > LONGEST_PAUSE:
            raise HubError(self._explain(error)) from error
        pause = max(asked, self._pauses[self._failures])
        self._failures += 1
        log.warning("%s: trying again in %d s", _reason(error), pause)
        sleep(pause)


def status_of(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _asked_pause(error: Exception) -> int:
    """Seconds that the Hub asks clients to wait, by `Retry-After` or its own `RateLimit` header; 0 without either."""
    if not isinstance(error, HfHubHTTPError) or status_of(error) not in (429, 503):
        return 0
    headers = error.response.headers
    seconds = re.search(r"^\s*(\d+)\s*$", headers.get("Retry-After", "")) or re.search(
        r";\s*t=(\d+)", headers.get("RateLimit", "")
    )
    return int(seconds.group(1)) if seconds else 0


def _reason(error: Exception) -> str:
    status = status_of(error)
    return f"the Hub answers {status}" if status else (str(error) or type(error).__name__)


def explain(error: Exception, repo: str, revision: str | None = None) -> str:
    """What happened and what to do, for an error of the client. Never contains what was sent, such as a token."""
    page, status = f"{constants.ENDPOINT}/{repo}", status_of(error)
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo} is out of reach while HF_HUB_OFFLINE is set: unset it, or put the files in place yourself"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {revision}: choose one of {page}/commits/main"
    if isinstance(error, GatedRepoError) or status == 403:
        return f"{repo} asks for permission: accept its terms at {page}, then `hf auth login` or set HF_TOKEN"
    if status == 401:
        return (
            f"{repo} is private, not there, or the token is not valid: see {page}, then `hf auth login` or set HF_TOKEN"
        )
    if status == 404:
        return f"{page} is not there: check the name, HF_ENDPOINT and whether your token may see it"
    if status == 429:
        pause = _asked_pause(error)
        when = f"in {pause} s" if pause else "in some minutes"
        return f"the Hub asks to slow down: try again {when}; who is logged in (`hf auth login`) may ask for more"
    if status:
        return f"the Hub has trouble (status {status}) with {repo}: try again later; what has arrived is kept"
    return (
        f"cannot reach {constants.ENDPOINT} ({_reason(error)}): check the connection, proxy and HF_ENDPOINT and try "
        "again; what has arrived is kept"
    )


@contextmanager
def explained_disk(folder: Path) -> Iterator[None]:
    """Turns errors of the disk into HubErrors."""
    try:
        yield
    except HubError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise HubError(
            f"cannot write to {folder} ({reason}): free space or permit it there, or {OTHER_FOLDER}"
        ) from error
