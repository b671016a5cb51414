"""The experiment of docs/own-videos.md: some minutes of film of a style of world that a model has never seen.

    python -m infworld.training.own_style films --out runs/style
    infworld finetune --model tiny --data runs/style --out runs/style-lora --lora-rank 16
    python -m infworld.training.own_style measure --models tiny runs/style-lora/model.yaml

The style is that of the toy worlds with their colours exchanged: violet meadows under green skies, and nothing is said
of them in captions. `films` writes clips of walks through a few such worlds, as `infworld prepare-videos` would of
videos with perfect poses. `measure` compares models on other walks through the same places, and through places of the
style that no clip shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from infworld.config import ModelConfig
from infworld.devices import pick_dtype, pick_vae_dtype
from infworld.loading import load, load_vae
from infworld.measures import psnr
from infworld.models import prepare
from infworld.presets import find_preset
from infworld.text import load_text_encoder
from infworld.training.films import Bench, next_chunk, same_script, true_film, true_walk
from infworld.training.flow import condition, memory_gap
from infworld.training.frames import to_frames, to_video
from infworld.training.measures import sharpness
from infworld.training.render import render
from infworld.training.walks import MIXED, revisits, sample_actions
from infworld.training.worlds import EVAL_SEEDS, make_worlds, spawn, walk
from infworld.vae import VideoVAE
from infworld.videos.dataset import FOLDER, ClipInfo, vae_fingerprint, write_clip

EXCHANGED = [1, 2, 0]  # what is shown as red, green and blue
GAP_CHUNKS = 2  # of history, where errors at pure noise are measured


class StyleBench(Bench):
    """B worlds of the style."""

    def render(self, poses: Tensor) -> Tensor:
        return super().render(poses)[..., EXCHANGED]


@torch.no_grad()
def write_films(out: Path, config: ModelConfig, vae: VideoVAE, seeds: range, walks: int, chunks: int) -> None:
    """Clips of `walks` walks of `chunks` chunks through each of the worlds."""
    frames, step, size = 1 + chunks * config.chunk_frames, config.chunk_frames, config.buckets[0]
    worlds, fingerprint = make_worlds(seeds), vae_fingerprint(config)
    generator = torch.Generator().manual_seed(0)
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    for number in range(walks * len(seeds)):
        place = [number % len(seeds)]
        move, view = sample_actions(MIXED, 1, frames, generator)
        poses = walk(worlds[place], spawn(worlds[place]), move[:, :-1], view[:, :-1])
        shown = render(worlds[place], poses, *size)[..., EXCHANGED]
        video = to_video(shown, vae.conv1.weight.dtype)
        parts, state = [], None
        for first, last in [(0, 1), *((1 + i * step, 1 + (i + 1) * step) for i in range(chunks))]:
            latents, state = vae.encode(video[:, :, first:last], state)
            parts.append(latents)
        targets = [vae.encode(video[:, :, i * step : (i + 1) * step + 1])[0] for i in range(chunks)]
        tensors = {
            "history": torch.cat(parts, 2)[0].movedim(0, 1),
            "targets": torch.stack([target[0].movedim(0, 1) for target in targets]),
            **{"picture": shown[0, 0], "move": move[0], "view": view[0]},
            "poses": torch.full((frames, 4, 4), torch.nan),
            "returns": revisits(poses)[0],
        }
        info = ClipInfo(f"world {seeds[place[0]]}", 0.0, frames / 30, config.name, fingerprint)
        write_clip(out / FOLDER / f"walk-{number:03d}.safetensors", info, tensors)
        print(f"{number + 1} of {walks * len(seeds)} walks", flush=True)


@torch.inference_mode()
def measure(name: str, seeds: range, films: bool = True, seed: int = 1) -> dict[str, float]:
    """Means over the worlds of a model's errors at pure noise, as in training, and, with `films`, of what it films in
    one chunk from the first frame.

    turn: PSNR (dB) after ten frames to the right; return: after 40 to the right and 40 back; forward: after 40 forward
    and 40 back; sharpness: of the last over the truth's.
    """
    config = prepare(name)
    world = load(config, "cpu")
    dtype = pick_dtype(world.device, getattr(torch, config.amp_dtype))
    text = load_text_encoder(world.config, world.device, dtype).encode([""] * len(seeds))
    context = world.transformer.embed_text(text.hidden, text.mask)
    preset = find_preset("fast")
    steps = preset.sampler_steps(config.val_scheduler_cfg)
    bench = StyleBench(world, make_worlds(seeds), context, seed, steps, preset)
    found = errors_at_noise(bench, text.hidden, text.mask, seed)
    if films:
        half, far = bench.chunk // 2, bench.chunk // 8
        turned, truth = one_chunk(bench, f"right {half}, left {half}")
        gone, way = one_chunk(bench, f"forward {half}, back {half}")
        found["turn"] = psnr(turned[:, far : far + 1], truth[:, far : far + 1]).mean().item()
        found["return"] = psnr(turned[:, -1:], truth[:, -1:]).mean().item()
        found["forward"] = psnr(gone[:, -1:], way[:, -1:]).mean().item()
        found["sharpness"] = (sharpness(gone[:, -1:]).sum() / sharpness(way[:, -1:]).sum()).item()
    return found


def one_chunk(bench: Bench, script: str) -> tuple[Tensor, Tensor]:
    """What the model films from the first frame, and the truth."""
    actions = same_script(bench, script)
    truth = true_walk(bench, actions)
    return to_frames(next_chunk(bench, true_film(bench, truth[:, :1]), actions)), truth


def errors_at_noise(bench: StyleBench, text: Tensor, mask: Tensor, seed: int) -> dict[str, float]:
    """`flow.memory_gap` of a chunk of a walk that turns and comes back; the wrong memory is another world's."""
    model, vae, chunk = bench.model.transformer, bench.model.vae, bench.chunk
    actions = same_script(bench, f"right {chunk}, forward {chunk // 2}, back {chunk // 2}, left {chunk + 1}")
    poses = walk(bench.worlds, spawn(bench.worlds), *actions[:, :, :-1].unbind(1))
    video = to_video(bench.render(poses), vae.conv1.weight.dtype)
    history, state = vae.encode(video[:, :, :1])
    for i in range(GAP_CHUNKS):
        latents, state = vae.encode(video[:, :, 1 + i * chunk : 1 + (i + 1) * chunk], state)
        history = torch.cat([history, latents], dim=2)
    target = vae.encode(video[:, :, GAP_CHUNKS * chunk :])[0].float()
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(seed))
    move, view = actions[:, :, GAP_CHUNKS * chunk :].unbind(1)

    def velocity(wrong: bool):
        given = condition(model, history, move, view, text, mask, wrong_memory=wrong)
        return lambda noisy, t: model.denoise(noisy, t, given.stream, given.actions, given.context)

    return memory_gap(velocity, target, noise)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("films", "measure"):
        command = commands.add_parser(name)
        command.add_argument("--places", type=int, default=7, help="worlds; default: 7")
    films, measured = commands.choices["films"], commands.choices["measure"]
    films.add_argument("--model", default="tiny", help="whose VAE and sizes; default: tiny")
    films.add_argument("--out", type=Path, required=True)
    films.add_argument("--walks", type=int, default=2, help="through each world; default: 2")
    films.add_argument("--chunks", type=int, default=8, help="of each walk; default: 8")
    measured.add_argument("--models", nargs="+", required=True, help="names or YAML files")
    measured.add_argument("--films", action=argparse.BooleanOptionalAction, default=True, help="film, or errors alone")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    known = range(EVAL_SEEDS.start, EVAL_SEEDS.start + args.places)
    if args.command == "films":
        config = prepare(args.model)
        device = torch.device("cpu")
        vae = load_vae(config, device, pick_vae_dtype(pick_dtype(device, getattr(torch, config.amp_dtype))))
        write_films(args.out, config, vae, known, args.walks, args.chunks)
        return
    for places, seeds in {"same places": known, "other places": range(known.stop, known.stop + args.places)}.items():
        for name in args.models:
            found = measure(name, seeds, args.films)
            print(f"{places}, {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
