"""Distills a model to a few steps a chunk, without guidance, on prepared videos (docs/own-videos.md).

infworld distill --model infinite-world --data DATA --out runs/fast
infworld generate --model runs/fast/model.yaml --image PICTURE --out film.mp4

The result is a LoRA and a config that names it with its sampler. The same command goes on with a run that was stopped.
Under torchrun several GPUs share each step.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

from infworld.cli.console import StopSignals, exit_code
from infworld.cli.film import LORA_OPTION
from infworld.cli.finetune import check_installed, embed_captions, first_on_rank_0, load_transformer
from infworld.cli.training_run import go_through
from infworld.devices import pick_vae_dtype
from infworld.loading import load_vae
from infworld.models import prepare, with_loras
from infworld.training.clips import ClipSampler
from infworld.training.distill import Distillation, Settings, few_step_sampler
from infworld.training.finetune import STAGES
from infworld.training.run import Log, compute_dtype, set_up_devices
from infworld.training.run_folder import RunFolder
from infworld.videos.dataset import open_data

OPTIONS = {  # of Settings, with what they mean
    "few": "sampler steps of a chunk afterwards",
    "rank": "of the LoRAs",
    "consistency": "steps of the first stage, on real latents",
    "matching": "steps of the second stage, on the student's own films",
    "lr": "learning rate of the first stage",
    "matching_lr": "of the second; its critic takes a fifth of it",
    "batch": "samples of a step, on all GPUs together",
    "rolled": "own chunks at most before the one that learns, in the second stage",
    "ema": "decay of the averaged weights, which are kept for use",
    "seed": "of all that is random",
}


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    with StopSignals() as stop:
        return exit_code(lambda: run(args, stop), "stopped; the same command goes on from what was saved last")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="tiny", metavar="NAME", help="infinite-world, tiny (default), or the path of a YAML file")
    add("--lora", **LORA_OPTION)
    add("--data", required=True, type=Path, metavar="DATA", help="folder that `infworld prepare-videos` wrote")
    add("--out", required=True, type=Path, metavar="RUN", help="folder of the run")
    add("--guidance", type=float, metavar="X", help="that is folded in; default: the model's own")
    for name, meaning in OPTIONS.items():
        default = getattr(Settings, name)
        add(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{meaning}; default: {default:g}")
    add("--every", type=int, default=250, metavar="N", help="save, measure and film every N steps; default: 250")
    args = parser.parse_args(arguments)
    if args.every < 1:
        parser.error("--every must be 1 or more")
    return args


def run(args: argparse.Namespace, stop: StopSignals) -> None:
    """The whole run. Raises ValueError or OSError for all that cannot work, most of it before the model is loaded."""
    check_installed()
    rank, _, device = set_up_devices()
    config = first_on_rank_0(lambda: with_loras(prepare(args.model), args.lora))
    scheduler = config.val_scheduler_cfg
    guidance = scheduler.text_cfg_scale if args.guidance is None else args.guidance
    settings = Settings(guidance=guidance, **{name: getattr(args, name) for name in OPTIONS})
    if guidance != 1:  # so that the negative prompt is encoded, and what is loaded has it
        config = dataclasses.replace(config, val_scheduler_cfg=dataclasses.replace(scheduler, text_cfg_scale=guidance))
    clips = open_data(args.data, config)
    folder = RunFolder(args.out, config, {"val_scheduler_cfg": few_step_sampler(scheduler, settings.few)})
    texts = first_on_rank_0(lambda: embed_captions(config, clips, device))
    sampler = ClipSampler(clips, texts, scheduler.shift, STAGES[1], settings.seed)
    vae = load_vae(config, device, pick_vae_dtype(compute_dtype(device)))
    training = Distillation(load_transformer(config, device), vae.requires_grad_(False), sampler, config, settings)
    if state := folder.state():
        training.load_state(state)
    log = Log(args.out, time.monotonic()) if rank == 0 else None

    def save(state: dict[str, Any], measured: dict[str, float]) -> None:
        facts = {"sampler_steps": settings.few, "guidance_folded_in": guidance, "steps": training.step_number}
        folder.save_lora(state, settings.rank, facts | measured, "average")

    def film() -> Path:
        return folder.film(sampler.held_out[-1][0], device, training.step_number)

    go_through(training, training.step, save, film, settings.steps, args.every, log, stop)
