"""Times a chunk on several devices of this host against one of them, and says how far its latents are apart.

    torchrun --nproc-per-node 4 scripts/bench_team.py --model infinite-world

As in `benchmark.py` the sizes are a model's and the weights random, made in memory, the same on each device.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from infworld import parallel
from infworld.config import load_config
from infworld.models import device_name
from infworld.rollout import Progress, Session, World, pick_device, pick_dtype, pick_vae_dtype
from scripts.bench_model import NoiseText, noise_session, picture_size, random_world


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a chunk on several devices against one.")
    parser.add_argument("--model", default="infinite-world")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--history", type=int, default=101, help="latents of history: 1, 21, 41, ... (default 101)")
    args = parser.parse_args()
    device = pick_device(parallel.own_device(args.device))
    config = load_config(args.model)
    dtype = pick_dtype(device, getattr(torch, config.amp_dtype))
    with parallel.joined(device) as team:
        one, _ = random_world(config, device, dtype, pick_vae_dtype(device, dtype))
        size = picture_size(config)
        session = noise_session(one, size, args.history)
        alone = measure(one, session, "one")
        if team:
            together = World(config, one.transformer, one.vae, NoiseText(config), team)
            ours = measure(together, session, f"{team.size}")
            error = float((ours - alone).norm() / alone.norm())
            if team.first:
                print(f"relative error of the chunk's latents: {error:.1e}, on {team.size} x {device_name(device)}")


def measure(world: World, session: Session, devices: str) -> torch.Tensor:
    """Makes the session's next chunk twice, prints the second one's seconds by stage; returns its latents.

    On a GPU a stage may end later than it is heard of: the first that waits for it is "decode".
    """
    world.next_chunk(session)
    stages: dict[str, float] = {}
    last = began = time.perf_counter()

    def hear(progress: Progress) -> None:
        nonlocal last
        if world.device.type == "cuda" and progress.stage != "sample":
            torch.cuda.synchronize(world.device)
        now = time.perf_counter()
        stages[progress.stage] = stages.get(progress.stage, 0) + now - last
        last = now

    chunk = world.next_chunk(session, hear)
    now = time.perf_counter()
    if parallel.rank() == 0:
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in stages.items())
        print(f"{devices}: chunk {now - began:.2f} s ({parts}, encode and the rest {now - last:.2f})", flush=True)
    return chunk.latents


if __name__ == "__main__":
    main()
