"""Measures a trained tiny model against the truth, on worlds that training never drew.

    infworld evaluate --model tiny --device cuda --out runs/evaluation
    infworld evaluate --tests turn,circle --worlds 16      # only some tests
    infworld evaluate --tests rollouts --worlds 6          # only the picture of the model's own films
    infworld evaluate --photos measure.zip                 # on photographs as well

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
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infworld.actions import MOVES, VIEWS, Segment, words
from infworld.config import FRAMES_PER_LATENT
from infworld.devices import pick_dtype
from infworld.dit import TextContext
from infworld.loading import load
from infworld.measures import psnr, to_db
from infworld.presets import PRESETS
from infworld.text import load_text_encoder
from infworld.training.films import (
    Bench,
    Film,
    LiveMemory,
    PhotoBench,
    free_starts,
    live_film,
    make_bench,
    make_photo_bench,
    next_chunk,
    own_film,
    random_script,
    same_script,
    true_film,
    true_walk,
)
from infworld.training.frames import to_frames, to_video
from infworld.training.measures import Figure, colours, contrast, raster, ratio, saturation, sharpness, summarize
from infworld.training.pictures import load_pictures
from infworld.training.report import DRIFT_CHUNKS, ROWS, Results, Strip, strips, table, write_sheet
from infworld.training.stages import stroll
from infworld.training.walks import MIXED
from infworld.training.worlds import EVAL_SEEDS, FIELD_OF_VIEW, STEP, TURN, walk
from infworld.world import World

KNOWN_ACTIONS = 9  # of moves and of views: all but *uncertain*
WANDER_CHUNKS = 8  # between visit and return in the far tests


@dataclass(frozen=True)
class Outcome:
    """What a test found in one batch of worlds, and rows for the contact sheet.

    Each measure is one number per world (B,), or two whose means are divided (B, 2); NaN where a world does not count.
    """

    measures: dict[str, Tensor]
    sheet: list[Strip] = field(default_factory=list)


# --- tests


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


def measure_live_turn(bench: Bench) -> Outcome:
    """The model's own live walk: turn right 80 and back."""
    return _live_visit(bench, f"right {bench.chunk}, left {bench.chunk}")


def measure_live_circle(bench: Bench) -> Outcome:
    """The model's own live walk: a full circle, and on to what the first chunk showed."""
    return _live_visit(bench, f"right {4 * bench.chunk + bench.live_frames}")


def measure_live_forward(bench: Bench) -> Outcome:
    """The model's own live walk: walk forward 80 and back."""
    return _live_visit(bench, f"forward {bench.chunk}, back {bench.chunk}")


def _live_visit(bench: Bench, text: str) -> Outcome:
    """All of a script in short chunks, whose memory is kept; the last chunk against the first, which it shows again.

    *Wrong*: the last 80 frames once more, with another world's compressed memory, their own last latent before and
    their own latents since.
    """
    script, short = same_script(bench, text), bench.live_frames
    start = true_film(bench, bench.render(free_starts(bench, script[:, None])[:, None]))
    memory, chunks = LiveMemory(), (script.shape[2] - bench.chunk) // short
    film = live_film(bench, start, script, chunks, memory)
    films = [live_film(bench, film, script, bench.chunk // short, each) for each in (LiveMemory(wrong=True), memory)]
    wrong, right = (made.frames[:, -short:] for made in films)
    circle = "," not in text
    seen = films[1].frames[:, 1 : short + 1] if circle else films[1].frames[:, :short].flip(1)
    return Outcome(
        {
            "value": psnr(right, seen).mean(1),
            "wrong": psnr(wrong, seen).mean(1),
            "gain": (psnr(right, seen) - psnr(wrong, seen)).mean(1),
            "sharpness": ratio(sharpness, right, seen),
        },
        strips(
            {"own": films[1].frames, "wrong": films[0].frames}, range(0, script.shape[2] + 1, script.shape[2] // 16)
        ),
    )


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
    similarity = to_db(torch.cdist(a, b).square() / a.shape[2]).unflatten(2, (KNOWN_ACTIONS, length))
    index = torch.arange(length, device=frames.device)
    near = (index[first:, None] - index).abs() <= reach
    best = similarity.masked_fill(~near[:, None], -torch.inf).amax(3)
    return best.mean(1).argmax(1)


def measure_words(bench: Bench) -> Outcome:
    """Turn right 80 from one picture, prompted with the world's own caption and with its neighbour's.

    "value": the share of worlds in which the neighbour's words bring the colours of what comes into sight nearer to
    those of the neighbour's world; 50 % is chance. "own words": PSNR against the truth over that with the neighbour's.
    """
    script = same_script(bench, f"right {bench.chunk}")
    truth = true_walk(bench, script)
    film = true_film(bench, truth[:, :1])
    others = TextContext(tuple((keys.roll(1, 0), values.roll(1, 0)) for keys, values in bench.context.keys_values))
    own = to_frames(next_chunk(bench, film, script))
    other = to_frames(next_chunk(dataclasses.replace(bench, context=others), film, script))
    part = slice(-(bench.chunk // 4), None)
    wanted = colours(truth[:, part]).roll(1, 0)
    nearer = (colours(other[:, part]) - wanted).norm(dim=1) < (colours(own[:, part]) - wanted).norm(dim=1)
    gain = psnr(own[:, part], truth[:, part]).mean(1) - psnr(other[:, part], truth[:, part]).mean(1)
    rows = {"true": truth, "own words": own, "neighbour's words": other}
    return Outcome(
        {"value": 100 * nearer.float(), "own words": gain}, strips(rows, range(0, bench.chunk + 1, bench.chunk // 8))
    )


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


def measure_photo_turn(bench: PhotoBench) -> Outcome:
    """Ten frames to the right before a photograph; of the last, the part that the photograph showed from the start."""
    turned = bench.chunk // 8
    frames, truth = _photo_walk(bench, f"right {turned}")
    edge = math.tan(FIELD_OF_VIEW / 2)
    inside = FIELD_OF_VIEW / 2 - turned * TURN  # where the photograph's right edge has gone
    height, width = truth.shape[2:4]
    columns = slice(0, int(width * (math.tan(inside) / edge + 1) / 2))
    high = math.cos(FIELD_OF_VIEW / 2) / math.cos(inside)  # share of the height that its right edge fills there
    rows = slice(math.ceil(height * (1 - high) / 2), int(height * (1 + high) / 2))
    seen = (slice(None), slice(turned, turned + 1), rows, columns)
    return _photo_outcome(bench, frames, truth, frames[seen], truth[seen])


def measure_photo_return(bench: PhotoBench) -> Outcome:
    """40 frames to the right before a photograph and 40 back; the last frame against the photograph."""
    return _photo_return(bench, f"right {bench.chunk // 2}, left {bench.chunk // 2}")


def measure_photo_forward(bench: PhotoBench) -> Outcome:
    """40 frames into a photograph and 40 back; the last frame against the photograph."""
    return _photo_return(bench, f"forward {bench.chunk // 2}, back {bench.chunk // 2}")


def _photo_return(bench: PhotoBench, text: str) -> Outcome:
    frames, truth = _photo_walk(bench, text)
    return _photo_outcome(bench, frames, truth, frames[:, -1:], truth[:, :1])


def _photo_walk(bench: PhotoBench, text: str) -> tuple[Tensor, Tensor]:
    """What the model makes of a photograph in one chunk, and what there is to see (B, 81, H, W, 3)."""
    script = torch.nn.functional.pad(same_script(bench, text), (0, bench.chunk))[:, :, : bench.chunk]
    truth = bench.render(stroll(bench.stages, torch.zeros(len(script), 4, device=script.device), *script.unbind(1)))
    return to_frames(next_chunk(bench, true_film(bench, truth[:, :1]), script)), truth


def _photo_outcome(bench: PhotoBench, frames: Tensor, truth: Tensor, part: Tensor, reference: Tensor) -> Outcome:
    measures = {
        "value": psnr(part, reference).mean(1),
        "sharpness": ratio(sharpness, part, reference),
        "raster": 100 * raster(part),
        "true raster": 100 * raster(reference),
    }
    steps = range(0, frames.shape[1], (frames.shape[1] - 1) // 8)
    return Outcome(measures, strips({"true": truth, "model": frames}, steps))


PHOTO_TESTS: dict[str, Callable[[PhotoBench], Outcome]] = {
    "photo_turn": measure_photo_turn,
    "photo_return": measure_photo_return,
    "photo_forward": measure_photo_forward,
}
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
    "live_turn": measure_live_turn,
    "live_circle": measure_live_circle,
    "live_forward": measure_live_forward,
    "view": measure_view,
    "move": measure_move,
    "words": measure_words,
    "rollouts": measure_rollouts,
    "drift": measure_drift,
}
SLOW_TESTS = ("far_true", "drift")  # not run unless asked for


# --- the command


@torch.inference_mode()
def run_test(name: str, benches: Sequence[Bench]) -> tuple[dict[str, Figure], list[Strip]]:
    """One test over all batches: its figures, and the contact sheet of the first batch."""
    outcomes = [(TESTS | PHOTO_TESTS)[name](bench) for bench in benches]
    measures = {key: torch.cat([outcome.measures[key] for outcome in outcomes]) for key in outcomes[0].measures}
    return {key: summarize(values) for key, values in measures.items()}, outcomes[0].sheet


def make_benches(
    model: World, text_encoder, worlds: int, batch: int, seed: int, steps: int | None, preset: str | None = None
) -> list[Bench]:
    """The first evaluation worlds in batches of nearly equal size, at most `batch` each unless one would be alone."""
    count = max(1, min(-(-worlds // batch), worlds // 2))
    parts = np.array_split(np.array(EVAL_SEEDS[:worlds]), count)
    return [make_bench(model, text_encoder, part.tolist(), seed, steps, preset) for part in parts]


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny", help="model name or YAML")
    add("--device", default="auto")
    add("--worlds", type=int, default=64)
    add("--batch", type=int, default=64, help="worlds at a time")
    add("--tests", default="", help=f"all, or some of {','.join(TESTS)}; by default all but {','.join(SLOW_TESTS)}")
    add("--photos", type=Path, help=f"pack of training.collect --measuring, for {','.join(PHOTO_TESTS)}")
    add("--drift-worlds", type=int, default=16, help="worlds of the drift test, at most --worlds")
    add("--sheet-worlds", type=int, default=6, help="worlds of the rollouts sheet, at most --worlds")
    add("--preset", choices=PRESETS, help="of the sampler; by default the model's own")
    add("--steps", type=int, help="of the sampler; by default the preset's")
    add("--seed", type=int, default=0, help="of the noise and the random walks")
    add("--out", type=Path, default=Path("runs/evaluation"))
    return parser.parse_args(arguments)


def chosen_tests(text: str, photos: bool = False) -> list[str]:
    """The tests that a --tests argument names, those on photographs if there are any. ValueError for an unknown one."""
    known = [*TESTS, *PHOTO_TESTS] if photos else list(TESTS)
    if not text:
        return [name for name in known if name not in SLOW_TESTS]
    names = known if text == "all" else [name.strip() for name in text.split(",")]
    if set(names) & set(PHOTO_TESTS) and not photos:
        raise ValueError(f"{', '.join(PHOTO_TESTS)} need --photos")
    if unknown := set(names) - set(known):
        raise ValueError(f"unknown tests {sorted(unknown)}: known are {', '.join(known)}")
    return names


def evaluate(args: argparse.Namespace, model: World, text_encoder) -> bool:
    """Runs the chosen tests and writes what they found after each, so that a failing test costs only itself.

    Returns whether all went through.
    """
    tests = chosen_tests(args.tests, args.photos is not None)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) for key, value in vars(args).items()}
    sizes = {"drift": min(args.drift_worlds, args.worlds), "rollouts": min(args.sheet_worlds, args.worlds)}
    benches: dict[int | str, Sequence[Bench]] = {}
    results: Results = {}
    seconds: dict[str, float] = {}
    for name in tests:
        began, worlds = time.monotonic(), sizes.get(name, args.worlds)
        try:
            places = "photos" if name in PHOTO_TESTS else worlds
            if places not in benches:
                sampler = args.seed, args.steps, args.preset
                if places == "photos":
                    photos = load_pictures(args.photos).photos
                    benches[places] = [make_photo_bench(model, text_encoder, photos, *sampler)]
                else:
                    benches[places] = make_benches(model, text_encoder, worlds, args.batch, *sampler)
            figures, sheet = run_test(name, benches[places])
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
