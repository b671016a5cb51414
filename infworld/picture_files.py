"""Picture files: which formats are opened, their orientation, and files with broken metadata. Knows no models.

Metadata never costs the picture: a file that Pillow gives up is tried again without it.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

# Nothing else is opened, whatever Pillow can do: EPS would run Ghostscript, and the rare formats raise what they like.
# AVIF is read where Pillow was built with it (11.3 and later are).
Image.init()
FORMATS = tuple(name for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF") if name in Image.OPEN)
FORMAT_NAMES = "PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # of the pictures in a folder of cases or examples

_ORIENTATION = 0x0112
_EXIF = b"Exif\0\0"
_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}  # struct's letters for the integer types of EXIF

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")  # Pillow parses eXIf only when it is asked for
_JPEG_STRUCTURE = (0xE0, 0xEE)  # JFIF, and Adobe's segment that says how colours are stored
_TIFF_PIXELS = {
    *(256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 338, 339),
    *(_ORIENTATION, 347, 512, 513, 514, 519, 520, 521, 529, 530, 531, 532, 34675),
}


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of a picture, 1 to 8; 1 if there is none that can be read."""
    # An AVIF's own orientation counts and not that of its EXIF block; Pillow tells it as if it were EXIF.
    found = None if image.format == "AVIF" else _exif_orientation(image.info.get("exif"))
    try:
        found = found or image.getexif().get(_ORIENTATION)  # also of TIFF, XMP and PNG texts
        return int(found) if found in range(1, 9) else 1
    except Exception:  # Pillow's parser of EXIF raises many kinds of errors
        return 1


def _exif_orientation(exif: object) -> int | None:
    """The orientation in an EXIF block, by its first directory alone; None if it is not there or makes no sense."""
    if not isinstance(exif, bytes):
        return None
    tiff = exif.removeprefix(_EXIF)
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, numbers = struct.unpack_from(f"{order}HHI", tiff, entry)
            if tag == _ORIENTATION and kind in _INTEGERS and numbers == 1:
                (value,) = struct.unpack_from(order + _INTEGERS[kind], tiff, entry + 8)
                if 1 <= value <= 8:
                    return value
    except struct.error:  # ends early, or is no EXIF at all
        pass
    return None


def without_metadata(data: bytes) -> Iterator[bytes]:
    """The same picture with less and less beside its pixels: never without its orientation, at last without profile."""
    if data.startswith(_PNG):
        yield _bare_png(data, (*_PNG_PIXELS, b"iCCP"))
        yield _bare_png(data, _PNG_PIXELS)
    elif data.startswith(b"\xff\xd8"):
        yield _bare_jpeg(data, profile=True)
        yield _bare_jpeg(data, profile=False)
    elif data[:4] in (b"II*\0", b"MM\0*"):
        yield _bare_tiff(data)
    elif data[4:8] == b"ftyp":
        # The item's type becomes one that nobody reads; AVIF has the orientation outside of its EXIF block.
        yield re.sub(rb"(infe.{8})Exif", rb"\1none", data, flags=re.DOTALL)


def _bare_png(data: bytes, kept: tuple[bytes, ...]) -> bytes:
    parts, position = [_PNG], len(_PNG)
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind, end = data[position + 4 : position + 8], position + 12 + length
        if kind in (b"iCCP", b"eXIf") and kind in kept:  # wrong checksums of these are no reason to refuse the picture
            body = data[position + 4 : end - 4]
            parts.append(data[position : position + 4] + body + struct.pack(">I", zlib.crc32(body)))
        elif kind in kept:
            parts.append(data[position:end])
        position = end
    return b"".join(parts)


def _bare_jpeg(data: bytes, profile: bool) -> bytes:
    parts, position = [data[:2]], 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, end = data[position + 1], position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xFF:  # a byte that fills up
            position += 1
            continue
        if marker == 0xDA:  # from here on, pixels
            break
        body = data[position + 4 : end]
        metadata = (0xE0 <= marker <= 0xEF and marker not in _JPEG_STRUCTURE) or marker == 0xFE
        if not metadata or (profile and body.startswith(b"ICC_PROFILE\0")):
            parts.append(data[position:end])
        elif value := _exif_orientation(body):
            clean = _EXIF + struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, _ORIENTATION, 3, 1, value, 0, 0)
            parts.append(b"\xff\xe1" + struct.pack(">H", 2 + len(clean)) + clean)
        position = end
    return b"".join([*parts, data[position:]])


def _bare_tiff(data: bytes) -> bytes:
    """With the entries of the first directory that pixels need, and no second one."""
    order = "<" if data[:2] == b"II" else ">"
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        entries = [data[at : at + 12] for at in range(start + 2, start + 2 + 12 * count, 12)]
        kept = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] in _TIFF_PIXELS]
    except struct.error:
        return data
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    return data[:start] + directory + data[start + len(directory) :]
