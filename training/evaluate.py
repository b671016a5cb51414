"""Measures a trained tiny model against the truth, on worlds that training never drew.

    python -m training.evaluate --model tiny --device cuda --out runs/evaluation
    python -m training.evaluate --tests turn,circle --worlds 16      # only some tests
    python -m training.evaluate --tests rollouts --worlds 6          # only the picture of the model's own films

Writes evaluation.md (the table), evaluation.json (every mean with its interval) and one contact sheet per test.

How it measures. *Wrong memory* is the same run, with the same noise, that gets another world's compressed memory and
its own last latent. PSNR is taken per frame on 8-bit pictures, capped at 60 dB, then averaged over frames and worlds.
As PSNR rewards blur, the sharpness stands beside it: the mean absolute difference of neighbouring pixels' luma, over
the reference's. Intervals are 95 % bootstrap intervals over worlds. Every world is prompted with its own caption.

Lengths are fractions of the model's chunk, so that small models can be tested; with 80 frames they are the table's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from infworld.actions import MOVES, NO_OP, VIEWS, ActionScript, Segment, words
from infworld.config import FRAMES_PER_LATENT
from infworld.dit import TextContext
from infworld.rollout import World, load, pick_dtype
from infworld.sampler import sample, schedule
from infworld.text import load_text_encoder
from training.render import render
from training.walks import MIXED, sample_actions
from training.worlds import EVAL_SEEDS, STEP, Worlds, captions, make_worlds, spawn, walk

MAX_PSNR = 60.0  # dB, of equal pictures
RESAMPLES = 2000  # of the bootstrap
TRIES = 8  # start poses to choose from, where a walk must not bump into things
KNOWN_ACTIONS = 9  # of moves and of views: all but *uncertain*
DRIFT_CHUNKS = 13  # 1041 frames
WANDER_CHUNKS = 8  # between visit and return in the far tests
SHEET_WORLDS = 5  # shown on a contact sheet
LABEL_HEIGHT = 12  # pixels under every picture of a sheet


# -------------------------------------------------------------------------------------------------------------- films


@dataclass(frozen=True, eq=False)
class Bench:
    """One batch of B worlds and the model that films them."""

    model: World
    worlds: Worlds
    context: TextContext  # of the worlds' captions
    seed: int
    steps: int

    @property
    def chunk(self) -> int:
        """New frames per chunk: 80."""
        return self.model.config.chunk_frames

    def render(self, poses: Tensor) -> Tensor:
        """The true frames (B, T, H, W, 3) uint8 seen from poses (B, T, 4)."""
        return render(self.worlds, poses, *self.model.config.buckets[0])


@dataclass(frozen=True, eq=False)
class Film:
    """B films so far: frames (B, T, H, W, 3) uint8, their latents, and what the VAE encoder carries on."""

    frames: Tensor
    history: Tensor
    state: dict[str, Tensor]


def make_bench(model: World, text_encoder, seeds: Sequence[int], seed: int = 0, steps: int | None = None) -> Bench:
    """A bench on the model's device.

    seeds: of the worlds, at least two, as each lends its memory to the next. seed: of the noise and of random walks.
    steps: of the sampler, the model's own if None. Raises ValueError for fewer worlds and for a model with guidance.
    """
    settings = model.config.val_scheduler_cfg
    if len(seeds) < 2:
        raise ValueError(f"{len(seeds)} world: at least 2 are needed, as each lends its memory to the next")
    if settings.text_cfg_scale != 1:
        raise ValueError(
            f"{model.config.name} has guidance {settings.text_cfg_scale}: only models without are measured"
        )
    worlds = make_worlds(seeds)
    with torch.inference_mode():
        text = text_encoder.encode(captions(worlds))
        context = model.transformer.embed_text(text.hidden, text.mask)
    return Bench(model, worlds.to(model.device), context, seed, steps or settings.num_sampling_steps)


def true_film(bench: Bench, frames: Tensor) -> Film:
    """The film that consists of rendered frames (B, 1 + 4 n, H, W, 3)."""
    latents, state = bench.model.vae.encode(to_video(frames[:, :1]))
    film = Film(frames[:, :1], latents, state)
    for known in range(1, frames.shape[1], bench.chunk):
        film = append(bench, film, to_video(frames[:, known : known + bench.chunk]))
    return film


def append(bench: Bench, film: Film, video: Tensor) -> Film:
    """The film with more frames, given as video (B, 3, 4 n, H, W)."""
    latents, state = bench.model.vae.encode(video, film.state)
    frames = torch.cat([film.frames, to_frames(video)], dim=1)
    return Film(frames, torch.cat([film.history, latents], dim=2), state)


def own_film(bench: Bench, film: Film, script: Tensor, chunks: int) -> Film:
    """The film with chunks that the model makes: its own rollout."""
    for _ in range(chunks):
        film = append(bench, film, next_chunk(bench, film, script)[:, :, 1:])
    return film


def next_chunk(
    bench: Bench, film: Film, script: Tensor, wrong_memory: bool = False, frames: int | None = None
) -> Tensor:
    """The next chunk as video (B, 3, 81, H, W), or its first 1 + `frames` frames; frame 0 repeats the last known one.

    script: (B, 2, T) move and view of every frame of the film, nothing is done past its end. wrong_memory: every world
    gets the compressed memory of its neighbour in the batch and its own last latent.
    """
    model, config = bench.model.transformer, bench.model.config
    known = film.frames.shape[1]
    script = torch.nn.functional.pad(script, (0, max(0, known + bench.chunk - script.shape[2])), value=NO_OP[0])
    actions = model.action_encoder(*script[:, :, known - 1 : known + bench.chunk].unbind(1))
    history = film.history.to(model.dtype)
    compressed = model.latent_encoder.compress(history)
    if wrong_memory:
        compressed = compressed.roll(1, dims=0)
    stream = model.encode_memory(torch.cat([compressed, history[:, :, -1:]], dim=2), bench.context)
    sign = 1 if config.val_scheduler_cfg.use_reversed_velocity else -1

    def velocity(z: Tensor, timestep: Tensor) -> Tensor:
        return sign * model.denoise(z, timestep.to(z.device).reshape(1), stream, actions, bench.context)

    latents = sample(velocity, draw_noise(bench, film), schedule(config.val_scheduler_cfg, bench.steps))
    kept = latents.shape[2] if frames is None else 1 + frames // FRAMES_PER_LATENT
    return bench.model.vae.decode(latents[:, :, :kept])


def draw_noise(bench: Bench, film: Film) -> Tensor:
    """Noise of the next chunk (B, 16, 21, h, w): decided by seed, world and chunk, whatever the batch or device."""
    shape = (film.history.shape[1], bench.model.config.chunk_latents, *film.history.shape[3:])
    chunk = film.frames.shape[1] // bench.chunk
    seeds = [(bench.seed * 1_000_003 + world) * 1009 + chunk for world in bench.worlds.seed.tolist()]
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(noise).to(film.history.device)


def to_video(frames: Tensor) -> Tensor:
    """Frames (B, T, H, W, 3) uint8 -> video (B, 3, T, H, W) in [-1, 1]."""
    return frames.movedim(-1, 1).float() / 127.5 - 1


def to_frames(video: Tensor) -> Tensor:
    """Video (B, 3, T, H, W) in [-1, 1] -> frames (B, T, H, W, 3) uint8."""
    return (video.clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8).movedim(1, -1)


def same_script(bench: Bench, text: str) -> Tensor:
    """One script, such as "right 80, left 80", for all worlds: (B, 2, T)."""
    pairs = torch.tensor(ActionScript.parse(text).pairs(), device=bench.model.device)
    return pairs.T.expand(len(bench.worlds), -1, -1)


def random_script(bench: Bench, mixture: dict[str, float], frames: int) -> Tensor:
    """A random walk for each world, (B, 2, frames), decided by seed and world."""
    generator, scripts = torch.Generator(), []
    for world in bench.worlds.seed.tolist():
        move, view = sample_actions(mixture, 1, frames, generator.manual_seed(bench.seed * 1_000_003 + world))
        scripts.append(torch.stack([move[0], view[0]]))
    return torch.stack(scripts).to(bench.model.device)


def free_starts(bench: Bench, scripts: Tensor) -> Tensor:
    """Start poses (B, 4) with room to walk: of several, that from which scripts (B, K, 2, T) lead furthest in all."""
    count, ways = scripts.shape[:2]
    starts = torch.stack([spawn(bench.worlds, seed) for seed in range(TRIES)], dim=1)
    worlds = bench.worlds[torch.arange(count, device=starts.device).repeat_interleave(TRIES * ways)]
    move, view = scripts[:, None].expand(-1, TRIES, -1, -1, -1).flatten(0, 2).unbind(1)
    poses = walk(worlds, starts.repeat_interleave(ways, dim=1).flatten(0, 1), move, view)
    length = poses[:, :, :2].diff(dim=1).norm(dim=-1).sum(1).view(count, TRIES, ways).sum(2)
    return starts[torch.arange(count, device=starts.device), length.argmax(1)]


def true_walk(bench: Bench, script: Tensor) -> Tensor:
    """The frames of a walk along a script, from a start with room for it: (B, T + 1, H, W, 3)."""
    return bench.render(walk(bench.worlds, free_starts(bench, script[:, None]), *script.unbind(1)))


# ------------------------------------------------------------------------------------------------------------ measures


def psnr(frames: Tensor, reference: Tensor) -> Tensor:
    """PSNR in dB of each frame, (B, T), at most `MAX_PSNR`; uint8 frames (B, T, H, W, 3)."""
    return _to_db((frames.float() - reference.float()).div(255).square().mean((2, 3, 4)))


def _to_db(squared_error: Tensor) -> Tensor:
    return -10 * squared_error.clamp(min=10 ** (-MAX_PSNR / 10)).log10()


def luma(frames: Tensor) -> Tensor:
    """uint8 (..., 3) -> (...) in 0..1."""
    return frames.float() @ frames.new_tensor((0.299, 0.587, 0.114), dtype=torch.float32) / 255


def sharpness(frames: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels' luma, averaged over frames: (B, T, H, W, 3) -> (B,)."""
    light = luma(frames)
    return (light.diff(dim=3).abs().mean((1, 2, 3)) + light.diff(dim=2).abs().mean((1, 2, 3))) / 2


def contrast(frames: Tensor) -> Tensor:
    """Standard deviation of a frame's luma, averaged over frames: (B, T, H, W, 3) -> (B,)."""
    return luma(frames).flatten(2).std(2).mean(1)


def saturation(frames: Tensor) -> Tensor:
    """HSV saturation averaged over pixels and frames: (B, T, H, W, 3) -> (B,)."""
    most, least = frames.float().amax(-1), frames.float().amin(-1)
    return ((most - least) / most.clamp(min=1)).flatten(1).mean(1)


def ratio(measure: Callable[[Tensor], Tensor], frames: Tensor, reference: Tensor) -> Tensor:
    """A measure of frames and of their reference, (B, 2): the means over worlds are divided, not world by world."""
    return torch.stack([measure(frames), measure(reference)], dim=1)


@dataclass(frozen=True)
class Strip:
    """One row of a contact sheet: pictures (N, H, W, 3) uint8 and a label under each."""

    pictures: np.ndarray
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What a test found in one batch of worlds, and rows for the contact sheet.

    Each measure is one number per world (B,), or two whose means are divided (B, 2); NaN where a world does not count.
    """

    measures: dict[str, Tensor]
    sheet: list[Strip] = field(default_factory=list)


def strips(rows: dict[str, Tensor], columns: Sequence[int]) -> list[Strip]:
    """Contact sheet rows of the first worlds: for each, a row per entry (B, T, H, W, 3) with these of its frames."""
    shown = min(SHEET_WORLDS, *(len(frames) for frames in rows.values()))
    return [
        Strip(frames[world, list(columns)].cpu().numpy(), tuple(f"{name} {column}" for column in columns))
        for world in range(shown)
        for name, frames in rows.items()
    ]


# --------------------------------------------------------------------------------------------------------------- tests


def measure_vae(bench: Bench) -> Outcome:
    """A chunk of a random walk through encoder and decoder."""
    truth = true_walk(bench, random_script(bench, MIXED, bench.chunk))
    latents, _ = bench.model.vae.encode(to_video(truth))
    frames = to_frames(bench.model.vae.decode(latents))
    return _against_truth(bench, frames, truth, slice(0, None))


def measure_start(bench: Bench) -> Outcome:
    """The first 16 frames that the model adds to one picture, on a random walk."""
    script = random_script(bench, {"random": 1.0}, bench.chunk)
    truth = true_walk(bench, script)
    frames = to_frames(next_chunk(bench, true_film(bench, truth[:, :1]), script))
    return _against_truth(bench, frames, truth, slice(1, 1 + bench.chunk // 5))


def _against_truth(bench: Bench, frames: Tensor, truth: Tensor, part: slice) -> Outcome:
    measures = {
        "value": psnr(frames[:, part], truth[:, part]).mean(1),
        "still": psnr(truth[:, :1], truth[:, part]).mean(1),
        "whole chunk": psnr(frames[:, 1:], truth[:, 1:]).mean(1),
        "sharpness": ratio(sharpness, frames[:, part], truth[:, part]),
    }
    return Outcome(measures, strips({"true": truth, "model": frames}, range(0, bench.chunk + 1, bench.chunk // 8)))


def measure_turn(bench: Bench) -> Outcome:
    """Turn right 80 and back; the first visit is the truth."""
    return _true_visit(bench, f"right {bench.chunk}, left {bench.chunk}")


def measure_circle(bench: Bench) -> Outcome:
    """A full circle; the last quarter is the model's."""
    return _true_visit(bench, f"right {4 * bench.chunk}")


def measure_forward(bench: Bench) -> Outcome:
    """Walk forward 80 and back; the first visit is the truth."""
    return _true_visit(bench, f"forward {bench.chunk}, back {bench.chunk}")


def measure_far_true(bench: Bench) -> Outcome:
    """Turn right 80, wander for 8 chunks, turn back; all but the return is the truth."""
    return _true_visit(bench, far_script(bench.chunk))


def measure_mirror_turn(bench: Bench) -> Outcome:
    """The model's own rollout: turn right 80 and back."""
    return _own_visit(bench, f"right {bench.chunk}, left {bench.chunk}")


def measure_mirror_forward(bench: Bench) -> Outcome:
    """The model's own rollout: walk forward 80 and back."""
    return _own_visit(bench, f"forward {bench.chunk}, back {bench.chunk}")


def measure_far(bench: Bench) -> Outcome:
    """The model's own rollout: turn right 80, wander for 8 chunks, turn back."""
    return _own_visit(bench, far_script(bench.chunk))


def far_script(chunk: int) -> str:
    """Right by a chunk, 8 chunks elsewhere that end where they began and never look at the start, and left again."""
    half = chunk // 2
    wander = f"right {chunk}, forward {half}, back {half}, left {chunk}, right {half}, left {half}"  # 4 chunks
    return ", ".join([f"right {chunk}", *[wander] * (WANDER_CHUNKS // 4), f"left {chunk}"])


def _true_visit(bench: Bench, text: str) -> Outcome:
    """All chunks of a script but the last are the truth; the last is the model's, measured against the truth."""
    script = same_script(bench, text)
    truth = true_walk(bench, script)
    film = true_film(bench, truth[:, : -bench.chunk])
    return _recall(bench, film, script, truth[:, -bench.chunk - 1 :])


def _own_visit(bench: Bench, text: str) -> Outcome:
    """All chunks of a script are the model's; the last undoes the first, and is measured against it, mirrored."""
    script = same_script(bench, text)
    first = bench.render(free_starts(bench, script[:, None])[:, None])
    film = own_film(bench, true_film(bench, first), script, script.shape[2] // bench.chunk - 1)
    return _recall(bench, film, script, film.frames[:, : bench.chunk + 1].flip(1))


def _recall(bench: Bench, film: Film, script: Tensor, reference: Tensor) -> Outcome:
    """The next chunk with the right and with a wrong memory against its reference (B, 81, ...), in its last quarter."""
    right = to_frames(next_chunk(bench, film, script))
    wrong = to_frames(next_chunk(bench, film, script, wrong_memory=True))
    part = slice(-(bench.chunk // 4), None)
    right_psnr, wrong_psnr = psnr(right, reference), psnr(wrong, reference)
    measures = {
        "value": right_psnr[:, part].mean(1),
        "wrong": wrong_psnr[:, part].mean(1),
        "gain": (right_psnr - wrong_psnr)[:, part].mean(1),
        "still": psnr(film.frames[:, -1:], reference[:, part]).mean(1),
        "whole chunk": right_psnr[:, 1:].mean(1),
        "whole chunk gain": (right_psnr - wrong_psnr)[:, 1:].mean(1),
        "sharpness": ratio(sharpness, right[:, part], reference[:, part]),
        "wrong sharpness": ratio(sharpness, wrong[:, part], reference[:, part]),
    }
    rows = {"reference": reference, "right": right, "wrong": wrong}
    return Outcome(measures, strips(rows, range(0, bench.chunk + 1, bench.chunk // 8)))


def measure_view(bench: Bench) -> Outcome:
    """Is each of the nine views obeyed?"""
    return _actions(bench, VIEWS, 1)


def measure_move(bench: Bench) -> Outcome:
    """Is each of the nine moves obeyed?"""
    return _actions(bench, MOVES, 0)


def _actions(bench: Bench, names: Sequence[str], row: int) -> Outcome:
    """From one picture the model holds each action for 24 frames; which of nine true walks do its frames resemble most?

    The last two thirds of the frames are each compared with every true walk's frames up to 4 before or after, so that
    a slightly other speed does no harm; the walk with the highest mean of these best PSNRs is what the model did.
    Worlds where one of the true walks bumps into something do not count.
    """
    count, device = len(bench.worlds), bench.model.device
    hold = FRAMES_PER_LATENT * max(1, 3 * bench.chunk // (10 * FRAMES_PER_LATENT))
    scripts = torch.zeros(KNOWN_ACTIONS, 2, hold, dtype=torch.int64, device=device)
    scripts[:, row] = torch.arange(KNOWN_ACTIONS, device=device)[:, None]
    starts = free_starts(bench, scripts.expand(count, -1, -1, -1))
    poses = torch.stack([walk(bench.worlds, starts, *script.expand(count, -1, -1).unbind(1)) for script in scripts], 1)
    walks = bench.render(poses.flatten(1, 2))
    film = true_film(bench, walks[:, :1])
    right = []
    for action, script in enumerate(scripts):
        frames = to_frames(next_chunk(bench, film, script.expand(count, -1, -1), frames=hold))
        right.append((best_walk(frames, walks, hold // 3, bench.chunk // 20) == action).float())
    moved = (poses[:, :, -1, :2] - poses[:, :, 0, :2]).norm(dim=-1)
    free = (moved >= 0.8 * hold * STEP * (scripts[:, 0, 0] > 0)).all(1)
    right = torch.where(free[:, None], 100 * torch.stack(right, dim=1), torch.nan)
    return Outcome({"value": right.mean(1)} | {names[action]: right[:, action] for action in range(KNOWN_ACTIONS)})


def best_walk(frames: Tensor, walks: Tensor, first: int, reach: int) -> Tensor:
    """Which of nine walks, whose frames follow one another in walks (B, 9 T, H, W, 3), frames (B, T, H, W, 3) resemble
    most from frame `first` on, `reach` frames earlier or later allowed: (B,)."""
    length = frames.shape[1]
    a, b = frames[:, first:].flatten(2).float() / 255, walks.flatten(2).float() / 255
    similarity = _to_db(torch.cdist(a, b).square() / a.shape[2]).unflatten(2, (KNOWN_ACTIONS, length))
    index = torch.arange(length, device=frames.device)
    near = (index[first:, None] - index).abs() <= reach
    best = similarity.masked_fill(~near[:, None], -torch.inf).amax(3)
    return best.mean(1).argmax(1)


def measure_drift(bench: Bench) -> Outcome:
    """The model's own rollout of 1041 frames: contrast, saturation and sharpness of every chunk over the truth's."""
    script = random_script(bench, MIXED, DRIFT_CHUNKS * bench.chunk)
    poses = walk(bench.worlds, free_starts(bench, script[:, None]), *script.unbind(1))
    film = true_film(bench, bench.render(poses[:, :1]))
    measures, shown, true = {}, [film.frames], [film.frames]
    for chunk in range(DRIFT_CHUNKS):
        part = slice(1 + chunk * bench.chunk, 1 + (chunk + 1) * bench.chunk)
        film = own_film(bench, film, script, 1)
        truth = bench.render(poses[:, part])
        for measure in (contrast, saturation, sharpness):
            measures[f"{measure.__name__} {chunk + 1}"] = ratio(measure, film.frames[:, part], truth)
        shown.append(film.frames[:, -1:])
        true.append(truth[:, -1:])
    rows = {"true": torch.cat(true, dim=1), "own": torch.cat(shown, dim=1)}
    return Outcome(measures, strips(rows, range(DRIFT_CHUNKS + 1)))


def measure_rollouts(bench: Bench) -> Outcome:
    """No measure: a sheet of the model's own films of four chunks, a row for each world, labelled with the actions."""
    length, half = bench.chunk, bench.chunk // 2
    ways = (
        f"right {4 * length}",
        f"forward {length}, back {length}, left {length}, right {length}",
        f"forward {length}, right {length}, forward {length}, right {length}",
        f"forward+left {half}, forward+right {half}, right {length}, left {length}, back {length}",
    )
    script = torch.stack([same_script(bench, ways[world % len(ways)])[0] for world in range(len(bench.worlds))])
    first = bench.render(free_starts(bench, script[:, None])[:, None])
    film = own_film(bench, true_film(bench, first), script, 4)
    columns = range(0, 4 * length + 1, length // 4)
    sheet = []
    for world in range(len(bench.worlds)):
        done = ["start"] + [words(Segment(*script[world, :, column - 1].tolist(), 1)) for column in columns[1:]]
        labels = tuple(f"{column} {label}" for column, label in zip(columns, done, strict=True))
        sheet.append(Strip(film.frames[world, list(columns)].cpu().numpy(), labels))
    return Outcome({}, sheet)


TESTS: dict[str, Callable[[Bench], Outcome]] = {
    "vae": measure_vae,
    "start": measure_start,
    "turn": measure_turn,
    "circle": measure_circle,
    "forward": measure_forward,
    "mirror_forward": measure_mirror_forward,
    "mirror_turn": measure_mirror_turn,
    "far": measure_far,
    "far_true": measure_far_true,
    "view": measure_view,
    "move": measure_move,
    "rollouts": measure_rollouts,
    "drift": measure_drift,
}
SLOW_TESTS = ("far_true", "drift")  # not run unless asked for


# --------------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Row:
    """A line of the table: a test's measure with what it must reach and what is aimed at, and the same for the gain."""

    test: str
    what: str
    unit: str = "dB"
    measure: str = "value"
    bar: float | None = None
    aim: float | None = None
    gain_bar: float | None = None
    gain_aim: float | None = None


ROWS = (
    Row("vae", "VAE round trip", bar=32, aim=34),
    Row("start", "first 16 frames of chunk 1 against the truth", bar=20, aim=24),
    Row("turn", "turn right 80 and back, true first visit, last 20 frames", bar=21, aim=25, gain_bar=7, gain_aim=10),
    Row("circle", "full circle of 4 chunks, last 20 frames against the truth", bar=19, aim=23, gain_bar=5, gain_aim=8),
    Row("forward", "forward 80 and back, true first visit, last 20 frames", bar=19, aim=23, gain_bar=4, gain_aim=7),
    Row("mirror_forward", "own rollout forward 80 and back, last 20", bar=21, aim=25, gain_bar=5, gain_aim=8),
    Row("mirror_turn", "own rollout right 80 and back, last 20", bar=21, aim=25, gain_bar=5, gain_aim=8),
    Row("far", "own rollout, 8 chunks between visit and return", gain_bar=3, gain_aim=6),
    Row("far_true", "the same, all but the return true"),
    Row("view", "view obeyed, of nine", "%", bar=97, aim=99.5),
    Row("move", "move obeyed, of nine", "%", bar=93, aim=98),
    Row("drift", "contrast of chunk 13 over the truth's", "", f"contrast {DRIFT_CHUNKS}", bar=0.85, aim=0.95),
    Row("drift", "saturation of chunk 13 over the truth's", "", f"saturation {DRIFT_CHUNKS}", bar=0.85, aim=0.95),
    Row("drift", "sharpness of chunk 13 over the truth's", "", f"sharpness {DRIFT_CHUNKS}", bar=0.75, aim=0.9),
)


@dataclass(frozen=True)
class Figure:
    """A mean over worlds with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    worlds: int


def summarize(values: Tensor) -> Figure:
    """Mean of a measure (W,), or ratio of means (W, 2), over the worlds that count (no NaN)."""
    values = values.double().cpu().reshape(len(values), -1)
    values = values[~values.isnan().any(1)]
    if not len(values):
        return Figure(*[float("nan")] * 3, worlds=0)
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    means = torch.cat([values.mean(0, keepdim=True), values[picks].mean(1)])
    means = means[:, 0] / means[:, 1] if means.shape[1] == 2 else means[:, 0]
    low, high = means[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Figure(means[0].item(), low.item(), high.item(), len(values))


Results = dict[str, dict[str, Figure]]


def table(results: Results) -> str:
    """The results as a Markdown table, and drift by chunk below it."""
    head = ("what", "model", "wrong memory", "over wrong memory", "still picture", "sharpness", "bar", "aim", "reached")
    lines = [head, ("---",) * len(head)]
    lines += [_cells(row, results[row.test]) for row in ROWS if row.measure in results.get(row.test, {})]
    if "drift" in results:
        lines += [(), ("chunk", *map(str, range(1, DRIFT_CHUNKS + 1))), ("---",) * (DRIFT_CHUNKS + 1)]
        for name in ("contrast", "saturation", "sharpness"):
            figures = (results["drift"][f"{name} {chunk + 1}"] for chunk in range(DRIFT_CHUNKS))
            lines.append((f"{name} over the truth's", *(f"{figure.mean:.2f}" for figure in figures)))
    return "\n".join(f"| {' | '.join(line)} |" if line else "" for line in lines) + "\n"


def _cells(row: Row, figures: dict[str, Figure]) -> tuple[str, ...]:
    digits = 1 if row.unit else 2
    value, gain = figures[row.measure], figures.get("gain")

    def show(name: str, form: Callable[[Figure], str]) -> str:
        return form(figures[name]) if name in figures else ""

    def spread(figure: Figure, sign: str = "") -> str:
        return f"{figure.mean:{sign}.{digits}f} [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"

    return (
        row.what,
        f"{spread(value)} {row.unit}".strip(),
        show("wrong", lambda f: f"{f.mean:.1f}"),
        show("gain", lambda f: spread(f, "+")),
        show("still", lambda f: f"{f.mean:.1f}"),
        show("sharpness", lambda f: f"{f.mean:.2f}"),
        _goal(row.bar, row.gain_bar),
        _goal(row.aim, row.gain_aim),
        _reached(row, value, gain),
    )


def _goal(value: float | None, gain: float | None) -> str:
    return "; ".join(([f"{value:g}"] if value is not None else []) + ([f"+{gain:g}"] if gain is not None else []))


def _reached(row: Row, value: Figure, gain: Figure | None) -> str:
    # A ratio should be 1: too much is as wrong as too little.
    reached = (value.mean if row.unit else min(value.mean, 1 / value.mean), gain.mean if gain else 0)

    def reaches(*goals: float | None) -> bool:
        return all(goal is None or mean >= goal for mean, goal in zip(reached, goals, strict=True))

    if row.bar is None and row.gain_bar is None:
        return ""
    return "aim" if reaches(row.aim, row.gain_aim) else "yes" if reaches(row.bar, row.gain_bar) else "no"


def write_sheet(sheet: Sequence[Strip], path: Path) -> None:
    """A PNG with one row per strip and a label under every picture."""
    height, width = sheet[0].pictures.shape[1:3]
    picture = Image.new("RGB", (width * max(len(s.pictures) for s in sheet), (height + LABEL_HEIGHT) * len(sheet)))
    draw = ImageDraw.Draw(picture)
    for row, strip in enumerate(sheet):
        top = row * (height + LABEL_HEIGHT)
        for column, (pixels, label) in enumerate(zip(strip.pictures, strip.labels, strict=True)):
            picture.paste(Image.fromarray(pixels), (column * width, top))
            draw.text((column * width + 2, top + height), label, fill=(230, 230, 230))
    picture.save(path)


# ---------------------------------------------------------------------------------------------------------- the command


@torch.inference_mode()
def run_test(name: str, benches: Sequence[Bench]) -> tuple[dict[str, Figure], list[Strip]]:
    """One test over all batches: its figures, and the contact sheet of the first batch."""
    outcomes = [TESTS[name](bench) for bench in benches]
    measures = {key: torch.cat([outcome.measures[key] for outcome in outcomes]) for key in outcomes[0].measures}
    return {key: summarize(values) for key, values in measures.items()}, outcomes[0].sheet


def make_benches(model: World, text_encoder, worlds: int, batch: int, seed: int, steps: int | None) -> list[Bench]:
    """The first evaluation worlds in batches of nearly equal size, at most `batch` each unless one would be alone."""
    count = max(1, min(-(-worlds // batch), worlds // 2))
    parts = np.array_split(np.array(EVAL_SEEDS[:worlds]), count)
    return [make_bench(model, text_encoder, part.tolist(), seed, steps) for part in parts]


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny", help="model name or YAML")
    add("--device", default="auto")
    add("--worlds", type=int, default=64)
    add("--batch", type=int, default=64, help="worlds at a time")
    add("--tests", default="", help=f"all, or some of {','.join(TESTS)}; by default all but {','.join(SLOW_TESTS)}")
    add("--drift-worlds", type=int, default=16, help="worlds of the drift test, at most --worlds")
    add("--sheet-worlds", type=int, default=6, help="worlds of the rollouts sheet, at most --worlds")
    add("--steps", type=int, help="of the sampler; by default the model's own")
    add("--seed", type=int, default=0, help="of the noise and the random walks")
    add("--out", type=Path, default=Path("runs/evaluation"))
    return parser.parse_args(arguments)


def chosen_tests(text: str) -> list[str]:
    """The tests that a --tests argument names. ValueError for an unknown one."""
    if not text:
        return [name for name in TESTS if name not in SLOW_TESTS]
    names = list(TESTS) if text == "all" else [name.strip() for name in text.split(",")]
    if unknown := set(names) - set(TESTS):
        raise ValueError(f"unknown tests {sorted(unknown)}: known are {', '.join(TESTS)}")
    return names


def evaluate(args: argparse.Namespace, model: World, text_encoder) -> bool:
    """Runs the chosen tests and writes what they found after each, so that a failing test costs only itself.

    Returns whether all went through.
    """
    tests = chosen_tests(args.tests)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) for key, value in vars(args).items()}
    sizes = {"drift": min(args.drift_worlds, args.worlds), "rollouts": min(args.sheet_worlds, args.worlds)}
    benches = {}
    results: Results = {}
    seconds: dict[str, float] = {}
    for name in tests:
        began, worlds = time.monotonic(), sizes.get(name, args.worlds)
        try:
            if worlds not in benches:
                benches[worlds] = make_benches(model, text_encoder, worlds, args.batch, args.seed, args.steps)
            figures, sheet = run_test(name, benches[worlds])
        except Exception:  # the other tests are worth having: this run may be on a rented machine
            print(f"{name} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            continue
        if sheet:
            write_sheet(sheet, args.out / f"{name}.png")
        results[name], seconds[name] = figures, time.monotonic() - began
        headline = [*(row.measure for row in ROWS if row.test == name), "wrong", "gain", "sharpness"]
        shown = ", ".join(f"{key} {figures[key].mean:.2f}" for key in headline if key in figures)
        print(f"{name}: {seconds[name]:.1f} s  {shown}", flush=True)
        plain = {test: {k: dataclasses.asdict(f) for k, f in found.items()} for test, found in results.items()}
        report = {"settings": settings, "seconds": seconds, "tests": plain}
        (args.out / "evaluation.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        (args.out / "evaluation.md").write_text(table(results), encoding="utf-8")
    print(f"\n{table(results)}\n{sum(seconds.values()):.0f} s; written to {args.out}", flush=True)
    return len(results) == len(tests)


def main() -> None:
    args = parse_args()
    model = load(args.model, args.device)
    dtype = pick_dtype(model.device, getattr(torch, model.config.amp_dtype))
    if not evaluate(args, model, load_text_encoder(model.config, model.device, dtype)):
        sys.exit(1)


if __name__ == "__main__":
    main()
