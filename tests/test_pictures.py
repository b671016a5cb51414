"""Pictures in: every kind of picture is read as a person sees it, and what is none is refused."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from infworld import pictures
from infworld.config import RELEASED_BUCKETS


def gradient(width=64, height=48, channels=3):
    """A smooth picture with another value in every corner and channel."""
    y, x = np.mgrid[0:height, 0:width]
    layers = [x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 90)]
    return np.stack((layers + [255 - layers[0]])[:channels], axis=-1).astype(np.uint8)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_a_picture_reads_the_same_from_every_source(tmp_path):
    pixels = gradient()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for source in (pixels, Image.fromarray(pixels), tmp_path / "a.png", str(tmp_path / "a.png")):
        assert np.array_equal(np.array(pictures.load_image(source)), pixels)


def test_transparent_parts_become_white():
    pixels = np.dstack([gradient(), np.full((48, 64), 255, np.uint8)])
    pixels[:10, :, 3] = 0
    read = np.array(pictures.load_image(pixels))
    assert (read[:10] == 255).all()
    assert np.array_equal(read[10:], pixels[10:, :, :3])


def test_a_palette_with_transparency_becomes_white():
    image = Image.fromarray(gradient()).quantize(8)
    image.info["transparency"] = image.getpixel((0, 0))
    assert pictures.load_image(image).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled(tmp_path):
    grey = gradient()[..., 0]
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    for source in (tmp_path / "grey16.png", grey.astype(np.uint16) * 257):
        read = np.array(pictures.load_image(source))
        assert np.array_equal(read, np.repeat(grey[..., None], 3, axis=2))


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    upright = Image.fromarray(gradient())
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.array(pictures.load_image(tmp_path / "turned.png")), gradient())


@pytest.mark.parametrize("mode", ["L", "LA", "CMYK", "1", "F", "P", "YCbCr"])
def test_other_modes_become_rgb(mode):
    read = pictures.load_image(Image.fromarray(gradient()).convert(mode))
    assert read.mode == "RGB" and read.size == (64, 48)


@pytest.mark.parametrize("size", [(1, 1), (15, 300), (300, 15), (20_000, 40), (40, 20_000), (9000, 9000)])
def test_a_picture_of_useless_size_is_refused_with_its_size(tmp_path, size):
    Image.new("1", size).save(tmp_path / "size.png")
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels"):
        pictures.load_image(tmp_path / "size.png")
    assert pictures.load_image(Image.new("RGB", (16, 16))).size == (16, 16)


def test_a_decompression_bomb_is_refused_without_decoding(tmp_path, monkeypatch):
    data = bytearray(png(Image.new("1", (64, 64))))
    data[16:24] = (60_000).to_bytes(4, "big") * 2  # the header now claims 3.6 gigapixels
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(data)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="too large|60000 x 60000"):
        pictures.load_image(tmp_path / "bomb.png")


def test_an_unreadable_picture_is_named(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(png(Image.fromarray(gradient(300, 300)))[:900])
    for name in ("text.png", "cut.png"):
        with pytest.raises(ValueError, match=name):
            pictures.load_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="gone.png"):
        pictures.load_image(tmp_path / "gone.png")


@pytest.mark.parametrize(
    "bad", [None, 3, [[1]], np.zeros((4, 4, 7), np.uint8), np.zeros((32, 32, 3)), np.zeros((0, 9, 3))]
)
def test_what_is_no_picture_is_refused(bad):
    with pytest.raises(ValueError):
        pictures.load_image(bad)


# ------------------------------------------------------------------------------------------------- buckets and tensors


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((1920, 1080), (576, 704)), ((1600, 800), (448, 896)), ((100, 100), (640, 640)), ((100, 1000), (1280, 320)),
     ((1000, 100), (320, 1216)), ((1000, 1900), (832, 448))],
)  # fmt: skip
def test_the_bucket_of_the_nearest_printed_ratio_is_chosen(size, bucket):
    printed = [0.26, 0.38, 0.5, 0.67, 0.82, 1.0, 1.22, 1.5, 1.86, 2.0, 2.5, 2.83, 3.6, 3.8, 4.0]
    keys = dict(zip(printed, RELEASED_BUCKETS, strict=True))
    expected = keys[min(printed, key=lambda key: abs(key - size[1] / size[0]))]
    assert pictures.nearest_bucket(size, RELEASED_BUCKETS) == expected
    if size != (1920, 1080):
        assert expected == bucket


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (640, 37), (37, 640), (131, 99), (16, 16), (1217, 321)])
def test_the_crop_fills_the_bucket_and_keeps_the_centre(size):
    pixels = gradient(*size)
    bucket = pictures.nearest_bucket(size, RELEASED_BUCKETS)
    cropped = pictures.crop_image(pixels, RELEASED_BUCKETS)
    assert (cropped.height, cropped.width) == bucket
    centre = np.array(cropped, float)[bucket[0] // 2 - 1 : bucket[0] // 2 + 1, bucket[1] // 2 - 1 : bucket[1] // 2 + 1]
    assert abs(centre.mean((0, 1)) - (127.5, 127.5, 90)).max() < 10


def test_a_picture_of_the_buckets_size_is_not_touched():
    pixels = gradient(48, 32)
    tensor = pictures.prepare_image(pixels, [(32, 48), (48, 32)])
    assert tensor.shape == (1, 3, 1, 32, 48) and tensor.dtype == torch.float32
    assert tensor.min() == -1 and tensor.max() == 1
    assert np.array_equal(pictures.to_uint8(tensor)[0], pixels)


def test_to_uint8_rounds_and_clamps():
    values = torch.tensor([-2.0, -1.0, -0.999, 0.0, 1.0, 5.0]).expand(1, 3, 1, 2, 6)
    assert pictures.to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 0, 128, 255, 255]
    with pytest.raises(ValueError, match="1 3 T H W"):
        pictures.to_uint8(torch.zeros(2, 3, 1, 4, 4))
