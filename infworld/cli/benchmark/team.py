"""Times a chunk on several devices of this host against one of them, and says how far its latents are apart.

    torchrun --nproc-per-node 4 -m infworld benchmark team --model infinite-world

As in `infworld benchmark` the sizes are a model's and the weights random, made in memory, the same on each device. A
chunk of fewer steps than the preset's is enough: the time of a whole one is put together from its parts, and a film's
from chunks like it, which take as long as any.
"""

from __future__ import annotations

import argparse
import time

import torch

from infworld import parallel
from infworld.cli.benchmark.model import NoiseText, noise_session, picture_size, random_world
from infworld.config import load_config
from infworld.devices import device_name, pick_device, pick_dtype, pick_vae_dtype
from infworld.presets import EXACT, PRESETS, find_preset
from infworld.progress import Progress
from infworld.session import Session
from infworld.world import World

CHUNKS = 13  # of a film of 1041 frames


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a chunk on several devices against one.")
    parser.add_argument("--model", default="infinite-world")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--history", type=int, default=101, help="latents of history: 1, 21, 41, ... (default 101)")
    parser.add_argument("--presets", default=EXACT.name, help=f"some of {','.join(PRESETS)} (default: {EXACT.name})")
    parser.add_argument("--steps", type=int, help="time at most so many steps of a chunk; default: all of the preset's")
    args = parser.parse_args()
    device = pick_device(parallel.device_of_rank(args.device))
    config = load_config(args.model)
    dtype = pick_dtype(device, getattr(torch, config.amp_dtype))
    with parallel.join_team(device) as team:
        one, _ = random_world(config, device, dtype, pick_vae_dtype(dtype))
        together = World(config, one.transformer, one.vae, NoiseText(config), team) if team else None
        session = noise_session(one, picture_size(config), args.history)
        for name in args.presets.split(","):
            steps = find_preset(name).sampler_steps(config.val_scheduler_cfg)
            measured = session.replace_settings(preset=name, steps=min(steps, args.steps or steps))
            alone = measure(one, measured, f"{name}, one", steps)
            if team and together:
                ours = measure(together, measured, f"{name}, {team.size}", steps)
                error = float((ours - alone).norm() / alone.norm())
                if team.is_rank0:
                    print(
                        f"relative error of the chunk's latents: {error:.1e}, on {team.size} x {device_name(device)}",
                        flush=True,
                    )


def measure(world: World, session: Session, what: str, steps: int) -> torch.Tensor:
    """Makes the session's next chunk and prints its seconds by stage, and what they come to with so many steps and for
    a film; returns its latents. A chunk of one step comes before, to warm up.

    On a GPU a step may end later than it is heard of: the last ones' time is waited for with the last.
    """
    world.next_chunk(session.replace_settings(steps=1))
    stages: dict[str, float] = {}
    last = began = time.perf_counter()

    def hear(progress: Progress) -> None:
        nonlocal last
        if world.device.type == "cuda" and (progress.stage != "sample" or progress.step == session.settings.steps):
            torch.cuda.synchronize(world.device)
        now = time.perf_counter()
        stages[progress.stage] = stages.get(progress.stage, 0) + now - last
        last = now

    chunk = world.next_chunk(session, hear)
    now = time.perf_counter()
    stages["encode and the rest"] = now - last
    if parallel.rank() == 0:
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in stages.items())
        whole = now - began + stages["sample"] * (steps / session.settings.steps - 1)
        print(
            f"{what}: chunk of {session.settings.steps} steps {now - began:.2f} s ({parts}); "
            f"of {steps} steps {whole:.2f} s; {CHUNKS} like it {CHUNKS * whole:.1f} s",
            flush=True,
        )
    return chunk.latents
