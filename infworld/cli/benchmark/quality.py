"""The benchmark's accuracy: how far exact is from naive, and what the VAE's rounding costs the picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from infworld.cli.benchmark.harness import Benchmark, film_histories, guidance_of, naive_kernels, relative_error
from infworld.cli.benchmark.model import noise, noise_session, plain_velocity, random_world
from infworld.cli.benchmark.record import name_of, total
from infworld.config import PROJECT_ROOT, ModelConfig, TextConfig, TransformerConfig, load_config
from infworld.loading import load_vae
from infworld.pictures import prepare_image
from infworld.sampler import sample, schedule
from infworld.session import Session
from infworld.world import World

WAYS = ("exact", "naive")
# In float32 the fast way and the plain one are compared closely, with a transformer that is small enough for it.
SMALL = TransformerConfig(
    dim=192, ffn_dim=512, num_heads=4, num_layers=4, caption_channels=64,
    memory_hidden_dim=32, memory_num_heads=2, action_embed_dim=32, action_hidden_dim=64,
)  # fmt: skip
SMALL_TEXT = TextConfig(dim=SMALL.caption_channels, model_max_length=32)
SMALL_SIZE, SMALL_HISTORY, SMALL_STEPS = (32, 48), 101, 4


def errors(bench: Benchmark) -> None:
    """How far the fast way is from the plain one: ||a - b|| / ||b|| of a whole chunk's latents, same noise."""
    small = dataclasses.replace(bench.config, model_cfg=SMALL, text_encoder_cfg=SMALL_TEXT)
    sampler = dataclasses.replace(small.val_scheduler_cfg, num_sampling_steps=SMALL_STEPS, text_cfg_scale=5.0)
    small = dataclasses.replace(small, val_scheduler_cfg=sampler, buckets=(SMALL_SIZE,))
    world, _ = random_world(small, bench.device, torch.float32, torch.float32)
    with torch.backends.cudnn.flags(allow_tf32=False):
        error = chunk_error(bench, world, noise_session(world, SMALL_SIZE, SMALL_HISTORY))
    note = f"history {SMALL_HISTORY}, {SMALL_STEPS} steps"
    bench.record.put("error of a chunk, float32 at small size", error, "", note)

    history = film_histories(bench.config, 2)[-1]
    name, steps = f"error of a chunk, {name_of(bench.dtype)}", [f"{w}: step, history {history}" for w in WAYS]
    both = total([bench.record[step] for step in steps])
    if bench.record.allows(name, both and 1.1 * bench.steps * both):
        error = chunk_error(bench, bench.world, bench.session(history))
        bench.record.put(name, error, "", f"history {history}, {bench.steps} steps, guidance {guidance_of(bench):g}")


@torch.inference_mode()
def chunk_error(bench: Benchmark, world: World, session: Session) -> float:
    height, width = session.picture.shape[1:3]
    z = noise(world.config, (height, width), world.config.chunk_latents).to(bench.device)
    timesteps = schedule(world.config.val_scheduler_cfg, session.settings.steps)
    ours = sample(world.velocity(session), z, timesteps)
    with naive_kernels(bench):
        plain = sample(plain_velocity(world, session), z, timesteps)
    return relative_error(ours, plain)


@torch.inference_mode()
def vae_quality(bench: Benchmark) -> None:
    """What the VAE's rounding costs the picture: with the shipped, trained weights and a pan over an example."""
    tiny = load_config("tiny")
    video = pan(PROJECT_ROOT / "examples" / "2-autumn-walk-and-return.png", tiny).to(bench.device)
    note = f"trained VAE of the tiny model, {video.shape[2]} frames of {video.shape[3]}x{video.shape[4]}"
    exact = load_vae(tiny, bench.device, torch.float32)
    latents = exact.encode(video)[0]
    true = exact.decode(latents)
    bench.record.put("vae quality: float32 against the film", psnr(true, video), "dB", note)
    dtype = next(bench.world.vae.parameters()).dtype
    if dtype != torch.float32:
        rounded, name = load_vae(tiny, bench.device, dtype), name_of(dtype)
        rounded_latents = rounded.encode(video)[0]
        ours = rounded.decode(rounded_latents)
        bench.record.put(f"vae quality: {name} against the film", psnr(ours, video), "dB", note)
        bench.record.put(f"vae quality: {name} against float32", psnr(ours, true), "dB", note)
        bench.record.put(
            f"vae quality: {name}, error of the latents", relative_error(rounded_latents, latents), "", note
        )


def pan(picture: Path, config: ModelConfig, frames: int = 13) -> Tensor:
    """A film of a picture that moves a pixel to the side per frame: float32 1 3 T H W."""
    still = prepare_image(picture, config.buckets)
    return torch.cat([still.roll(shift, dims=-1) for shift in range(frames)], dim=2)


def psnr(a: Tensor, b: Tensor) -> float:
    """Decibels, of values in [-1, 1]."""
    return float(10 * torch.log10(4 / (a - b).square().mean()))
