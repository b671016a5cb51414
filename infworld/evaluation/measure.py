"""What is measured on which film of an evaluation, and the figures that come of all of them.

A film's measures are plain numbers by name, so that they can be kept as JSON; a film that is measured need not be
made again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from infworld.evaluation.takes import LAST, WHOLE, Take, describe
from infworld.metrics.control import control, expected, residual_motion
from infworld.metrics.memory import Return, by_gap, mirror, revisit_closure
from infworld.metrics.networks import Networks
from infworld.metrics.quality import dynamic_degree, motion_smoothness
from infworld.metrics.similarity import normalised, random_floor, round_trip_ceiling
from infworld.metrics.stability import drift, seams, still_likeness
from infworld.metrics.summary import Figure, summarize
from infworld.pictures import to_uint8
from infworld.world import World

DRIFTS = ("sharpness", "contrast", "saturation", "colour shift")
CEILING_FRAMES = 21  # that go through the VAE: 6 latents
Measures = dict[str, Any]  # numbers, lists of numbers by chunk, words


def round_trip(world: World) -> Callable[[np.ndarray], np.ndarray]:
    """Frames (T, H, W, 3), T = 1 + 4n, through a world's VAE."""

    @torch.inference_mode()
    def through(frames: np.ndarray) -> np.ndarray:
        video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float().to(world.device) / 127.5 - 1
        latents, _ = world.vae.encode(video)
        return to_uint8(world.vae.decode(latents))

    return through


def measure(take: Take, frames: np.ndarray, world: World, networks: Networks) -> Measures:
    """All measures of one film."""
    chunk, fps = world.config.chunk_frames, world.config.validation_data.fps
    if take.kind == "action":
        return _obedience(take, frames)
    if take.kind == "still":
        return {"residual motion": residual_motion(frames), "last frame": still_likeness(frames)} | _stability(
            frames, chunk
        )
    ends = random_floor(frames), round_trip_ceiling(frames[:CEILING_FRAMES], round_trip(world))
    if take.kind == "mirror":
        returns = mirror(frames, chunk)
        return _likeness("mirror", returns, ends) | _lpips("mirror", returns, frames, networks)
    returns = revisit_closure(frames, take.actions, chunk, world.config.camera)
    found = _likeness("return", returns, ends) | _lpips("return", returns, frames, networks)
    found |= _stability(frames, chunk) | networks.quality(frames[chunk // 2 :: chunk // 2])
    for gap, group in by_gap(returns).items():
        found |= _likeness(f"return after {gap}", group, ends)
    dynamics = dynamic_degree(frames, fps)
    found |= {"motion smoothness": 100 * motion_smoothness(frames)}
    return found | {"dynamic degree": 100.0 * dynamics.dynamic, "flow": dynamics.flow}


def _likeness(name: str, returns: Sequence[Return], ends: tuple[float, float]) -> Measures:
    if not returns:
        return {}
    floor, ceiling = ends
    means = {key: float(np.mean([getattr(found, key) for found in returns])) for key in ("psnr", "ssim", "best")}
    score = 100 * normalised(means["best"], floor, ceiling)
    named = {f"{name} {key}": value for key, value in means.items()}
    return named | {f"{name} score": score, "floor": floor, "ceiling": ceiling}


def _lpips(name: str, returns: Sequence[Return], frames: np.ndarray, networks: Networks) -> Measures:
    if not returns:
        return {}
    first, again = ([getattr(found, key) for found in returns] for key in ("first", "again"))
    return {f"{name} {key}": value for key, value in networks.lpips(frames[first], frames[again]).items()}


def _stability(frames: np.ndarray, chunk: int) -> Measures:
    found: Measures = {f"{name} by chunk": values.tolist() for name, values in drift(frames, chunk).items()}
    found |= {f"last {name}": float(found[f"{name} by chunk"][-1]) for name in DRIFTS}
    joins = seams(frames, chunk)
    return found | ({"seam": float(np.median(joins)), "worst seam": float(joins.max())} if len(joins) else {})


def _obedience(take: Take, frames: np.ndarray) -> Measures:
    segment = take.actions.segments[0]
    found = control(frames, segment.move, segment.view)
    signs = expected(segment.move, segment.view)
    values = dataclasses.asdict(found) if found else {}
    named = {key: 100.0 * value for key, value in values.items()}
    return {"action": describe(take), "expected": ", ".join(f"{k} {v:+d}" for k, v in signs.items())} | named


# --- figures of all films


@dataclass(frozen=True)
class Row:
    """A line of the table: a measure of films of one kind, in which unit, and where better is."""

    group: str
    kind: str
    measure: str
    words: str
    unit: str = ""
    better: str = "high"  # or "low", "one"; "" where neither is


ROWS = (
    Row("memory", "mirror", "mirror psnr", "mirror: a chunk and its inverse, PSNR", "dB"),
    Row("memory", "mirror", "mirror ssim", "mirror, SSIM"),
    Row("memory", "mirror", "mirror LPIPS", "mirror, LPIPS", "", "low"),
    Row("memory", "mirror", "mirror best", "mirror, best PSNR within 4 frames", "dB"),
    Row("memory", "mirror", "mirror score", "mirror, 0 random frames, 100 the VAE", "%"),
    Row("memory", "walk", "return psnr", "returns of the walks, PSNR", "dB"),
    Row("memory", "walk", "return ssim", "returns, SSIM"),
    Row("memory", "walk", "return LPIPS", "returns, LPIPS", "", "low"),
    Row("memory", "walk", "return best", "returns, best PSNR within 4 frames", "dB"),
    Row("memory", "walk", "return score", "returns, 0 random frames, 100 the VAE", "%"),
    Row("control", "action", "obeyed", "actions obeyed", "%"),
    Row("control", "action", "sign", "frames that move as told", "%"),
    Row("control", "action", "steadiness", "steadiness of that motion", "%"),
    Row("control", "still", "residual motion", "motion per frame when nothing is done, of the width", "%", "low"),
    Row("stability", "walk", "last sharpness", "sharpness of the last chunk over the first", "", "one"),
    Row("stability", "walk", "last contrast", "contrast, the same", "", "one"),
    Row("stability", "walk", "last saturation", "saturation, the same", "", "one"),
    Row("stability", "still", "last sharpness", "sharpness, the same, when nothing is done", "", "one"),
    Row("stability", "still", "last contrast", "contrast, the same, when nothing is done", "", "one"),
    Row("stability", "still", "last colour shift", "colour shift when nothing is done, of 255", "", "low"),
    Row("stability", "still", "last frame", "last frame against the picture when nothing is done", "dB"),
    Row("stability", "walk", "seam", "step between chunks over steps inside", "", "one"),
    Row("quality", "walk", "motion smoothness", "motion smoothness (light)", "%"),
    Row("quality", "walk", "dynamic degree", "dynamic degree (light)", "%"),
    Row("quality", "walk", "flow", "motion of the fastest 5 % in 1/8 s, of the shorter side", "%", ""),
    Row("quality", "walk", "imaging quality", "imaging quality (MUSIQ, as VBench)", "%"),
    Row("quality", "walk", "aesthetic quality", "aesthetic quality (LAION's predictor, as VBench)", "%"),
)


@dataclass(frozen=True)
class Film:
    """A measured film as it is kept: its take in plain values, and its measures."""

    name: str
    kind: str
    case: str
    memory: str
    frames: int
    seconds: float
    measures: Measures


def figure(films: Iterable[Film], kind: str, measure: str, memory: str) -> Figure:
    """The mean of a measure over films of a kind."""
    return summarize([f.measures.get(measure) for f in films if f.kind == kind and f.memory == memory])


def figures(films: Sequence[Film]) -> list[tuple[Row, dict[str, Figure]]]:
    """The table: for every row with a value its figures by memory."""
    found = []
    for row in ROWS:
        columns = {memory: figure(films, row.kind, row.measure, memory) for memory in (WHOLE, LAST)}
        columns = {memory: value for memory, value in columns.items() if value.films}
        if columns:
            found.append((row, columns))
    return found


def gaps(films: Sequence[Film]) -> dict[int, dict[str, Figure]]:
    """The score of returns by their gap in chunks: {gap: {memory: figure}}."""
    found = {}
    for gap in range(1, 1 + max((len(f.measures.get("sharpness by chunk", ())) for f in films), default=0)):
        columns = {m: figure(films, "walk", f"return after {gap} score", m) for m in (WHOLE, LAST)}
        if any(value.films for value in columns.values()):
            found[gap] = columns
    return found


def obedience(films: Sequence[Film]) -> list[Measures]:
    """By action: what is expected, and obeyed, sign and steadiness in percent, means over pictures."""
    actions: dict[str, list[Measures]] = {}
    for film in films:
        if film.kind == "action":
            actions.setdefault(str(film.measures["action"]), []).append(film.measures)
    rows = []
    for action, found in actions.items():
        means = {key: summarize([m.get(key) for m in found]).mean for key in ("obeyed", "sign", "steadiness")}
        rows.append({"action": action, "expected": found[0]["expected"], **means})
    return rows
