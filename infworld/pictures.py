"""Pictures: file, array or PIL image -> upright 8-bit sRGB -> tensor (aspect bucket, crop). Knows no models.

Pictures are uploaded by strangers: only some formats are opened, sizes are checked before anything is decoded, large
pictures are decoded one at a time and averaged down strip by strip, and every failure is one ValueError.
"""

from __future__ import annotations

import io
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms

from infworld.devices import release_memory
from infworld.picture_files import FORMAT_NAMES, FORMATS, orientation, without_metadata

MIN_SIDE = 16  # pixels; smaller pictures show nothing to walk through
MAX_SIDE = 20_000
MAX_PIXELS = 64_000_000
MAX_WEBP_PIXELS = 32_000_000  # which are in memory four times when they are decoded, and cannot be at reduced size
KEPT_PIXELS = 6_000_000  # of a large picture at least: the largest bucket has 0.4 million
STRIP_PIXELS = 1_000_000  # converted at a time
LARGE_PIXELS = 16_000_000  # pictures of more are decoded one at a time, others two at a time
MAX_SCANS = 100  # of a progressive JPEG, each of which passes over the whole picture; encoders make about ten

PictureSource = Image.Image | np.ndarray | str | os.PathLike

# Pillow takes memory in blocks; those above 32 MB go back to the system when they are freed, and do not stay scattered.
Image.core.set_block_size(64 * 2**20)

_LARGE, _SMALL = threading.BoundedSemaphore(1), threading.BoundedSemaphore(2)
_WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # grey, more than 8 bits
_INTEGER_BITS = (1, 8, 10, 12, 14, 15, 16)  # what whole numbers without a range of their own may have
_FLOAT_RANGES = ((1, -math.inf), (255, 127), (65535, 32767))  # white, and what the brightest pixel has at least
_OVERSHOOT = 0.001  # of white, that interpolation may have added at both ends
_PROFILE_SPACES = {"L": "GRAY", "LA": "GRAY", "RGB": "RGB", "RGBA": "RGB", "CMYK": "CMYK", "LAB": "Lab"}  # by mode
_UPRIGHT = {
    **{2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM},
    **{5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE},
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation

logger = logging.getLogger(__name__)


class _Unfit(ValueError):
    """What is wrong with a picture that can be read, as the end of a sentence that begins with its name."""


def load_image(image: PictureSource) -> Image.Image:
    """A picture as an upright 8-bit sRGB image (PIL, mode RGB), from a path, a PIL image or an array.

    Files may be PNG, JPEG, WebP, GIF, BMP, TIFF and, where Pillow has it, AVIF; of several frames the first counts.
    Arrays are H W, H W 3 or H W 4, uint8 or uint16. EXIF orientation is applied, an embedded ICC profile converted
    to sRGB (relative colorimetric, black point compensation), transparency laid on white. Grey of more than 8 bits is
    scaled (see `_white`), of 16-bit colours the upper 8 bits count. Pictures of 24 megapixels or more come back at 1/2,
    1/3, ... of their size, with 6 megapixels or more.
    Raises FileNotFoundError for a missing file and ValueError for one that cannot be read, is under 16 pixels on a
    side, or too large (20,000 pixels on a side or more than 64 megapixels, WebP 32): too large a file is never decoded.
    """
    return _read(image, lambda upright: upright)


def _read(image: PictureSource, finish: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """What `finish` makes of the image that `load_image` returns; few at a time, so that it should take away pixels."""
    try:
        if isinstance(image, (str, os.PathLike)):
            return _read_file(Path(image).expanduser(), finish)
        if isinstance(image, np.ndarray):
            image = _from_array(image)
        if not isinstance(image, Image.Image):
            raise _Unfit(f"must be a PIL image, an array or a path, not {type(image).__name__}")
        _check_size(image.size)
        return finish(_to_rgb(image))
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow and the libraries below it raise whatever they like for a broken picture
        name = f"the picture {Path(image).name!r}" if isinstance(image, (str, os.PathLike)) else "the picture"
        raise ValueError(f"{name} {_problem(error)}") from error


def _read_file(path: Path, finish: Callable[[Image.Image], Image.Image]) -> Image.Image:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no picture at {path}")
    failure: Exception | None = None
    for source in _versions(path):
        try:
            with Image.open(source, formats=FORMATS) as picture:
                _check_size(picture.size)
                _check_file(picture)
                large = picture.width * picture.height > LARGE_PIXELS
            with _LARGE if large else _SMALL:
                image = _decode(source, finish)
                if large:
                    release_memory()
                return image
        except (_Unfit, MemoryError, PermissionError, Image.DecompressionBombError):
            raise
        except Exception as error:
            failure = failure or error
    raise failure


def _decode(source: BinaryIO, finish: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Apart, so that all that it has in memory is free again before the next picture's turn comes."""
    source.seek(0)
    with Image.open(source, formats=FORMATS) as picture:
        factor = _reduction(picture.size)
        if factor > 1:  # JPEGs decode at 1/2, 1/4 or 1/8
            picture.draft(None, (picture.width // factor, picture.height // factor))
        return finish(_to_rgb(picture))


def _problem(error: Exception) -> str:
    """What is wrong with a picture, as the end of a sentence that begins with its name."""
    if isinstance(error, _Unfit):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return f"is too large: use one with at most {MAX_PIXELS // 1_000_000} megapixels"
    if isinstance(error, MemoryError):
        return "does not fit into the memory: use a smaller one"
    if isinstance(error, Image.UnidentifiedImageError):
        return (
            f"is not a picture that can be read: use {FORMAT_NAMES}, with at most 16 bits per colour "
            "(or, if it is one of these, it is damaged)"
        )
    return f"cannot be read: {getattr(error, 'strerror', None) or error}"


def _versions(path: Path) -> Iterator[BinaryIO]:
    """The file, and after a failure the same picture without the metadata that may be the reason."""
    with path.open("rb") as file:  # given its path, Pillow would map an uncompressed TIFF and garble one that is turned
        yield file
    yield from map(io.BytesIO, without_metadata(path.read_bytes()))


def _from_array(array: np.ndarray) -> Image.Image:
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or 0 in array.shape:
        raise _Unfit(f"must be an array H W, H W 3 or H W 4, not {array.shape}")
    if array.dtype == np.uint16 and array.ndim == 3:
        array = (array >> 8).astype(np.uint8)
        _check_bright(array.max())
    if array.dtype != np.uint8 and not (array.dtype == np.uint16 and array.ndim == 2):
        raise _Unfit(f"must be an array of uint8 or uint16, not {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(picture: Image.Image) -> Image.Image:
    """The picture that `load_image` promises, from one of a size that was checked and that may not be decoded yet."""
    deep = any(";16" in str(tile[3]) for tile in getattr(picture, "tile", ()))  # of which Pillow keeps the upper 8 bits
    picture.load()
    if deep and picture.mode not in _WIDE_MODES:
        _check_bright(max(most for _, most in picture.convert("RGB").getextrema()))
    reduced = _reduced(picture, _reduction(picture.size))
    turn = orientation(picture)
    upright = reduced.transpose(_UPRIGHT[turn]) if turn in _UPRIGHT else reduced
    return _on_white(_to_srgb(upright, picture.info.get("icc_profile")))


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if min(size) < MIN_SIDE:
        raise _Unfit(f"is {width} x {height} pixels: use one with at least {MIN_SIDE} on each side")
    if max(size) >= MAX_SIDE or width * height > MAX_PIXELS:
        raise _Unfit(
            f"is {width} x {height} pixels: use one with less than {MAX_SIDE:,} on each side "
            f"and at most {MAX_PIXELS // 1_000_000} megapixels"
        )


def _check_file(picture: Image.Image) -> None:
    """Refuses files that take far more time or memory than their size tells, and those that Pillow misreads."""
    file = getattr(picture, "fp", None)
    if "progressive" in picture.info and file is not None:
        position = file.tell()
        file.seek(0)
        scans = file.read().count(b"\xff\xda")
        file.seek(position)
        if scans > MAX_SCANS:
            raise _Unfit(f"is a JPEG of more than {MAX_SCANS} scans: save it anew")
    tile = _tiff_tag(picture, 322, 0) * _tiff_tag(picture, 323, 0)
    if picture.format == "WEBP" and picture.width * picture.height > MAX_WEBP_PIXELS:
        raise _Unfit(f"is a WebP of more than {MAX_WEBP_PIXELS // 1_000_000} megapixels: save it as PNG or JPEG")
    if tile > MAX_PIXELS:
        raise _Unfit(f"is a TIFF in tiles of {tile:,} pixels: save it anew")
    bits, signed, planar = _tiff_tag(picture, 258, 8), _tiff_tag(picture, 339, 1) == 2, _tiff_tag(picture, 284, 1) == 2
    if (bits > 8 and planar and len(picture.getbands()) > 1) or (bits == 8 and signed):  # Pillow reads other values
        raise _Unfit(f"is a TIFF of {bits}-bit {'signed values' if signed else 'planes'}: save it as PNG or JPEG")


def _check_bright(most: int) -> None:
    """Refuses colours of 16 bits that use the lowest 12 alone, and would come out black. most: their upper 8 bits."""
    if most < 16:
        raise _Unfit("has 16-bit colours of which none has a sixteenth of white: scale them, or save it with 8 bits")


def _tiff_tag(picture: Image.Image, tag: int, default: int) -> int:
    value = picture.tag_v2.get(tag, default) if picture.format == "TIFF" else default
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int) else default


# Values


def _reduction(size: tuple[int, int]) -> int:
    """By which whole number a picture of `size` is divided, so that KEPT_PIXELS remain."""
    return max(1, math.isqrt(size[0] * size[1] // KEPT_PIXELS))


def _reduced(picture: Image.Image, factor: int) -> Image.Image:
    """An 8-bit picture of mode L, LA, RGB, RGBA, CMYK or LAB, averaged over squares of `factor` pixels.

    It is made strip by strip, so that a large picture is never in memory twice.
    """
    width, height = picture.size
    rows = factor * max(1, STRIP_PIXELS // (width * factor))
    boxes = [(0, top, width, min(top + rows, height)) for top in range(0, height, rows)]
    white = _white(picture, boxes) if picture.mode in _WIDE_MODES else None
    reduced = None
    for box in boxes:
        strip = _plain(picture.crop(box), white)
        strip = strip.reduce(factor) if factor > 1 else strip
        if reduced is None:
            reduced = Image.new(strip.mode, (strip.width, math.ceil(height / factor)))
        reduced.paste(strip, (0, box[1] // factor))
    return reduced


def _plain(image: Image.Image, white: _White | None) -> Image.Image:
    """Mode L, LA, RGB, RGBA, CMYK or LAB, 8 bits each."""
    if white is not None:
        return white.to_grey(image)
    if image.has_transparency_data:
        return image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
    if image.mode in _PROFILE_SPACES:
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


@dataclass(frozen=True)
class _White:
    """How grey values of more than 8 bits become 8: `value` is white, or black if `inverted`."""

    value: float
    inverted: bool
    transparent: int | None

    def to_grey(self, image: Image.Image) -> Image.Image:
        values = np.asarray(image)
        grey = np.rint(np.clip(values / self.value, 0, 1) * 255).astype(np.uint8)
        result = Image.fromarray(255 - grey if self.inverted else grey)
        if self.transparent is not None:
            result.putalpha(Image.fromarray(np.where(values == self.transparent, 0, 255).astype(np.uint8)))
        return result


def _white(picture: Image.Image, boxes: list[tuple[int, int, int, int]]) -> _White:
    """The value that is white.

    Of 16-bit files it is 65535 (4095 if they say 12 bits), unless no pixel has a sixteenth of it. Of other integers it
    is the greatest value of 1, 8, 10, 12, 14, 15 or 16 bits, the fewest that hold the brightest pixel. Of floats it is
    1 if no pixel is brighter, else 255 or 65535 if the brightest pixel has at least half of it.
    Raises _Unfit for negative values, NaN, infinity, and values that fit none of these.
    """
    inverted = _tiff_tag(picture, 262, 1) == 0
    least, most = _extremes(picture, boxes)
    full = 2 ** min(_tiff_tag(picture, 258, 16), 16) - 1
    if (picture.mode.startswith("I;16") or picture.format == "PNG") and (most >= full / 16 or inverted):
        white = full
    elif picture.mode == "F":
        white = next((white for white, dim in _FLOAT_RANGES if dim <= most <= white * (1 + _OVERSHOOT)), None)
    else:
        white = next((2**bits - 1 for bits in _INTEGER_BITS if most < 2**bits), None)
    if white is None or least < (-_OVERSHOOT * white if picture.mode == "F" else 0):
        raise _Unfit(
            f"has values from {least:g} to {most:g}, of which it is not clear what is white: "
            "scale them to 0 to 1 (floats) or save it as 8-bit PNG or JPEG"
        )
    transparent = picture.info.get("transparency")
    return _White(white, inverted, transparent if isinstance(transparent, int) else None)


def _extremes(picture: Image.Image, boxes: list[tuple[int, int, int, int]]) -> tuple[float, float]:
    least, most = math.inf, -math.inf
    for box in boxes:
        values = np.asarray(picture.crop(box))
        if not np.isfinite(values).all():
            raise _Unfit("has values that are NaN or infinite: save it as PNG or JPEG")
        least, most = min(least, values.min().item()), max(most, values.max().item())
    return least, most


# Colours


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The picture in sRGB (mode RGB or RGBA) if it has a profile that can be used, else as it is."""
    try:
        if image.mode == "LAB":
            source = ImageCms.createProfile("LAB")
        elif profile:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile
        else:
            return image
        if source.xcolor_space.strip() != _PROFILE_SPACES[image.mode]:
            return image  # such as the profile of a CMYK original left in an RGB picture
        converted = ImageCms.profileToProfile(
            image.convert(image.mode.removesuffix("A")),
            ImageCms.ImageCmsProfile(source),
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except Exception as error:  # a broken profile costs the colours' exactness and not the picture
        logger.info("a colour profile is ignored: %s", error)
        return image
    if image.mode in ("LA", "RGBA"):
        converted.putalpha(image.getchannel("A"))
    return converted


def _on_white(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# Buckets


def nearest_bucket(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) of `buckets` whose printed ratio is closest to that of a picture of `size` (width, height).

    Spec section 2: a bucket's ratio is height / width rounded to two places.
    """
    width, height = size
    return min(buckets, key=lambda bucket: abs(round(bucket[0] / bucket[1], 2) - height / width))


def crop_image(image: PictureSource, buckets: Sequence[tuple[int, int]]) -> Image.Image:
    """What the model sees of a picture: scaled to cover the nearest bucket, the centre cut out (spec section 2)."""
    return _read(image, lambda upright: _cover(upright, nearest_bucket(upright.size, buckets)))


def _cover(image: Image.Image, bucket: tuple[int, int]) -> Image.Image:
    height, width = bucket
    factor = max(height / image.height, width / image.width)
    # A product that should be whole may come out a hair above it, and ceil would add a row of pixels.
    wide, high = (math.ceil(side * factor - 1e-6) for side in image.size)
    left, top = (wide - width) // 2, (high - height) // 2
    scaled = image.resize((wide, high), Image.Resampling.BICUBIC)
    return scaled.crop((left, top, left + width, top + height))


def prepare_image(image: PictureSource, buckets: Sequence[tuple[int, int]]) -> torch.Tensor:
    """A picture as one frame of video: float32, 1 3 1 H W, [-1, 1] (spec section 2). Errors as `load_image`."""
    pixels = torch.from_numpy(np.array(crop_image(image, buckets)))
    return pixels.permute(2, 0, 1)[None, :, None].float() / 127.5 - 1


def to_uint8(video: torch.Tensor) -> np.ndarray:
    """Video 1 3 T H W in [-1, 1] as frames: uint8, T H W 3."""
    if video.ndim != 5 or video.shape[:2] != (1, 3):
        raise ValueError(f"video is 1 3 T H W, not {tuple(video.shape)}")
    pixels = (video[0].float().clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).contiguous().cpu().numpy()
