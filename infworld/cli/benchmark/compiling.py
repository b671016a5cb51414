"""The benchmark's compiled blocks: by torch.compile, and ahead of time."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from infworld import packages
from infworld.cli.benchmark.harness import Benchmark, relative_error, timestep
from infworld.cli.benchmark.model import NoiseText
from infworld.dit import InfiniteWorldTransformer
from infworld.sampler import sample, schedule
from infworld.world import World

ERROR_STEPS = 6  # of a chunk whose error with compiled blocks is measured


def compiled(bench: Benchmark) -> None:
    """The blocks compiled: how long the first step takes, the steady step, and what another history costs."""
    if not bench.record.allows("compiled: first step", 90.0 if bench.device.type == "cuda" else 0.0):
        return
    world = other_blocks(bench.world)
    world.transformer.compile_blocks()
    time_other_blocks(bench, "compiled", world, "compilation, the chunk's preparation and one step")


def packaged(bench: Benchmark) -> None:
    """The same with blocks that are compiled ahead of time, and how long that takes."""
    if not bench.record.allows("packaged: compiling ahead of time", 120.0):
        return
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / packages.folder_name(bench.config.name, bench.device)
        making = bench.once(lambda: packages.make(bench.config, bench.device, bench.dtype, package))
        bench.record.put("packaged: compiling ahead of time", making, "s", "once for a kind of card")
        world = other_blocks(bench.world)
        if not packages.apply(world.transformer, [Path(folder)]):
            return bench.record.leave_out("packaged: first step", "the package is of no use here, see the log")
        time_other_blocks(bench, "packaged", world, "loading the package, the chunk's preparation and one step")


def time_other_blocks(bench: Benchmark, way: str, world: World, first_note: str) -> None:
    """How long a world with other blocks takes for its first step, the steady step, and one after another history."""
    history, record = bench.histories[0], bench.record
    session, z, t = bench.session(history), bench.noise(bench.config.chunk_latents), timestep(bench)
    plain = bench.world.velocity(session)(z, t)
    first = bench.once(lambda: world.velocity(session)(z, t))
    record.put(f"{way}: first step", first, "s", first_note)
    velocity = world.velocity(session)
    bench.seconds(f"{way}: step, history {history}", lambda: velocity(z, t))
    bench.seconds(f"{way}: prepare, history {history}", lambda: world.velocity(session), repeats=1)
    record.put(
        f"{way}: error of one velocity", relative_error(velocity(z, t), plain), "", "against exact, not compiled"
    )
    timesteps = schedule(bench.config.val_scheduler_cfg, min(bench.steps, ERROR_STEPS))
    error = relative_error(*(sample(w.velocity(session), z, timesteps) for w in (world, bench.world)))
    record.put(f"{way}: error of a chunk", error, "", f"of {len(timesteps) - 1} steps, against exact, not compiled")
    other = bench.session(min(bench.histories))
    taken = bench.once(lambda: world.velocity(other)(z, t))
    record.put(f"{way}: first step after another history", taken, "s", f"history {min(bench.histories)}")
    again = bench.once(lambda: world.velocity(other)(z, t))
    record.put(f"{way}: the same once more", again, "s", "what is less than the line above was compiled anew")


def other_blocks(world: World) -> World:
    """The same weights in blocks of their own, so that the world itself stays as it is."""
    with torch.device("meta"):
        transformer = InfiniteWorldTransformer(world.config.model_cfg)
    transformer.load_state_dict(world.transformer.state_dict(), assign=True)
    return World(world.config, transformer.eval().requires_grad_(False), world.vae, NoiseText(world.config))
