"""Video files of any size, rate, rotation and depth -> upright 8-bit frames at even intervals. Knows no models.

What a file says of itself may be wrong: times may stand still or be missing, frames may be damaged, the end may be cut
off. Whatever can be decoded is given; `Film.problems` tells of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import ColorTrc, Interpolation

SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mts", ".m2ts", ".mpg", ".mpeg", ".3gp", ".wmv", ".ogv")
SHORTFALL = 0.5  # seconds that a film may be shorter than its file says
HDR = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
WHITE = 203.0  # nits of diffuse white in HDR (ITU-R BT.2408)
_TO_709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32)


@dataclass
class Film:
    """A video file that can be decoded.

    size: upright height and width in square pixels. turns: quarter turns to the left that make its pictures upright.
    origin: time of the first frame in the file. fps: the average rate. seconds: what the file promises, 0 if nothing.
    problems: what was wrong with it, in words, as it is read.
    """

    path: Path
    size: tuple[int, int]
    turns: int
    origin: float
    fps: float
    seconds: float
    problems: list[str] = field(default_factory=list)


class Shown(NamedTuple):
    """What a film shows at an instant: the picture (H, W, 3) uint8, its time in seconds, how far that is off."""

    picture: np.ndarray
    time: float
    off: float


def open_film(path: Path) -> Film:
    """Raises ValueError for a file that is no video, has no frames, or cannot be read; names it and the reason."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path.name} has no video: it has sound or subtitles only")
            stream = container.streams.video[0]
            frame = next(_decode(container), None)
            if frame is None:
                raise ValueError(f"{path.name} has no frame that can be decoded: it is damaged or of an unknown codec")
            if stream.duration and stream.time_base:
                seconds = float(stream.duration * stream.time_base)
            else:
                seconds = (container.duration or 0) / av.time_base
            fps = float(stream.average_rate or stream.guessed_rate or 30)
            ratio = float(stream.sample_aspect_ratio or 1) or 1.0
    except (FFmpegError, OSError) as error:
        raise ValueError(f"{path.name} is no video that can be read ({_reason(error)}): is it whole?") from error
    turns = round(frame.rotation / 90) % 4
    height, width = frame.height, round(frame.width * ratio)
    size = (width, height) if turns % 2 else (height, width)
    return Film(path, size, turns, float(frame.time or 0), fps, seconds)


def frames(film: Film, size: tuple[int, int], start: float = 0.0) -> Iterator[tuple[float, np.ndarray]]:
    """All frames from `start` seconds on: their times, rising from 0 at the film's first, and pictures of `size`.

    HDR is mapped to the brightness and colours of sRGB. Raises nothing for damage: it goes into `film.problems`.
    """
    with av.open(str(film.path)) as container:
        if start > 1:
            container.seek(int((film.origin + start - 1) * av.time_base))
        found = _decode(container, film.problems if start <= 1 else None)
        first = next(found, None)
        if start > 1 and (first is None or (first.time or 0) - film.origin > start):  # a file whose index is wrong
            container.seek(0)
            first = next(found := _decode(container), None)
        last = -math.inf
        for frame in chain([first] if first else [], found):
            time = last + 1 / film.fps if frame.time is None else float(frame.time) - film.origin
            if time <= last and last > -math.inf:
                continue
            last = time
            if time >= start - 1:
                yield time, _picture(frame, size, film.turns)
    if film.seconds - max(last, 0) > max(SHORTFALL, 2 / film.fps):
        _note(film.problems, f"ends after {max(last, 0):.1f} of {film.seconds:.1f} s: the file is not whole")


def at_rate(found: Iterable[tuple[float, np.ndarray]], fps: float, start: float = 0.0) -> Iterator[Shown]:
    """What is shown at start, start + 1/fps, ...: the frame nearest in time, until the last one's has passed."""
    number, before = 0, None
    for time, picture in found:
        if before is not None:
            while start + number / fps < (before[0] + time) / 2:
                yield _shown(before, start + number / fps)
                number += 1
        before = (time, picture)
    while before is not None and start + number / fps < before[0] + 0.5 / fps:
        yield _shown(before, start + number / fps)
        number += 1


def _shown(frame: tuple[float, np.ndarray], instant: float) -> Shown:
    return Shown(frame[1], frame[0], abs(frame[0] - instant))


def _decode(container: av.container.InputContainer, problems: list[str] | None = None) -> Iterator[av.VideoFrame]:
    """The frames of the first video stream; packets that cannot be decoded are left out."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    lost = 0
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, FFmpegError):
            break
        try:
            yield from packet.decode()
        except FFmpegError:
            lost += 1
    if lost and problems is not None:
        _note(problems, f"{lost} damaged pieces were left out")


def _note(problems: list[str], problem: str) -> None:
    """Films are read more than once, and their problems told once."""
    if problem not in problems:
        problems.append(problem)


def _picture(frame: av.VideoFrame, size: tuple[int, int], turns: int) -> np.ndarray:
    """An upright picture (H, W, 3) uint8 of `size` in sRGB."""
    height, width = size[:: -1 if turns % 2 else 1]
    hdr = frame.color_trc in HDR
    scaled = frame.reformat(width, height, "rgb48le" if hdr else "rgb24", interpolation=Interpolation.AREA)
    pixels = scaled.to_ndarray()
    if hdr:
        pixels = to_sdr(pixels, ColorTrc(frame.color_trc))
    return np.ascontiguousarray(np.rot90(pixels, turns))


def to_sdr(pixels: np.ndarray, transfer: ColorTrc) -> np.ndarray:
    """HDR pixels (H, W, 3) uint16 in the colours of BT.2020 -> uint8 in sRGB.

    Up to half of diffuse white nothing changes; what is brighter is compressed, so that highlights keep their shape.
    """
    signal = pixels.astype(np.float32) / 65535
    if transfer == ColorTrc.SMPTE2084:
        power = signal ** np.float32(1 / 78.84375)
        light = (
            10_000 / WHITE * (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578)
        )
    else:
        bright = np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892
        scene = np.where(signal <= 0.5, signal**2 / 3, bright / 12)
        luma = scene @ np.array([0.2627, 0.678, 0.0593], np.float32)
        light = scene * np.maximum(luma, 1e-6)[..., None] ** 0.2 * (1000 / WHITE)
    light = np.maximum(light @ _TO_709.T, 0)
    peak = light.max(-1, keepdims=True)
    light = light * np.where(peak > 0.5, (1 - 0.25 / np.maximum(peak, 0.5)) / np.maximum(peak, 0.5), 1)
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 1e-6) ** (1 / 2.4) - 0.055)
    return np.rint(np.clip(srgb, 0, 1) * 255).astype(np.uint8)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
