"""Films of every kind become upright frames at an even rate; damaged ones say what is wrong."""

from __future__ import annotations

import subprocess
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorTrc
from imageio_ffmpeg import get_ffmpeg_exe

from infworld.video import write_mp4
from infworld.videos.reading import at_rate, frames, open_film, to_sdr
from infworld.videos.shots import find_cuts, find_shots, scan

RED, BLUE, GREEN, WHITE = (200, 40, 30), (30, 60, 220), (20, 180, 40), (245, 245, 245)


def corners(count: int = 30, height: int = 64, width: int = 96) -> np.ndarray:
    """Frames with another colour in each quarter: red, blue; green, white."""
    picture = np.zeros((height, width, 3), np.uint8)
    for row, column, colour in ((0, 0, RED), (0, 1, BLUE), (1, 0, GREEN), (1, 1, WHITE)):
        picture[row * height // 2 :, column * width // 2 :] = colour
    return np.repeat(picture[None], count, 0)


def ramp(count: int) -> np.ndarray:
    """Frames that become brighter, by 4 each."""
    return np.broadcast_to((4 * np.arange(count, dtype=np.uint8))[:, None, None, None], (count, 32, 48, 3)).copy()


def ffmpeg(*arguments: object) -> None:
    subprocess.run([get_ffmpeg_exe(), "-y", "-loglevel", "error", *map(str, arguments)], check=True)


def seen(path: Path) -> np.ndarray:
    film = open_film(path)
    return np.stack([shown.picture for shown in at_rate(frames(film, film.size), 30)])


def close(pixel: np.ndarray, colour: tuple[int, int, int], by: int = 6) -> bool:
    return bool(np.abs(pixel.astype(int) - colour).max() <= by)


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        (0, (RED, BLUE, GREEN, WHITE)),
        (90, (BLUE, WHITE, RED, GREEN)),
        (180, (WHITE, GREEN, BLUE, RED)),
        (270, (GREEN, RED, WHITE, BLUE)),
    ],
)
def test_a_rotation_flag_is_obeyed(tmp_path, degrees, expected):
    write_mp4(tmp_path / "flat.mp4", corners())
    ffmpeg("-display_rotation", degrees, "-i", tmp_path / "flat.mp4", "-c", "copy", tmp_path / "film.mp4")
    film, picture = open_film(tmp_path / "film.mp4"), seen(tmp_path / "film.mp4")[0]
    assert picture.shape == (*film.size, 3) == ((96, 64, 3) if degrees % 180 else (64, 96, 3))
    found = [picture[row, column] for row in (8, -8) for column in (8, -8)]
    assert all(close(pixel, colour) for pixel, colour in zip(found, expected, strict=True)), found


@pytest.mark.parametrize("fps", [10, 24, 30, 60])
def test_any_rate_becomes_thirty_a_second(tmp_path, fps):
    write_mp4(tmp_path / "film.mp4", ramp(2 * fps if fps < 60 else 60), fps=fps)
    brightness = seen(tmp_path / "film.mp4").mean((1, 2, 3))
    seconds = 2 if fps < 60 else 1
    assert abs(len(brightness) - 30 * seconds) <= max(1, 30 / fps - 1)  # the last frame is shown for a 30th second
    shown = 4 * np.rint(np.arange(len(brightness)) * fps / 30)
    assert np.abs(brightness - shown).max() <= 4 * max(1, fps / 30) * 0.5 + 3


def test_frames_of_an_uneven_rate_are_shown_at_their_times(tmp_path):
    times = [0, 10, 20, 100, 110, 400, 410]  # hundredths of a second
    with av.open(str(tmp_path / "film.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=100, width=48, height=32, pix_fmt="yuv420p")
        stream.time_base = Fraction(1, 100)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 30 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    film = open_film(tmp_path / "film.mkv")
    shown = list(at_rate(frames(film, film.size), 30))
    assert abs(shown[30].time - 1.0) < 0.002 and abs(shown[45].time - 1.1) < 0.002
    found = scan(film, tmp_path, lambda count: None)
    assert not found.lost[:6].any() and found.lost[12:24].all() and found.lost[40:100].all()
    (begin, end), (again, last) = find_shots(found)  # a pause of three seconds parts it
    assert begin == 0 and end < 60 < again < 120 and last == len(shown)


def test_the_second_reading_from_within_a_film_shows_the_same(tmp_path):
    write_mp4(tmp_path / "film.mp4", np.concatenate([ramp(60), ramp(60), ramp(30)]))
    film = open_film(tmp_path / "film.mp4")
    whole = [shown.picture for shown in at_rate(frames(film, film.size), 30)]
    later = [shown.picture for shown in at_rate(frames(film, film.size, 100 / 30), 30, 100 / 30)]
    assert len(whole) == 150 and len(later) == 50
    assert all(np.array_equal(a, b) for a, b in zip(whole[100:], later, strict=True))


def test_pixels_that_are_not_square_become_so(tmp_path):
    write_mp4(tmp_path / "flat.mp4", corners())
    ffmpeg("-i", tmp_path / "flat.mp4", "-vf", "setsar=2/1", tmp_path / "film.mp4")
    assert open_film(tmp_path / "film.mp4").size == (64, 192)


def test_ten_bits_look_as_eight(tmp_path):
    write_mp4(tmp_path / "flat.mp4", corners())
    ffmpeg("-i", tmp_path / "flat.mp4", "-c:v", "libx264", "-pix_fmt", "yuv420p10le", tmp_path / "film.mp4")
    assert np.abs(seen(tmp_path / "film.mp4").astype(int) - seen(tmp_path / "flat.mp4")).mean() < 4


@pytest.mark.parametrize(("transfer", "grey"), [("smpte2084", 0.58), ("arib-std-b67", 0.75)])
def test_hdr_white_is_bright_and_highlights_are_brighter(tmp_path, transfer, grey):
    levels = np.array([grey / 2, grey, grey * 1.15], np.float32)  # half the signal of diffuse white, white, a highlight
    picture = np.repeat(np.rint(levels * 65535).astype(np.uint16), 16)[None, :, None].repeat(32, 0).repeat(3, 2)
    raw = tmp_path / "raw.rgb"
    raw.write_bytes(np.ascontiguousarray(np.repeat(picture[None], 5, 0)).tobytes())
    tags = ["-color_primaries", "bt2020", "-color_trc", transfer, "-colorspace", "bt2020nc"]
    filters = f"scale=out_color_matrix=bt2020,setparams=color_primaries=bt2020:color_trc={transfer}:colorspace=bt2020nc"
    source = ["-f", "rawvideo", "-pix_fmt", "rgb48le", "-s", "48x32", "-r", "30", "-i", raw]
    ffmpeg(*source, "-vf", filters, "-c:v", "libx264", "-pix_fmt", "yuv420p10le", *tags, tmp_path / "film.mp4")
    dark, white, highlight = seen(tmp_path / "film.mp4")[0][16, [8, 24, 40]].astype(int)
    assert np.ptp(white) <= 3  # no colour
    assert dark.max() < 120 and 200 <= white.min() < highlight.min() <= 255


def test_hdr_colours_are_wider_than_those_of_srgb():
    green = np.array([[[0, 30_000, 0]]], np.uint16)
    assert to_sdr(green, ColorTrc.ARIB_STD_B67)[0, 0].tolist()[::2] == [0, 0]


def test_what_is_no_film_says_so(tmp_path):
    (tmp_path / "text.mp4").write_text("hello\n" * 100)
    with pytest.raises(ValueError, match=r"text\.mp4 is no video that can be read"):
        open_film(tmp_path / "text.mp4")
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(ValueError, match=r"empty\.mp4 is no video"):
        open_film(tmp_path / "empty.mp4")
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", tmp_path / "sound.mp4")
    with pytest.raises(ValueError, match=r"sound\.mp4 has no video"):
        open_film(tmp_path / "sound.mp4")


def test_what_is_left_of_a_truncated_film_is_used_and_told(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (90, 64, 96, 3), dtype=np.uint8)
    whole = write_mp4(tmp_path / "whole.mp4", noise).read_bytes()
    (tmp_path / "film.mp4").write_bytes(whole[: len(whole) // 2])
    film = open_film(tmp_path / "film.mp4")
    count = len(list(at_rate(frames(film, film.size), 30)))
    assert 20 < count < 70
    assert any("of 3.0 s: the file is not whole" in problem for problem in film.problems)
    ffmpeg(
        "-i", tmp_path / "whole.mp4", "-c", "copy", "-movflags", "0", tmp_path / "end.mp4"
    )  # its index is at the end
    (tmp_path / "end.mp4").write_bytes((tmp_path / "end.mp4").read_bytes()[:-3000])
    with pytest.raises(ValueError, match="is it whole"):
        open_film(tmp_path / "end.mp4")


# Cuts


def wandering(count: int, seed: int) -> np.ndarray:
    """Frames of a smooth picture that moves."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (5, 9, 3), dtype=np.uint8)
    wide = np.kron(coarse, np.ones((16, 16, 1), np.uint8))
    return np.stack([wide[:64, number % 40 : number % 40 + 96] for number in range(count)])


@pytest.mark.parametrize("fps", [12, 30])
def test_cuts_are_found_and_movement_is_none(tmp_path, fps):
    film = np.concatenate([wandering(40, 1), wandering(40, 2), wandering(40, 3)])
    write_mp4(tmp_path / "film.mp4", film, fps=fps)
    found = scan(open_film(tmp_path / "film.mp4"), tmp_path, lambda count: None)
    first, second = 40 * 30 // fps, 80 * 30 // fps
    bounds = [bound for shot in find_shots(found) for bound in shot]
    assert np.allclose(bounds, [0, first, first, second, second, len(found.change)], atol=2)
    assert len(list(tmp_path.glob("*.jpg"))) == len(found.files)


def test_a_still_film_and_a_short_one_have_no_cuts():
    assert find_cuts(np.zeros(100)) == [] == find_cuts(np.array([0.0, 0.01, 0.02]))


def test_a_flash_is_no_cut():
    change = np.full(60, 0.01)
    change[30:32] = 0.3  # into it, and out of it
    assert find_cuts(change) == []
