"""Pictures: picture -> tensor (aspect bucket, crop), tensor -> pictures. Reads no weights, knows no model."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

MIN_SIDE = 16  # pixels; smaller pictures show nothing to walk through
MAX_SIDE = 20_000
MAX_PIXELS = 64_000_000

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
