"""Films on one or several devices of this host, measured whole, and a chunk on all of them against one.

    infworld benchmark team --model infinite-world
    torchrun --nproc-per-node 4 -m infworld benchmark team --model infinite-world

As in `infworld benchmark` the sizes are a model's and the weights random, made in memory, the same on each device; the
JSON file is of the same form too. The first preset's film is made from its picture to its last chunk, if there is time
for it; the others' until the memory is full, from where on each chunk takes as long as the last. Frames are counted
when they are in the CPU's memory: writing an mp4 goes on beside the next chunk.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from infworld import parallel
from infworld.cli.benchmark.harness import film_histories, names_among, relative_error, without_out
from infworld.cli.benchmark.model import NoiseText, noise_session, picture_size, random_world
from infworld.cli.benchmark.record import Record, machine, name_of
from infworld.config import load_config
from infworld.devices import pick_device, pick_dtype, pick_vae_dtype
from infworld.kernels import use_fastest
from infworld.memory import memory_latents
from infworld.parallel import Team
from infworld.presets import PRESETS, find_preset
from infworld.progress import Progress
from infworld.session import Session
from infworld.world import World


def main() -> None:
    args = parse(sys.argv[1:])
    device = pick_device(parallel.device_of_rank(args.device))
    with parallel.join_team(device) as team:
        TeamBenchmark(args, device, team).measure_all()


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="infinite-world")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--history", type=int, default=101, help="latents of the compared chunk's history; default 101")
    usual = "fast,exact,balanced"
    parser.add_argument(
        "--presets", type=names_among(PRESETS, "preset"), default=usual, help=f"in order; default: {usual}"
    )
    parser.add_argument("--steps", type=int, default=2, help="of the chunk that is compared; default 2")
    parser.add_argument("--chunks", type=int, default=13, help="of a film; default 13, which are 1041 frames")
    parser.add_argument("--budget", type=float, default=280, help="seconds that the run may take; default 280")
    parser.add_argument("--out", default="benchmark-team.json", help="the JSON file; default benchmark-team.json")
    args = parser.parse_args(arguments)
    args.command = arguments
    return args


class TeamBenchmark:
    """A world on this device alone, the same on all of the team's, and the record, which rank 0 keeps."""

    def __init__(self, args: argparse.Namespace, device: torch.device, team: Team | None):
        self.args, self.team, self.config = args, team, load_config(args.model)
        self.size, self.devices = picture_size(self.config), team.size if team else 1
        dtype = pick_dtype(device, getattr(torch, self.config.amp_dtype))
        vae_dtype = pick_vae_dtype(dtype)
        settings = {
            "model": self.config.name,
            "devices": self.devices,
            "picture": "x".join(map(str, self.size)),
            "transformer": name_of(dtype),
            "vae": name_of(vae_dtype),
            "film": f"{1 + args.chunks * self.config.chunk_frames} frames",
            "longest history": args.history,
        }
        torchrun = "" if team is None else f"torchrun --nproc-per-node {self.devices} -m "
        command = torchrun + shlex.join(["infworld", "benchmark", "team", *without_out(args.command)])
        about = {"command": command, "machine": machine(device), "settings": settings}
        self.record = Record(Path(args.out), args.budget, about)  # whose clock and file are rank 0's
        self.one, _ = random_world(self.config, device, dtype, vae_dtype)
        if device.type == "cuda":
            use_fastest(self.one.transformer, self.config)
        self.world = self.one
        if team is not None:
            self.world = World(self.config, self.one.transformer, self.one.vae, NoiseText(self.config), team)

    def measure_all(self) -> None:
        session = noise_session(self.one, self.size, self.args.history)
        for world in dict.fromkeys((self.one, self.world)):
            world.next_chunk(session.replace_settings(steps=1))  # to warm up
        for preset in self.args.presets:
            if self.team is not None:
                self.compare(session, preset)
            self.film(preset, whole=preset == self.args.presets[0])

    def compare(self, session: Session, preset: str) -> None:
        """One chunk on one device, which all do at once, and on all together: the seconds, and how far they differ."""
        steps = self.steps_of(preset)
        session = session.replace_settings(preset=preset, steps=min(steps, self.args.steps))
        alone, expected = self.chunk(self.one, session, f"{preset}: chunk on one", steps)
        together, found = self.chunk(self.world, session, f"{preset}: chunk on {self.devices}", steps)
        self.put(f"{preset}: chunk, times as fast as on one", alone / together, "", "longest history")
        error = relative_error(found, expected)
        self.put(f"{preset}: error of a chunk", error, "", f"of {session.settings.steps} steps, against one device")

    def chunk(self, world: World, session: Session, name: str, steps: int) -> tuple[float, Tensor]:
        """Makes the session's next chunk; returns what one of so many steps comes to in seconds, and its latents.

        On a GPU a step may end later than it is heard of: the last ones' time is waited for with the last.
        """
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
        whole = now - began + stages["sample"] * (steps / session.settings.steps - 1)
        parts = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in stages.items())
        self.put(name, whole, "s", f"of {steps} steps, from one of {session.settings.steps}: {parts}")
        return whole, chunk.latents

    def film(self, preset: str, whole: bool) -> None:
        """A film from its picture on. whole: to its end; else until the memory is full."""
        histories = film_histories(self.config, self.args.chunks)
        full = next((i for i, h in enumerate(histories, 1) if memory_latents(h) == memory_latents(histories[-1])))
        session = noise_session(self.world, self.size, 1)
        session = session.replace_settings(preset=preset, steps=self.steps_of(preset))
        taken: list[float] = []
        for history in histories if whole else histories[:full]:
            if not self.time_for(1.2 * max(taken, default=0.0)):
                break
            began = time.perf_counter()
            session = self.world.next_chunk(session).session
            taken.append(time.perf_counter() - began)
            self.put(f"{preset}: chunk {len(taken)} of the film", taken[-1], "s", f"history {history}")
        name, left = f"{preset}: film on {self.devices}", len(histories) - len(taken)
        if len(taken) < full:
            if parallel.rank() == 0:
                self.record.leave_out(name, f"only {len(taken)} chunks in the time that was left")
            return
        note = "measured whole" if not left else f"{len(taken)} chunks measured, {left} more like the last of them"
        self.put(name, sum(taken) + left * taken[-1], "s", note)

    def steps_of(self, preset: str) -> int:
        return find_preset(preset).sampler_steps(self.config.val_scheduler_cfg)

    def time_for(self, seconds: float) -> bool:
        """Whether so much is left, by rank 0's clock."""
        left = self.record.left if self.team is None else self.team.broadcast_from_rank0(lambda: self.record.left)
        return seconds < left

    def put(self, name: str, value: float, unit: str, note: str) -> None:
        if parallel.rank() == 0:
            self.record.put(name, value, unit, note)
