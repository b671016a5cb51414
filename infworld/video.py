"""Films: frames -> mp4. Knows no model.

Mp4 files are H.264 yuv420p, which every browser plays, written by the ffmpeg that imageio-ffmpeg brings along.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe

FPS = 30  # the models' frame rate (spec section 3)
CRF = 16  # H.264 quality: no loss that is easy to see


def check_output(path: str | os.PathLike, suffix: str = ".mp4") -> Path:
    """The path, if a file can be written there; else ValueError. Meant to be called before hours of computing."""
    path = Path(path).expanduser()
    if path.suffix.lower() != suffix:
        raise ValueError(f"the output must be a {suffix} file, not {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}")
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"cannot write {path}: the file is write-protected")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise ValueError(f"cannot write into {path.parent}: {error.strerror or error}") from error


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
        self._size: tuple[int, int] | None = None
        self._process: subprocess.Popen | None = None
        self._log = None

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def write(self, frames: np.ndarray) -> None:
        """Appends frames: uint8, T H W 3, H and W even."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise ValueError(f"frames are uint8 T H W 3, not {frames.dtype} {frames.shape}")
        height, width = frames.shape[1:3]
        if self._process is None:
            self._start(width, height)
        if self._size != (width, height):
            raise ValueError(f"all frames must be {self._size[0]} x {self._size[1]}, not {width} x {height}")
        try:
            for frame in frames:  # counted one by one, so that `frames` is right after a Ctrl-C too
                self._process.stdin.write(np.ascontiguousarray(frame).data)
                self.frames += 1
        except OSError:  # ffmpeg has gone; close() says why
            self.close()

    def close(self) -> None:
        """Ends the file and puts it in its place."""
        if self._process is None:
            return
        process, self._process = self._process, None
        with contextlib.suppress(OSError):  # ffmpeg has gone with data still unwritten: its exit code tells
            process.stdin.close()
        failed = process.wait() != 0
        self._log.seek(0)
        reason = self._log.read().decode(errors="replace").strip()[-500:]
        self._log.close()
        if failed:
            self._part.unlink(missing_ok=True)
            raise OSError(f"ffmpeg could not write {self.path}: {reason}")
        os.replace(self._part, self.path)

    @property
    def _part(self) -> Path:
        return self.path.with_name(f".{self.path.stem}.part{self.path.suffix}")

    def _start(self, width: int, height: int) -> None:
        if width % 2 or height % 2:
            raise ValueError(f"an mp4 needs an even width and height, not {width} x {height}")
        self._size = (width, height)
        flags = "+frag_keyframe+empty_moov+default_base_moof" if self.fragmented else "+faststart"
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(self.fps), "-i", "-"]
        # Browsers show untagged films in a guessed colour matrix, so it is fixed and tagged.
        colour = ["-vf", "scale=out_color_matrix=bt709:out_range=tv", "-colorspace", "bt709"]
        colour += ["-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]
        codec = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", str(CRF), "-preset", "veryfast"]
        codec += ["-bf", "0"] if self.fragmented else []
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close); a pipe would fill up unread
        self._process = subprocess.Popen(
            [*_ffmpeg(), *source, *colour, *codec, "-movflags", flags, "-f", "mp4", str(self._part)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            start_new_session=True,  # a Ctrl-C in the terminal must not reach ffmpeg, which has to end the file
        )


def write_mp4(path: str | os.PathLike, frames: np.ndarray, fps: float = FPS, fragmented: bool = False) -> Path:
    """Writes frames (uint8, T H W 3) as an mp4; see `Mp4Writer`. Returns the path."""
    with Mp4Writer(path, fps, fragmented) as film:
        film.write(frames)
    return film.path


def concat_mp4(paths: Iterable[str | os.PathLike], out: str | os.PathLike) -> Path:
    """Joins mp4 files of one kind end to end without encoding them again. Returns `out`."""
    out = check_output(out)
    quoted = [str(Path(path).resolve()).replace("'", r"'\''") for path in paths]
    if not quoted:
        raise ValueError("there is no film to join")
    part = out.with_name(f".{out.stem}.part{out.suffix}")
    with tempfile.TemporaryDirectory() as folder:
        listing = Path(folder) / "list.txt"
        listing.write_text("".join(f"file '{path}'\n" for path in quoted), encoding="utf-8")
        join = ["-f", "concat", "-safe", "0", "-i", str(listing), "-c", "copy", "-movflags", "+faststart", "-f", "mp4"]
        _run([*_ffmpeg(), *join, str(part)], f"join {len(quoted)} films to {out}")
    os.replace(part, out)
    return out


def read_mp4(path: str | os.PathLike) -> np.ndarray:
    """All frames of a film: uint8, T H W 3. ValueError if it cannot be read."""
    from imageio_ffmpeg import read_frames

    if not Path(path).is_file():
        raise FileNotFoundError(f"no film at {path}")
    try:
        reader = read_frames(str(path), pix_fmt="rgb24")
        width, height = next(reader)["source_size"]
        return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])
    except (OSError, StopIteration, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a film that can be read") from error


def _ffmpeg() -> list[str]:
    return [get_ffmpeg_exe(), "-y", "-nostdin", "-loglevel", "error"]


def _run(command: list[str], what: str) -> None:
    result = subprocess.run(command, capture_output=True, start_new_session=True)
    if result.returncode:
        raise OSError(f"ffmpeg could not {what}: {result.stderr.decode(errors='replace').strip()[-500:]}")
