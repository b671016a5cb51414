"""Films: frames -> mp4. Knows no model.

Mp4 files are H.264 yuv420p, which every browser plays, written by the ffmpeg that imageio-ffmpeg brings along.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe

from infworld.files import check_output, temporary_path

FPS = 30  # the models' frame rate (spec section 3)
FRAGMENTED = "+frag_keyframe+empty_moov+default_base_moof"
CRF = 16  # H.264 quality: no loss that is easy to see

# Browsers show untagged films in guessed colours, so they are fixed and tagged: on the frames, as ffmpeg 7 and later
# take the tags from them, and on the encoder, as ffmpeg 5 does.
_COLOUR = ["-vf", "scale=out_color_matrix=bt709:out_range=tv,setparams=color_primaries=bt709:color_trc=bt709"]
_COLOUR += ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]


class Mp4Writer:
    """Writes an mp4 as its frames come: `with Mp4Writer(path) as film: film.write(frames)`.

    The film is written beside `path` and takes its place when the block ends, also when it ends with an exception or
    Ctrl-C: then `path` holds the frames written so far. Without any frames, `path` is left as it was.
    A `fragmented` film has no B-frames and can be appended to a browser's media source while others follow it.
    Raises ValueError if `path` cannot be written or frames have odd or changing sizes, OSError if writing fails.
    """

    def __init__(self, path: str | os.PathLike, fps: float = FPS, fragmented: bool = False):
        self.path = check_output(path)
        self.fps = fps
        self.fragmented = fragmented
        self.frames = 0
        self._part = temporary_path(self.path, ".mp4")
        self._command = _ffmpeg()
        self._size: tuple[int, int] | None = None
        self._process: subprocess.Popen | None = None
        self._log: IO[bytes]  # of ffmpeg, as long as there is a process
        self._closed = False

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def write(self, frames: np.ndarray) -> None:
        """Appends frames: uint8, T H W 3, H and W even."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise ValueError(f"frames are uint8 T H W 3, not {frames.dtype} {frames.shape}")
        if self._closed:
            raise OSError(f"{self.path} is closed")
        height, width = frames.shape[1:3]
        if self._process is None:
            self._start(width, height)
        if self._size != (width, height):
            raise ValueError(f"all frames must be {self._size[0]} x {self._size[1]}, not {width} x {height}")
        try:
            for frame in frames:  # counted one by one, so that `frames` is right after a Ctrl-C too
                self._process.stdin.write(np.ascontiguousarray(frame).data)
                self.frames += 1
        except OSError as error:  # ffmpeg has gone; close() says why
            self.close()
            raise OSError(f"ffmpeg ended before {self.path} was written") from error

    def close(self) -> None:
        """Ends the file and puts it in its place. OSError if that fails: then there is no file."""
        if part := self.end():
            try:
                os.replace(part, self.path)
            except OSError:
                self.frames = 0
                part.unlink(missing_ok=True)
                raise

    def end(self) -> Path | None:
        """Ends the file and leaves it where it was written, which is returned; None without frames. OSError if that
        fails: then there is no file."""
        self._closed = True
        if self._process is None:
            return None
        process, self._process = self._process, None
        with contextlib.suppress(OSError):  # ffmpeg has gone with data still unwritten: its exit code tells
            process.stdin.close()
        code = process.wait()
        self._log.seek(0)
        reason = _reason(self._log.read())
        self._log.close()
        if code:
            self.frames = 0
            self._part.unlink(missing_ok=True)
            raise OSError(f"ffmpeg could not write {self.path}: {reason or f'it ended with code {code}'}")
        return self._part

    def discard(self) -> None:
        """Ends without a file: what was at `path` before stays."""
        self._closed = True
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.communicate()
            self._log.close()
            self._part.unlink(missing_ok=True)
        self.frames = 0

    def _start(self, width: int, height: int) -> None:
        if width % 2 or height % 2:
            raise ValueError(f"an mp4 needs an even width and height, not {width} x {height}")
        self._size = (width, height)
        flags = FRAGMENTED if self.fragmented else "+faststart"
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(self.fps), "-i", "-"]
        codec = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", str(CRF), "-preset", "veryfast"]
        codec += ["-bf", "0"] if self.fragmented else []
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close); a pipe would fill up unread
        with _out_of_reach():
            self._process = subprocess.Popen(
                [*self._command, *source, *_COLOUR, *codec, "-movflags", flags, "-f", "mp4", _file(self._part)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._log,
                start_new_session=True,
            )


class JoinedMp4Writer:
    """As `Mp4Writer`, for a film that comes chunk by chunk: each `write` encodes its frames by themselves, as the page
    does to show them, and `close` joins the pieces. The same chunks make the same file, whoever writes them."""

    def __init__(self, path: str | os.PathLike, fps: float = FPS):
        self.path = check_output(path)
        self.fps = fps
        self.frames = 0
        self._pieces: list[Path] = []
        _ffmpeg()  # or say at once that there is none

    def write(self, frames: np.ndarray) -> None:
        """Appends frames: uint8, T H W 3, H and W even, of one size."""
        writer = Mp4Writer(self.path, self.fps, fragmented=True)
        writer.write(frames)
        if piece := writer.end():
            self._pieces.append(piece)
            self.frames += len(frames)

    def close(self) -> None:
        """Joins what was written and puts it in its place. OSError if that fails: then there is no file."""
        try:
            if self._pieces:
                concat_mp4(self._pieces, self.path)
        except OSError:
            self.frames = 0
            raise
        finally:
            self._remove()

    def discard(self) -> None:
        """Ends without a file: what was at `path` before stays."""
        self.frames = 0
        self._remove()

    def _remove(self) -> None:
        for piece in self._pieces:
            piece.unlink(missing_ok=True)
        self._pieces = []


def write_mp4(path: str | os.PathLike, frames: np.ndarray, fps: float = FPS, fragmented: bool = False) -> Path:
    """Writes frames (uint8, T H W 3) as an mp4; see `Mp4Writer`. Returns the path."""
    with Mp4Writer(path, fps, fragmented) as film:
        film.write(frames)
    return film.path


def concat_mp4(paths: Iterable[str | os.PathLike], out: str | os.PathLike) -> Path:
    """Joins mp4 files of one kind end to end without encoding them again. Returns `out`."""
    out = check_output(out)
    quoted = [os.fsencode(Path(path).resolve()).replace(b"'", rb"'\''") for path in paths]
    if not quoted:
        raise ValueError("there is no film to join")
    part = temporary_path(out, ".mp4")
    with tempfile.TemporaryDirectory() as folder:
        listing = Path(folder) / "list.txt"
        listing.write_bytes(b"".join(b"file '%b'\n" % path for path in quoted))
        join = [
            "-f",
            "concat",
            "-safe",
            "0",
            "-i",
            _file(listing),
            "-c",
            "copy",
            "-movflags",
            "+faststart",
            "-f",
            "mp4",
        ]
        try:
            _run([*_ffmpeg(), *join, _file(part)], f"join {len(quoted)} films to {out}")
            os.replace(part, out)
        finally:
            part.unlink(missing_ok=True)
    return out


def cut_mp4(path: str | os.PathLike, frames: int, out: str | os.PathLike) -> Path:
    """The first `frames` frames of a fragmented film (no B-frames), without encoding it again. Returns `out`."""
    out = check_output(out)
    part = temporary_path(out, ".mp4")
    flags = ["-c", "copy", "-frames:v", str(frames), "-movflags", FRAGMENTED, "-f", "mp4"]
    try:
        _run([*_ffmpeg(), "-i", _file(path), *flags, _file(part)], f"cut {path}")
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return out


def read_mp4(path: str | os.PathLike) -> np.ndarray:
    """All frames of a film: uint8, T H W 3. Raises ValueError if it cannot be read."""
    from imageio_ffmpeg import read_frames

    if not Path(path).is_file():
        raise FileNotFoundError(f"no film at {path}")
    try:
        reader = read_frames(_file(path), pix_fmt="rgb24")
        width, height = next(reader)["source_size"]
        return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])
    except (OSError, StopIteration, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a film that can be read") from error


def _ffmpeg() -> list[str]:
    """The beginning of every command. OSError where there is no ffmpeg."""
    try:
        program = get_ffmpeg_exe()
    except RuntimeError as error:
        raise OSError(str(error)) from error
    if shutil.which(program) is None:
        raise OSError(f"there is no ffmpeg at {program}, which the variable IMAGEIO_FFMPEG_EXE names")
    return [program, "-y", "-nostdin", "-loglevel", "error"]


@contextlib.contextmanager
def _out_of_reach() -> Iterator[None]:
    """A Ctrl-C in the terminal must not reach what is started here: ffmpeg has to end its file. Its session of its own
    begins a moment after it, so it also inherits that the signals are blocked."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _file(path: str | os.PathLike) -> str:
    """A path as ffmpeg takes it, which reads `a:b.mp4` as an address."""
    return f"file:{os.fspath(path)}"


def _run(command: list[str], what: str) -> None:
    with _out_of_reach():
        result = subprocess.run(command, capture_output=True, start_new_session=True)
    if result.returncode:
        raise OSError(f"ffmpeg could not {what}: {_reason(result.stderr)}")


def _reason(log: bytes) -> str:
    """Why ffmpeg failed: that the disk is full if it says so, else the last thing it says; empty if there is none."""
    lines = log.decode(errors="replace").split("\n")
    said = [re.sub(r"^\[[^]]*\] ", "", line).strip() for line in lines if line.strip()]
    full = os.strerror(errno.ENOSPC)
    return next((line for line in said if full in line), said[-1] if said else "")[:500]
