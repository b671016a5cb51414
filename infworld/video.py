"""Pictures and films: picture -> tensor (aspect bucket, crop), frames -> mp4. Reads no weights, knows no model.

Mp4 files are H.264 yuv420p, which every browser plays, written by the ffmpeg that imageio-ffmpeg brings along.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageOps, UnidentifiedImageError

MIN_SIDE = 16  # pixels; smaller pictures show nothing to walk through
MAX_SIDE = 20_000
MAX_PIXELS = 64_000_000
FPS = 30  # the models' frame rate (spec section 3)
CRF = 16  # H.264 quality: no loss that is easy to see

_WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # one channel, 16 bits of use


def load_image(image: Image.Image | np.ndarray | str | os.PathLike) -> Image.Image:
    """A picture as an upright 8-bit RGB PIL image, from a PIL image, an array (H W, H W 3 or H W 4; uint8 or uint16)
    or a path.

    EXIF rotation is applied, transparency is laid on white, 16-bit values are scaled to 8 bits.
    Raises FileNotFoundError for a missing file and ValueError for one that is unreadable, under 16 pixels on a side,
    or too large (20,000 pixels on a side or more than 64 megapixels); too large a file is never decoded.
    """
    name = "the picture"
    if isinstance(image, (str, os.PathLike)):
        name = f"the picture {Path(image).name!r}"
        image = _open(Path(image).expanduser(), name)
    elif isinstance(image, np.ndarray):
        image = _from_array(image)
    elif not isinstance(image, Image.Image):
        raise ValueError(f"a picture is a PIL image, an array or a path, not {type(image).__name__}")
    _check_size(image.size, name)
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError) as error:  # a truncated or broken file is found out while decoding
        raise ValueError(f"{name} cannot be read: {error}") from error


def _open(path: Path, name: str) -> Image.Image:
    if not path.is_file():
        raise FileNotFoundError(f"no picture at {path}")
    try:
        return Image.open(path)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large: {error}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name} is not a picture that can be read (use PNG, JPEG or WebP)") from error


def _from_array(array: np.ndarray) -> Image.Image:
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or 0 in array.shape:
        raise ValueError(f"a picture array is H W, H W 3 or H W 4, not {array.shape}")
    _check_size((array.shape[1], array.shape[0]), "the picture")
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"a picture array is uint8 or uint16, not {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array))


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if min(size) < MIN_SIDE:
        raise ValueError(f"{name} is {width} x {height} pixels: use one with at least {MIN_SIDE} on each side")
    if max(size) >= MAX_SIDE or width * height > MAX_PIXELS:
        raise ValueError(
            f"{name} is {width} x {height} pixels: use one with less than {MAX_SIDE:,} on each side "
            f"and at most {MAX_PIXELS // 1_000_000} megapixels"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _WIDE_MODES:
        return Image.fromarray((np.clip(np.asarray(image), 0, 65535) // 256).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(np.clip(np.asarray(image), 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def nearest_bucket(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) of `buckets` whose printed ratio is closest to that of a picture of `size` (width, height).

    Spec section 2: a bucket's ratio is height / width rounded to two places.
    """
    width, height = size
    return min(buckets, key=lambda bucket: abs(round(bucket[0] / bucket[1], 2) - height / width))


def crop_image(image: Image.Image | np.ndarray | str | os.PathLike, buckets: Sequence[tuple[int, int]]) -> Image.Image:
    """What the model sees of a picture: scaled to cover the nearest bucket, the centre cut out (spec section 2)."""
    image = load_image(image)
    height, width = nearest_bucket(image.size, buckets)
    factor = max(height / image.height, width / image.width)
    # A product that should be whole may come out a hair above it, and ceil would add a row of pixels.
    wide, high = (math.ceil(side * factor - 1e-6) for side in image.size)
    left, top = (wide - width) // 2, (high - height) // 2
    scaled = image.resize((wide, high), Image.Resampling.BICUBIC)
    return scaled.crop((left, top, left + width, top + height))


def prepare_image(
    image: Image.Image | np.ndarray | str | os.PathLike, buckets: Sequence[tuple[int, int]]
) -> torch.Tensor:
    """A picture as one frame of video: float32, 1 3 1 H W, [-1, 1] (spec section 2). Errors as `load_image`."""
    pixels = torch.from_numpy(np.array(crop_image(image, buckets)))
    return pixels.permute(2, 0, 1)[None, :, None].float() / 127.5 - 1


def to_uint8(video: torch.Tensor) -> np.ndarray:
    """Video 1 3 T H W in [-1, 1] as frames: uint8, T H W 3."""
    if video.ndim != 5 or video.shape[:2] != (1, 3):
        raise ValueError(f"video is 1 3 T H W, not {tuple(video.shape)}")
    pixels = (video[0].float().clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).contiguous().cpu().numpy()


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
