"""Pictures from strangers: colours as a person sees them, broken metadata ignored, a clear refusal, bounded memory."""

import io
import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from infworld.pictures import crop_image, load_image

CASES = Path(__file__).parent / "cases"
ROOT = Path(__file__).parent.parent
needs_avif = pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
SMALL = np.stack([*np.meshgrid(np.arange(80) * 3, np.arange(60) * 4), np.full((60, 80), 90)], -1).astype(np.uint8)


def read(path) -> np.ndarray:
    return np.asarray(load_image(path)).astype(int)


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


# Colours, against formulas of the colour spaces

TO_XYZ_D65 = {  # ITU-R BT.709, SMPTE EG 432-1 and Adobe RGB (1998), from their primaries
    "srgb": [[0.41239, 0.35758, 0.18048], [0.21264, 0.71517, 0.07219], [0.01933, 0.11919, 0.95053]],
    "p3": [[0.48657, 0.26567, 0.19822], [0.22897, 0.69174, 0.07929], [0.0, 0.04511, 1.04394]],
    "adobe": [[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]],
}
D50_TO_D65 = [[0.95557, -0.02304, 0.06316], [-0.02829, 1.00994, 0.02101], [0.01231, -0.02048, 1.32991]]  # Bradford


def srgb_from_xyz(xyz):
    linear = np.clip(xyz @ np.linalg.inv(TO_XYZ_D65["srgb"]).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def tag_bytes(tags: dict[bytes, bytes], space: bytes, pcs: bytes, kind: bytes = b"prtr") -> bytes:
    """An ICC profile of version 2.4 with these tags."""
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    header = struct.pack(">I4sI4s4s4s12x4s", start + len(body), b"lcms", 0x02400000, kind, space, pcs, b"acsp")
    header += bytes(28) + struct.pack(">iii", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def grey_profile(gamma: float) -> bytes:
    white = b"XYZ \0\0\0\0" + struct.pack(">iii", 63190, 65536, 54061)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    return tag_bytes({b"wtpt": white, b"kTRC": curve}, b"GRAY", b"XYZ ", b"mntr")


LAB_OF_INKS = [[-25, -40, -30], [-30, 50, -10], [-5, -10, 40], [-40, 0, 0]]  # what C, M, Y, K add to L 100, a 0, b 0


def cmyk_profile() -> bytes:
    """Its table has the corners of an affine map, so that every way to interpolate gives the same."""
    corners = [[c, m, y, k] for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    lab = [100, 0, 0] + np.array(corners) @ LAB_OF_INKS
    table = np.stack([lab[:, 0] * 2.55, lab[:, 1] + 128, lab[:, 2] + 128], -1).round().astype(np.uint8).tobytes()
    head = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(np.eye(3).ravel() * 65536).astype(int))
    ramp = bytes(range(256))
    return tag_bytes({b"A2B0": head + ramp * 4 + table + ramp * 3}, b"CMYK", b"Lab ")


@pytest.mark.parametrize(("name", "space"), [("wide-gamut-p3.jpg", "p3"), ("wide-gamut-adobe.png", "adobe")])
def test_wide_gamut_colours_become_srgb(name, space):
    with Image.open(CASES / name) as picture:
        stored = np.asarray(picture) / 255
    expected = srgb_from_xyz(stored ** (563 / 256) @ np.array(TO_XYZ_D65[space]).T)
    assert np.abs(expected - stored * 255).max() > 15
    assert np.abs(read(CASES / name) - expected).max() <= 2


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("turned", [False, True])
def test_grey_with_a_profile_becomes_srgb(tmp_path, bits, turned):
    ramp = np.tile(np.arange(256), (32, 1))
    picture = Image.fromarray((ramp * 257).astype(np.uint16) if bits == 16 else ramp.astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    picture.save(tmp_path / "grey.png", icc_profile=grey_profile(1.5), exif=exif)
    linear = (ramp / 255) ** 1.5
    expected = 255 * np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    expected = np.rot90(expected, -1) if turned else expected
    assert np.abs(read(tmp_path / "grey.png") - expected[..., None]).max() <= 2


@pytest.mark.parametrize("name", ["ink.jpg", "ink.tif"])
def test_cmyk_with_a_profile_becomes_srgb(tmp_path, name):
    inks = np.zeros((32, 96, 4), np.uint8)
    inks[:, :32], inks[:, 32:64], inks[:, 64:] = (80, 30, 60, 20), (20, 100, 120, 90), (0, 0, 0, 128)
    options = {"quality": 100} if name == "ink.jpg" else {}
    Image.fromarray(inks, "CMYK").save(tmp_path / name, icc_profile=cmyk_profile(), **options)
    lab = [100, 0, 0] + inks / 255 @ np.array(LAB_OF_INKS)
    f = np.stack([(lab[..., 0] + 16) / 116 + lab[..., 1] / 500, (lab[..., 0] + 16) / 116,
                  (lab[..., 0] + 16) / 116 - lab[..., 2] / 200], -1)  # fmt: skip
    xyz = np.where(f > 6 / 29, f**3, (f - 4 / 29) * 3 * (6 / 29) ** 2) * [0.9642, 1, 0.8249]
    expected = srgb_from_xyz(xyz @ np.array(D50_TO_D65).T)
    difference = np.abs(read(tmp_path / name) - expected)
    assert difference[:, 8:24].max() <= 4 and difference[:, 40:56].max() <= 4 and difference[:, 72:88].max() <= 4


def test_transparent_and_palette_pictures_are_converted_too(tmp_path):
    with Image.open(CASES / "wide-gamut-adobe.png") as picture:
        profile = picture.info["icc_profile"]
    plain = Image.new("RGB", (32, 32), (200, 120, 60))
    plain.save(tmp_path / "rgb.png", icc_profile=profile)
    plain.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "p.png", icc_profile=profile)
    plain.putalpha(Image.linear_gradient("L").resize((32, 32)))
    plain.save(tmp_path / "rgba.png", icc_profile=profile)
    colour = read(tmp_path / "rgb.png")[0, 0]
    assert np.abs(colour - [200, 120, 60]).max() > 10
    assert np.abs(read(tmp_path / "p.png") - colour).max() <= 1
    alpha = np.asarray(plain.getchannel("A"))[..., None] / 255
    assert np.abs(read(tmp_path / "rgba.png") - (alpha * colour + (1 - alpha) * 255)).max() <= 2


@pytest.mark.parametrize("profile", [b"x", bytes(200), cmyk_profile(), grey_profile(2.2), grey_profile(2.2)[:150]])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_profile_that_is_broken_or_of_another_space_is_ignored(tmp_path, profile, kind):
    path = tmp_path / f"picture.{kind.lower()}"
    options = {"lossless": True} if kind == "WEBP" else {}
    path.write_bytes(encoded(Image.fromarray(SMALL), kind, icc_profile=profile, **options))
    assert np.abs(read(path) - SMALL).max() <= (20 if kind == "JPEG" else 0)


@needs_avif
def test_ten_bits_become_eight():
    y, x = np.mgrid[0:64, 0:96]
    expected = np.stack([x * 600, y * 900, np.full_like(x, 23130)], -1) / 257
    assert np.abs(read(CASES / "ten-bit.avif") - expected).max() <= 4


# Values of more than 8 bits


@pytest.mark.parametrize("name", ["float-0-to-1.tif", "int32-0-to-255.tif"])
def test_values_of_other_types_are_scaled(name):
    with Image.open(CASES / name) as picture:
        values = np.asarray(picture).astype(float)
    expected = np.rint(values * (255 if values.max() <= 1 else 1))
    assert expected.max() > 200
    assert np.abs(read(CASES / name) - expected[..., None]).max() <= 1


RAMP = np.tile(np.arange(256), (32, 1)) / 255


@pytest.mark.parametrize(
    ("values", "white"),
    [
        (RAMP.astype(np.float32), 1),
        ((RAMP * 1.0005).astype(np.float32), 1),
        ((RAMP * 255).astype(np.float32), 255),
        ((RAMP * 200.7).astype(np.float32), 255),
        ((RAMP * 65535).astype(np.float32), 65535),
        *(((RAMP * (2**bits - 1)).astype(np.int32), 2**bits - 1) for bits in (8, 10, 12, 14, 15, 16)),
        *(((RAMP * (2**bits - 1)).astype(np.uint16), 2**bits - 1) for bits in (8, 10, 12, 16)),
        ((RAMP * 20000).astype(np.uint16), 65535),
        ((RAMP > 0.5).astype(np.int32), 1),
    ],
)
def test_grey_of_more_than_eight_bits_is_scaled_by_its_white(tmp_path, values, white):
    Image.fromarray(values).save(tmp_path / "grey.tif")
    expected = np.clip(values.astype(float) / white, 0, 1) * 255
    assert np.abs(read(tmp_path / "grey.tif") - expected[..., None]).max() <= 0.51


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1.0, 7.0, 1e30])
def test_values_without_a_white_are_refused(tmp_path, bad):
    values = RAMP.astype(np.float32)
    values[5, 5] = bad
    Image.fromarray(values).save(tmp_path / "grey.tif")
    with pytest.raises(ValueError, match=r"grey\.tif.*(NaN or infinite|not clear what is white)"):
        load_image(tmp_path / "grey.tif")
    for values in (np.full((32, 32), 2**30), RAMP * 255 - 100):
        Image.fromarray(values.astype(np.int32)).save(tmp_path / "grey.tif")
        with pytest.raises(ValueError, match="not clear what is white"):
            load_image(tmp_path / "grey.tif")


def tiff(entries: list[tuple[int, int, int, int]], pixels: bytes) -> bytes:
    start = 8 + 2 + 12 * (len(entries) + 1) + 4
    directory = b"".join(struct.pack("<HHII", *entry) for entry in sorted([*entries, (273, 4, 1, start)]))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries) + 1) + directory + bytes(4) + pixels


def test_twelve_bit_and_white_is_zero_tiffs_have_the_right_white(tmp_path):
    values = np.rint(RAMP * 4095).astype(int).ravel()
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in values.reshape(-1, 2).tolist())
    size = [(256, 3, 1, 256), (257, 3, 1, 32), (259, 3, 1, 1), (278, 3, 1, 32)]
    (tmp_path / "12.tif").write_bytes(tiff([*size, (258, 3, 1, 12), (262, 3, 1, 1), (279, 4, 1, len(packed))], packed))
    assert np.abs(read(tmp_path / "12.tif") - RAMP[..., None] * 255).max() <= 1
    wide = np.rint((1 - RAMP) * 65535).astype("<u2").tobytes()
    (tmp_path / "0.tif").write_bytes(tiff([*size, (258, 3, 1, 16), (262, 3, 1, 0), (279, 4, 1, len(wide))], wide))
    assert np.abs(read(tmp_path / "0.tif") - RAMP[..., None] * 255).max() <= 1


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16-bit values, H W C: grey with alpha, RGB or RGBA."""
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def deep_tiff(values: np.ndarray) -> bytes:
    """An uncompressed TIFF of 16-bit RGB values."""
    height, width, channels = values.shape
    pixels = values.astype("<u2").tobytes()
    sizes = [(256, 3, 1, width), (257, 3, 1, height), (278, 3, 1, height), (279, 4, 1, len(pixels))]
    entries = [*sizes, (259, 3, 1, 1), (262, 3, 1, 2), (277, 3, 1, channels)]
    bits = 8 + 2 + 12 * (len(entries) + 2) + 4 + len(pixels)
    return tiff([*entries, (258, 3, channels, bits)], pixels + struct.pack("<3H", 16, 16, 16))


def deep_array(values: np.ndarray) -> np.ndarray:
    return values.astype(np.uint16)


@pytest.mark.parametrize(
    ("write", "channels"), [(deep_png, 2), (deep_png, 3), (deep_png, 4), (deep_tiff, 3), (deep_array, 3)]
)
def test_colours_of_sixteen_bits_become_eight_or_are_refused(tmp_path, write, channels):
    y, x = np.mgrid[0:64, 0:96]
    values = np.stack([x * 680, y * 1000, x * 300 + y, np.full_like(x, 65535)], -1)[
        ..., [0, 3] if channels == 2 else range(channels)
    ]
    values[..., 3:] = 65535

    def source(values):
        made = write(values)
        if isinstance(made, bytes):
            (tmp_path / "deep").write_bytes(made)
            return tmp_path / "deep"
        return made

    colours = values[..., :1] if channels == 2 else values[..., :3]
    assert np.abs(read(source(values)) - colours / 257).max() <= 1
    values[..., : colours.shape[-1]] //= 17  # as from a camera of 12 bits
    with pytest.raises(ValueError, match="16-bit colours of which none"):
        load_image(source(values))


# Metadata


def exif(*entries: tuple[int, int, int, bytes], order: str = "<", start: int = 8, follows: int = 0) -> bytes:
    """An EXIF block of (tag, type, count, value or offset), with some rationals at its end."""
    body = struct.pack(order + "H", len(entries))
    for tag, kind, count, value in entries:
        body += struct.pack(order + "HHI", tag, kind, count) + value.ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, start)
    return b"Exif\0\0" + head + body + struct.pack(order + "I", follows) + struct.pack(order + "4i", -72, 1, 7, 0) * 2


UP = (0x0112, 3, 1, b"\x06\0")
AT = struct.pack("<I", 38)
TURNED = {
    "plain": exif(UP),
    "big-endian": exif((0x0112, 3, 1, b"\0\x06"), order=">"),
    "long": exif((0x0112, 4, 1, b"\x06")),
    "next directory is itself": exif(UP, follows=8),
    "own directories are itself": exif(UP, *((tag, 4, 1, b"\x08") for tag in (0x8769, 0x8825, 0xA005, 0x014A))),
    "no text": exif((0x010F, 2, 4, b"\xe9\xff\xfe"), UP),
    "huge count": exif((0x010F, 2, 0xFFFFFFFF, AT), UP),
    "unsorted": exif((0x011A, 5, 1, b""), UP),
    "wrong first": exif((0x0112, 3, 1, b"\x63"), UP),
    "more entries than there are": b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + exif(UP)[16:],
    **{f"resolution of type {kind}": exif(UP, (0x011A, kind, 1, AT), (0x0128, 3, 1, b"\x02")) for kind in range(15)},
    **{f"unit of type {kind}": exif(UP, (0x011A, 5, 1, AT), (0x0128, kind, 1, b"\x02")) for kind in range(15)},
    **{f"first of type {kind}": exif((0x010F, kind, 1, AT), UP) for kind in range(15)},
    **{f"directory of type {kind}": exif(UP, (0x8769, kind, 1, b"\x08")) for kind in range(15)},
}
UNTURNED = {
    "text": exif((0x0112, 2, 2, b"6")),
    "float": exif((0x0112, 11, 1, struct.pack("<f", 99.0))),
    "99": exif((0x0112, 3, 1, b"\x63")),
    "0": exif((0x0112, 3, 1, b"")),
    "many": exif((0x0112, 3, 0x7FFFFFFF, b"\x06")),
    "starts behind its end": exif(UP, start=0x7FFFFFFF),
    "nothing": b"Exif\0\0",
    "cut": exif(UP)[:12],
    "no order": b"Exif\0\0XX" + exif(UP)[8:],
    "garbage": b"Exif\0\0" + bytes(range(256)),
}


def with_exif(kind: str, block: bytes) -> bytes:
    """SMALL as a file whose EXIF is these bytes, put in place by hand, as Pillow would not write them."""
    picture = Image.fromarray(SMALL)
    if kind == "JPEG":
        data = encoded(picture, kind, quality=95)
        return data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(block)) + block + data[2:]
    if kind == "PNG":
        data, chunk = encoded(picture, kind), b"eXIf" + block.removeprefix(b"Exif\0\0")
        return data[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
    if kind == "WEBP":
        data = encoded(picture, kind, lossless=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")
        data = data[: data.index(b"EXIF") + 4] + struct.pack("<I", len(block)) + block + bytes(len(block) % 2)
        return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]
    place = Image.Exif()  # AVIF: the block takes the place of a long maker's name
    place[0x010F], place[0x0112] = "M" * 500, 6
    data = encoded(picture, kind, quality=95, exif=place.tobytes())
    end = data.index(b"M" * 499) + 490
    begin = max(data.rfind(b"MM\0*", 0, end), data.rfind(b"II*\0", 0, end))
    return data[:begin] + block.removeprefix(b"Exif\0\0").ljust(end - begin, b"\0") + data[end:]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", pytest.param("AVIF", marks=needs_avif)])
def test_odd_exif_never_costs_the_picture(tmp_path, kind):
    """The orientation counts if it can be read. An AVIF has it outside of its EXIF block, where nothing is odd."""
    path = tmp_path / f"odd.{kind.lower()}"
    for name, block in {**TURNED, **UNTURNED}.items():
        path.write_bytes(with_exif(kind, block))
        found = read(path)
        expected = np.rot90(SMALL, -1) if name in TURNED or kind == "AVIF" else SMALL
        assert found.shape == expected.shape, name
        assert np.abs(found - expected).mean() < 6, name


@pytest.mark.parametrize("name", ["exif-ok.jpg", "exif-signed-rational.jpg", "exif-resolution-as-text.jpg"])
def test_photos_with_odd_exif_are_upright(name):
    with Image.open(CASES / "exif-ok.jpg") as picture:
        expected = np.rot90(np.asarray(picture).astype(int), -1)
    assert np.array_equal(read(CASES / name), expected)


def test_other_broken_metadata_is_left_out(tmp_path):
    data = encoded(Image.fromarray(SMALL), "PNG", icc_profile=grey_profile(2))
    huge = b"zTXtworkflow\0\0" + zlib.compress(bytes(2_000_000))
    chunks = [struct.pack(">I", len(huge) - 4) + huge + struct.pack(">I", zlib.crc32(huge)), b"\0\0\0\2tEXta\0bad!"]
    for chunk in chunks:
        for place in (33, len(data) - 12):
            (tmp_path / "a.png").write_bytes(data[:place] + chunk + data[place:])
            assert np.array_equal(read(tmp_path / "a.png"), SMALL)
    size = [(256, 3, 1, 80), (257, 3, 1, 60), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (278, 3, 1, 60)]
    for odd in ((282, 2, 4, 0x373737), (296, 2, 4, 0x373737), (34665, 3, 1, 8), (700, 10, 1, 99), (282, 10, 1, 8)):
        grey = SMALL[..., 0].tobytes()
        (tmp_path / "a.tif").write_bytes(
            tiff([*size, (279, 4, 1, len(grey)), odd, (274, 3, 1, 6), (296, 3, 1, 3)], grey)
        )
        assert np.array_equal(read(tmp_path / "a.tif")[..., 0], np.rot90(SMALL[..., 0], -1)), odd


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_tiff_is_upright(tmp_path, turn, compression):
    stored = Image.fromarray(SMALL)
    stored.save(tmp_path / "a.tif", exif=exif((0x0112, 3, 1, bytes([turn]))), compression=compression)
    expected = SMALL if turn in (1, 2, 3, 4) else SMALL.transpose(1, 0, 2)
    flips = {2: np.s_[:, ::-1], 3: np.s_[::-1, ::-1], 4: np.s_[::-1]}
    flips |= {6: flips[2], 7: flips[3], 8: flips[4]}
    assert np.array_equal(read(tmp_path / "a.tif"), expected[flips[turn]] if turn in flips else expected)


# Refusals


@pytest.mark.parametrize("kind", ["EPS", "PPM", "TGA", "ICO", "DDS", "QOI", "PCX", "SGI", "IM", "JPEG2000", "PDF"])
def test_only_the_named_formats_are_opened(tmp_path, kind, monkeypatch):
    """Whatever the name says, and nothing is run: an EPS would be given to Ghostscript."""
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}:{os.environ['PATH']}")
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(SMALL), kind))
    with pytest.raises(ValueError, match=r"a\.png' is not a picture that can be read: use PNG, JPEG, WebP"):
        load_image(tmp_path / "a.png")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", pytest.param("AVIF", marks=needs_avif)])
def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path, kind):
    rolls = random.Random(kind)
    options = {"icc_profile": grey_profile(2)} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    whole = encoded(Image.fromarray(SMALL), kind, **options)
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rolls.randrange(1, 6)):
            data[rolls.randrange(min(len(data), 400))] = rolls.randrange(256)
        (tmp_path / "a").write_bytes(data[: rolls.choice([len(data), rolls.randrange(len(data))])])
        try:
            assert load_image(tmp_path / "a").mode == "RGB"
        except ValueError as error:
            assert str(error).startswith("the picture 'a' ") and "\n" not in str(error)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", pytest.param("AVIF", marks=needs_avif)])
def test_of_an_animation_the_first_frame_counts(tmp_path, kind):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ((200, 40, 40), (40, 40, 200))]
    (tmp_path / "a").write_bytes(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert np.abs(read(tmp_path / "a") - (200, 40, 40)).max() <= 6


def test_files_that_only_unfold_are_refused(tmp_path):
    scans = encoded(Image.fromarray(SMALL), "JPEG", progressive=True)
    last = scans.rindex(b"\xff\xda")
    (tmp_path / "a.jpg").write_bytes(scans[:-2] + scans[last:-2] * 200 + b"\xff\xd9")
    with pytest.raises(ValueError, match="more than 100 scans"):
        load_image(tmp_path / "a.jpg")
    size = [(256, 3, 1, 80), (257, 3, 1, 60), (258, 3, 1, 8), (259, 3, 1, 5), (262, 3, 1, 1)]
    (tmp_path / "a.tif").write_bytes(tiff([*size, (322, 4, 1, 60000), (323, 4, 1, 60000)], bytes(99)))
    with pytest.raises(ValueError, match=r"tiles of 3,600,000,000 pixels"):
        load_image(tmp_path / "a.tif")


# Memory


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_a_large_picture_looks_as_its_small_version(tmp_path, kind):
    large = Image.fromarray(SMALL).resize((8000, 6000), Image.Resampling.BICUBIC)
    (tmp_path / "a").write_bytes(encoded(large, kind, **({"compress_level": 1} if kind == "PNG" else {})))
    whole = load_image(tmp_path / "a")
    assert 6e6 <= whole.width * whole.height <= 24e6 and whole.width * 6 == whole.height * 8
    difference = np.asarray(crop_image(tmp_path / "a", [(60, 80)])).astype(int) - SMALL
    assert np.abs(difference)[4:-4, 4:-4].mean() < 2


UNFOLDING = """
import sys, threading, time
from infworld.pictures import crop_image

def held():  # MB of this process's own
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def watch():
    global most
    while True:
        most = max(most, held())
        time.sleep(0.005)

crop_image("small.png", [(96, 128)])
before = most = held()
threading.Thread(target=watch, daemon=True).start()
readers = [threading.Thread(target=crop_image, args=("large.png", [(96, 128)])) for _ in range(8)]
for reader in readers:
    reader.start()
for reader in readers:
    reader.join()
print(most - before)
"""


def test_a_webp_has_fewer_pixels_since_it_cannot_be_decoded_at_reduced_size(tmp_path, monkeypatch):
    monkeypatch.setattr("infworld.pictures.MAX_WEBP_PIXELS", 40 * 30)
    for name in ("a.webp", "a.png"):
        Image.new("RGB", (40, 30), (200, 120, 60)).save(tmp_path / name)
        assert load_image(tmp_path / name).size == (40, 30)
        Image.new("RGB", (41, 30), (200, 120, 60)).save(tmp_path / name)
    assert load_image(tmp_path / "a.png").size == (41, 30)
    with pytest.raises(ValueError, match=r"a\.webp.*WebP of more than"):
        load_image(tmp_path / "a.webp")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of memory")
def test_many_large_pictures_at_once_take_the_memory_of_one(tmp_path):
    """64 megapixels are 256 MB when they are decoded; eight at a time were 2.9 GB."""
    Image.fromarray(SMALL).save(tmp_path / "small.png")
    Image.new("L", (8000, 8000), 99).save(tmp_path / "grey.png")
    with Image.open(tmp_path / "grey.png") as grey:
        grey.convert("RGB").save(tmp_path / "large.png", compress_level=1)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", UNFOLDING], check=True, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert float(done.stdout) < 600
