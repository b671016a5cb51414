"""Times a step of fine-tuning and says how much GPU memory it takes, for a LoRA, the paper's parts and distillation.

    infworld benchmark finetune --model infinite-world
    torchrun --nproc-per-node 4 -m infworld benchmark finetune --model infinite-world --shard fsdp

As in `infworld benchmark` the sizes are a model's, and weights and clips random, so no files are needed. Each GPU takes
one sample a step; with several, samples a second tell how they scale.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from infworld.cli.benchmark.model import NoiseText, picture_size
from infworld.config import ModelConfig, load_config
from infworld.devices import device_name, pick_vae_dtype
from infworld.dit import InfiniteWorldTransformer
from infworld.training import distill, finetune
from infworld.training.clips import ClipSampler
from infworld.training.parts import LORA_PARTS, PAPER
from infworld.training.run import compute_dtype, finish, leave_together, peak_gib, set_up_devices
from infworld.training.sharing import WAYS
from infworld.vae import build_vae
from infworld.videos.dataset import FOLDER, Clip, ClipInfo, write_clip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="infinite-world", help="whose sizes; default: infinite-world")
    add("--histories", default="1,4,16", help="chunks of history; default: 1,4,16")
    add("--lora-rank", type=int, default=32, help="default: 32")
    add("--shard", choices=WAYS, default="ddp", help="with several GPUs, as of `infworld finetune`")
    add("--parts", default="lora,paper,distill", help="what to measure; default: lora,paper,distill")
    add("--out", type=Path, metavar="FILE", help="write the figures there too, as JSON")
    args = parser.parse_args(arguments)
    rank, ranks, device = set_up_devices()
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for figure in measured(args, device, ranks, Path(folder)):
            figures.append(figure)
            if rank == 0:
                print(json.dumps(figure), flush=True)
    if args.out and rank == 0:
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    leave_together(ranks)
    return 0


def measured(args: argparse.Namespace, device: torch.device, ranks: int, folder: Path) -> Iterator[dict]:
    """A figure for each part and history; what does not fit into the memory says so."""
    config, histories = load_config(args.model), [int(text) for text in args.histories.split(",")]
    clip = noise_clip(folder / FOLDER / "noise.safetensors", config, 5 + max(histories))
    texts = {text: NoiseText(config).encode([text]) for text in ("", config.negative_prompt)}
    sampler = ClipSampler([clip], texts, config.val_scheduler_cfg.shift, max(histories), 0)
    common = {"on": f"{ranks} x {device_name(device)}", "shard": args.shard if ranks > 1 else ""}
    for part in args.parts.split(","):
        if part == "distill":
            training = distillation(config, sampler, device, ranks, args.lora_rank)
            for stage, first in (("consistency", 0), ("matching", 1)):
                yield {"part": f"distill, {stage}", **common, **timed_step(training, first)}
        else:
            chosen: dict = {"rank": args.lora_rank, "parts": LORA_PARTS} if part == "lora" else {"parts": PAPER}
            settings = finetune.Settings(batch=ranks, **chosen)
            training = finetune.Finetuning(random_transformer(config, device), sampler, settings, way=args.shard)
            for chunks in histories:
                yield {"part": part, "history_chunks": chunks, **common, **rehearsed(training, chunks, ranks)}
        del training
        gc.collect()
        torch.cuda.empty_cache()


def rehearsed(training: finetune.Finetuning, chunks: int, ranks: int) -> dict:
    try:
        found = training.rehearse(chunks)
    except torch.OutOfMemoryError:
        return {"fits": False}
    return {"seconds_a_step": found.seconds, "gib": found.gib, "samples_a_second": ranks / found.seconds}


def timed_step(training: distill.Distillation, first: int) -> dict:
    """One step of a stage of a distillation; the one before warms up."""
    try:
        for _ in range(2):
            training.step_number = first
            finish(training.device)
            began = time.monotonic()
            training.step()
            finish(training.device)
    except torch.OutOfMemoryError:
        return {"fits": False}
    return {"seconds_a_step": time.monotonic() - began, "gib": peak_gib(training.device)}


def distillation(
    config: ModelConfig, sampler: ClipSampler, device: torch.device, ranks: int, rank: int
) -> distill.Distillation:
    """Both stages of one step each, with the model's guidance."""
    guidance = config.val_scheduler_cfg.text_cfg_scale
    settings = distill.Settings(guidance=guidance, rank=rank, consistency=1, matching=1, batch=ranks)
    with torch.device(device):
        vae = build_vae(config.vae_cfg).to(pick_vae_dtype(compute_dtype(device))).eval().requires_grad_(False)
    return distill.Distillation(random_transformer(config, device), vae, sampler, config, settings)


def random_transformer(config: ModelConfig, device: torch.device) -> InfiniteWorldTransformer:
    torch.manual_seed(0)  # the same on every GPU
    with torch.device(device):
        return InfiniteWorldTransformer(config.model_cfg).to(compute_dtype(device)).eval()


def noise_clip(path: Path, config: ModelConfig, chunks: int) -> Clip:
    """A clip of noise at the size that benchmarks take."""
    height, width = picture_size(config)
    new, frames, space = config.chunk_latents - 1, 1 + chunks * config.chunk_frames, config.vae_cfg.space
    latent = config.vae_cfg.z_dim, height // space, width // space
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {
        **{"history": noise(1 + chunks * new, *latent), "targets": noise(chunks, 1 + new, *latent)},
        "picture": torch.zeros(height, width, 3),
        **{name: torch.randint(9, (frames,), generator=generator) for name in ("move", "view")},
        "poses": torch.full((frames, 4, 4), torch.nan),
        "returns": torch.full((frames,), -1),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_clip(path, ClipInfo("noise", 0.0, frames / 30, config.name, ""), tensors)
    return Clip(path)
