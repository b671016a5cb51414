"""Fine-tunes a model on prepared videos (docs/own-videos.md); the same command goes on with a run that was stopped.

infworld finetune --model infinite-world --data DATA --out runs/place --lora-rank 32
torchrun --nproc-per-node 8 -m infworld finetune --model infinite-world --data DATA --out runs/stage2 --stage 2
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from infworld.checkpoint import load_strict
from infworld.cli.console import StopSignals, exit_code
from infworld.cli.film import LORA_OPTION
from infworld.cli.training_run import go_through
from infworld.config import ModelConfig
from infworld.dit import InfiniteWorldTransformer
from infworld.loading import read_transformer
from infworld.models import prepare, with_loras
from infworld.text import TextEmbedding, open_text_encoder
from infworld.training.clips import ClipSampler
from infworld.training.finetune import STAGES, Finetuning, Settings
from infworld.training.parts import LORA_PARTS, PAPER, PARTS
from infworld.training.run import Log, compute_dtype, set_up_devices
from infworld.training.run_folder import RunFolder
from infworld.training.sharing import WAYS
from infworld.videos.dataset import Clip, open_data

LR, LORA_LR = 1e-5, 1e-4  # the paper's; the usual one of LoRAs

T = TypeVar("T")


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
    add("--stage", type=int, choices=STAGES, default=1, help="1: histories of 1 to 4 chunks (default); 2: of 1 to 16")
    add("--lora-rank", type=int, default=0, metavar="R", help="train a LoRA of this rank, not the parts themselves")
    add(
        "--parts",
        type=lambda text: tuple(text.split(",")),
        metavar="PART,...",
        help=f"of {','.join(PARTS)}; default: {','.join(PAPER)} as the paper, of a LoRA {','.join(LORA_PARTS)}",
    )
    add("--steps", type=int, default=1000, metavar="N", help="length of the run in all; default: 1000")
    add("--lr", type=float, metavar="X", help=f"learning rate; default: {LR:g}, of a LoRA {LORA_LR:g}")
    add("--batch", type=int, default=16, metavar="N", help="samples of a step on all GPUs together; default: 16")
    add("--at-once", type=int, default=1, metavar="N", help="samples that a GPU takes at a time; default: 1")
    add("--ema", type=float, default=0.99, metavar="X", help="decay of the averaged weights, which are kept for use")
    add("--seed", type=int, default=0, metavar="N")
    add("--shard", choices=WAYS, default="ddp", help="several GPUs: whole models (ddp, default) or split ones (fsdp)")
    add(
        "--every",
        type=int,
        default=250,
        metavar="N",
        help="save, measure the memory and film a held-out walk every N steps; default: 250",
    )
    add("--dry-run", action="store_true", help="only say what a step takes of time and memory")
    args = parser.parse_args(arguments)
    if args.steps < 1 or args.every < 1:
        parser.error("--steps and --every must be 1 or more")
    return args


def check_installed() -> None:
    """Raises ValueError where the extra `train` is not installed, before hours of work."""
    for package in ("matplotlib", "peft"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"training needs {package}: pip install 'infworld[train]'")


def settings_of(args: argparse.Namespace) -> Settings:
    """Raises ValueError for what cannot be."""
    parts = args.parts or (LORA_PARTS if args.lora_rank else PAPER)
    lr = args.lr or (LORA_LR if args.lora_rank else LR)
    named = {"batch": args.batch, "at_once": args.at_once, "ema": args.ema, "seed": args.seed}
    return Settings(stage=args.stage, parts=parts, rank=args.lora_rank, lr=lr, **named)


def run(args: argparse.Namespace, stop: StopSignals) -> None:
    """The whole run. Raises ValueError or OSError for all that cannot work, most of it before the model is loaded."""
    check_installed()
    settings = settings_of(args)
    rank, _, device = set_up_devices()
    config = first_on_rank_0(lambda: with_loras(prepare(args.model), args.lora))
    clips = open_data(args.data, config)
    folder = RunFolder(args.out, config)
    training = make_training(config, clips, settings, device, args.shard)
    if state := folder.state():
        training.load_state(state)
    log = Log(args.out, time.monotonic()) if rank == 0 else None
    if args.dry_run or device.type == "cuda":  # a CPU's memory is large, and its steps are slow
        rehearse(training, log)
    if args.dry_run:
        return
    facts = {"stage": args.stage, "parts": ",".join(settings.parts), "learning_rate": settings.lr, "clips": len(clips)}

    def save(state: dict[str, Any], measured: dict[str, float]) -> None:
        if settings.rank:
            folder.save_lora(state, settings.rank, facts | {"steps": training.step_number} | measured)
        else:
            folder.save(state)

    def film() -> Path:
        return folder.film(training.sampler.held_out[-1][0], device, training.step_number, "fast")

    go_through(training, lambda: {"loss": training.step()}, save, film, args.steps, args.every, log, stop)


def make_training(
    config: ModelConfig, clips: list[Clip], settings: Settings, device: torch.device, way: str
) -> Finetuning:
    """The model, ready for its first step. Raises ValueError for too little data, and errors of loading."""
    scheduler = config.val_scheduler_cfg
    texts = first_on_rank_0(lambda: embed_captions(config, clips, device))
    sampler = ClipSampler(clips, texts, scheduler.shift, STAGES[settings.stage], settings.seed)
    transformer = load_transformer(config, device)
    return Finetuning(transformer, sampler, settings, reversed_velocity=scheduler.use_reversed_velocity, way=way)


def load_transformer(config: ModelConfig, device: torch.device) -> InfiniteWorldTransformer:
    """To be trained: in the dtype that the device computes in."""
    return load_strict(
        lambda: InfiniteWorldTransformer(config.model_cfg),
        read_transformer(config),
        where=config.path(config.checkpoint_path),
        device=device,
        dtype=compute_dtype(device),
    )


def embed_captions(config: ModelConfig, clips: list[Clip], device: torch.device) -> Mapping[str, TextEmbedding]:
    """Every caption, the empty one and, of a model with guidance, the negative prompt, on the CPU."""
    encoder = open_text_encoder(config, device, compute_dtype(device))
    captions = {"", *(clip.info.caption for clip in clips)}
    if config.val_scheduler_cfg.text_cfg_scale != 1:
        captions.add(config.negative_prompt)  # for films, and what guidance goes away from
    with torch.no_grad():
        return {caption: encoder.encode([caption]).to("cpu") for caption in captions}


def rehearse(training: Finetuning, log: Log | None) -> None:
    """Says what the steps will take, with the longest history first. Raises ValueError where that does not fit."""
    for chunks in sorted({training.sampler.most, min(4, training.sampler.most), 1}, reverse=True):
        try:
            found = training.rehearse(chunks)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"a step with {chunks} chunks of history does not fit into this GPU's memory: use --at-once 1, a LoRA "
                "(--lora-rank 16), several GPUs (--shard fsdp), or --stage 1"
            ) from error
        if log:
            log.add("rehearsal", chunks=chunks, seconds=found.seconds, gib=found.gib)
            print(found)


def first_on_rank_0(work: Callable[[], T]) -> T:
    """What `work` returns on every process; where it keeps something on the disk, rank 0 has done so before."""
    if dist.is_initialized() and dist.get_rank():
        dist.barrier()
        return work()
    result = work()
    if dist.is_initialized():
        dist.barrier()
    return result
