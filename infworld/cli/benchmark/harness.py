"""A model of random weights, films of noise for it, and the clock: what every part of the benchmark measures with."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from infworld.cli.benchmark.model import generator, noise, noise_session, picture_size, random_world
from infworld.cli.benchmark.record import GIB, Record, machine, name_of
from infworld.config import ModelConfig, load_config
from infworld.devices import pick_device, pick_dtype, pick_vae_dtype
from infworld.fused import plain_torch
from infworld.kernels import use_fastest
from infworld.memory import MAX_SINGLE_PASS, memory_latents
from infworld.session import Session
from infworld.world import Chunk

REPEATS = 3
PATCH_PIXELS = 16 * 16  # of one token


class Benchmark:
    """A model of random weights, films of noise for it, and the clock."""

    def __init__(self, args: argparse.Namespace):
        self.device = pick_device(args.device)
        self.config = with_options(load_config(args.model), args)
        self.dtype = pick_dtype(self.device, getattr(torch, self.config.amp_dtype))
        vae_dtype = pick_vae_dtype(self.dtype)
        (self.size,) = self.config.buckets
        self.chunks = args.chunks
        self.histories = histories(self.config, args.histories, args.chunks)
        self.exact_latents: Tensor | None = None  # of the chunk after the longest history
        self.world, self.naive_vae = random_world(self.config, self.device, self.dtype, vae_dtype)
        attention = use_fastest(self.world.transformer, self.config) if self.device.type == "cuda" else None
        settings = {
            "model": self.config.name,
            "picture": "x".join(map(str, self.size)),
            "steps": self.steps,
            "guidance": self.config.val_scheduler_cfg.text_cfg_scale,
            "transformer": name_of(self.dtype),
            "vae": name_of(vae_dtype),
            "attention": attention or "torch",
            "film": f"{1 + self.chunks * self.config.chunk_frames} frames",
            "longest history": self.histories[0],
        }
        command = shlex.join(["infworld", "benchmark", *without_out(args.command)])
        about = {"command": command, "machine": machine(self.device), "settings": settings}
        self.record = Record(Path(args.out), args.budget, about)

    @property
    def steps(self) -> int:
        return self.config.val_scheduler_cfg.num_sampling_steps

    def seconds(self, name: str, run: Callable[[], object], note: str = "", repeats: int = REPEATS) -> None:
        """Times `run`: once to warm up, then the median of as many repeats as there is time for."""
        if not self.record.allows(name, 0):
            return
        first = self.once(run)
        repeats = min(repeats, int(self.record.left / first))
        if repeats < 1:
            return self.record.leave_out(name, f"it took {first:.1f} s to warm up and would take that again")
        times = [self.once(run) for _ in range(repeats)]
        median = statistics.median(times)
        self.record.put(name, median, "s", note, (max(times) - min(times)) / median if repeats > 1 else None)

    def once(self, run: Callable[[], object]) -> float:
        """Seconds from start to end, the device's work included."""
        self._wait()
        began = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - began

    def each(self, run: Callable[[], object], calls: int = 20) -> float:
        """Seconds of one of many calls, the first one not counted: for what is shorter than the wait for the device."""
        run()
        return self.once(lambda: [run() for _ in range(calls)]) / calls

    def made(self, session: Session) -> tuple[float, Chunk]:
        """The session's next chunk and the seconds that it took."""
        chunks: list[Chunk] = []
        return self.once(lambda: chunks.append(self.world.next_chunk(session))), chunks[0]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def peak_memory(self, name: str) -> Iterator[None]:
        """Records the most memory of a GPU that the block held at once."""
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        held = torch.cuda.max_memory_allocated(self.device) / GIB
        self.record.put(name, held, "GiB", "as torch allocates; transformer and both VAEs included")

    def attention(self, *backends: SDPBackend) -> AbstractContextManager:
        """Attention by the first of these backends that can; on a CPU there is no choice."""
        return sdpa_kernel(list(backends), set_priority=True) if self.device.type == "cuda" else nullcontext()

    def noise(self, latents: int) -> Tensor:
        return noise(self.config, self.size, latents).to(self.device)

    def session(self, history: int) -> Session:
        return noise_session(self.world, self.size, history)


def without_out(arguments: list[str]) -> list[str]:
    """A command line without the place of the results, which says nothing about them."""
    if "--out" not in arguments:
        return arguments
    at = arguments.index("--out")
    return arguments[:at] + arguments[at + 2 :]


def names_among(known: Collection[str], what: str) -> Callable[[str], list[str]]:
    """For an option that takes names separated by commas."""

    def names(text: str) -> list[str]:
        found = text.split(",")
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown {what} {unknown[0]!r}: known are {', '.join(known)}")
        return found

    return names


def with_options(config: ModelConfig, args: argparse.Namespace) -> ModelConfig:
    """The config with the steps, the guidance and the picture size of the command line."""
    sampler = config.val_scheduler_cfg
    steps = args.steps or sampler.num_sampling_steps
    guidance = sampler.text_cfg_scale if args.guidance is None else args.guidance
    sampler = dataclasses.replace(sampler, num_sampling_steps=steps, text_cfg_scale=guidance)
    size = args.size or picture_size(config)
    return dataclasses.replace(config, val_scheduler_cfg=sampler, buckets=(size,))


def histories(config: ModelConfig, asked: list[int], chunks: int) -> list[int]:
    """The histories to measure: the longest one first, and last those that the sum of a film needs besides."""
    if wrong := [history for history in asked if history % (config.chunk_latents - 1) != 1]:
        raise ValueError(f"a history has 1 + {config.chunk_latents - 1} n latents, not {wrong[0]}")
    asked = sorted(set(asked), key=lambda history: (history != max(asked), history))
    known = {memory_latents(history) for history in asked}
    return asked + [
        h for h in film_histories(config, chunks) if h <= MAX_SINGLE_PASS and memory_latents(h) not in known
    ]


def film_histories(config: ModelConfig, chunks: int) -> list[int]:
    return [1 + (config.chunk_latents - 1) * chunk for chunk in range(chunks)]


@contextmanager
def naive_kernels(bench: Benchmark) -> Iterator[None]:
    """Attention by torch's flash attention, whatever the world has chosen, and all else by plain torch."""
    chosen = bench.world.transformer.use_kernel(F.scaled_dot_product_attention)
    try:
        with (
            bench.attention(SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
            plain_torch(),
        ):
            yield
    finally:
        bench.world.transformer.use_kernel(chosen)


def timestep(bench: Benchmark) -> Tensor:
    return torch.tensor(900.0, device=bench.device)


def guidance_of(bench: Benchmark) -> float:
    return bench.config.val_scheduler_cfg.text_cfg_scale


def tokens_of(bench: Benchmark, latents: int) -> int:
    height, width = bench.size
    return latents * (height * width // PATCH_PIXELS)


def clip(bench: Benchmark, frames: int) -> Tensor:
    video = torch.rand(1, 3, frames, *bench.size, generator=generator(), dtype=torch.float32)
    return video.to(bench.device) * 2 - 1


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())
