"""The benchmark's small cards: one large card that lends this process no more memory than a small one has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil
import torch

from infworld.cli.benchmark.model import NoiseText
from infworld.devices import limit_memory
from infworld.memory_plan import GB, MemoryPlan, NotEnoughMemory, choose
from infworld.world import World

if TYPE_CHECKING:
    from infworld.cli.benchmark.harness import Benchmark

CARDS = (24, 16, 12, 8, 6)  # GB (10^9 bytes), the largest first: blocks that went to the CPU do not come back
STEPS = 2  # of the chunk whose peak is measured: its later steps take no more


def small_cards(bench: Benchmark) -> None:
    """The steady step and a chunk's peak on each card, by its plan, and what the plan expects the peak to be."""
    if bench.device.type != "cuda":
        return bench.record.leave_out("small cards", "only a GPU's memory can be limited")
    bench.naive_vae.cpu()
    needs, last = bench.world.memory_estimate(), None
    for card in CARDS:
        plan = choose(needs, card * GB, psutil.virtual_memory().available)
        with limited(bench, card):
            try:
                # A card with the last one's plan takes as long: only whether it has room is left to see.
                on_card(bench, card, plan, timed=plan != last)
            except (NotEnoughMemory, torch.OutOfMemoryError) as error:
                bench.record.leave_out(f"{card} GB", str(error).splitlines()[0])
        last = plan


def on_card(bench: Benchmark, card: int, plan: MemoryPlan, timed: bool) -> None:
    config, whole = bench.config, bench.world
    world = World(config, whole.transformer, whole.vae, NoiseText(config), plan=plan)
    session = bench.session(bench.histories[0]).replace_settings(steps=STEPS)
    bench.record.put(f"{card} GB: planned peak", world.memory_estimate().gpu(plan) / GB, "GB", str(plan))
    torch.cuda.reset_peak_memory_stats(bench.device)
    first = bench.once(lambda: world.next_chunk(session))
    bench.record.put(f"{card} GB: chunk of {STEPS} steps", first, "s", f"measured once, with {world.plan} in the end")
    for name, size in (
        ("measured peak", torch.cuda.max_memory_allocated(bench.device)),
        ("measured peak, what torch holds in reserve included", torch.cuda.max_memory_reserved(bench.device)),
    ):
        bench.record.put(f"{card} GB: {name}", size / GB, "GB", "enforced: torch has no more")
    if timed:
        z, t = bench.noise(config.chunk_latents), torch.tensor(900.0, device=bench.device)
        bench.seconds(f"{card} GB: prepare", lambda: world.velocity(session), str(world.plan), repeats=1)
        velocity = world.velocity(session)
        bench.seconds(f"{card} GB: step", lambda: velocity(z, t), "longest history")


@contextmanager
def limited(bench: Benchmark, card: float) -> Iterator[None]:
    """This process has only so much of the card, what it has already included."""
    torch.cuda.empty_cache()
    limit_memory(bench.device, card)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, bench.device)
