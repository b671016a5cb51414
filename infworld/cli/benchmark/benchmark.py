"""Measures the engine on this machine against everything computed anew, both in one run.

    python scripts/benchmark.py --model infinite-world --budget 500 --out benchmark.json
    python scripts/benchmark.py --table benchmark.json --docs docs/performance.md

The sizes are a model's; the weights are random and made in memory, so no weight files are needed. *Naive* is the
computation whose cost spec section 11 gives: compressor and memory anew at every step, guidance as a batch of two,
flash attention, a float32 VAE one latent at a time, the whole history encoded again for each chunk. *Exact* is what
`World` does. The most important figures come first; what does not fit into the budget is named as left out, and after
every figure the JSON file is whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import infworld.vae
from infworld import packages
from infworld.checkpoint import load_strict, read_tensors
from infworld.cli.benchmark.cards import small_cards
from infworld.cli.benchmark.model import (
    NoiseText,
    generator,
    noise,
    noise_session,
    picture_size,
    plain_velocity,
    random_world,
)
from infworld.cli.benchmark.record import GIB, Record, fill, machine, name_of, table
from infworld.config import FRAMES_PER_LATENT, PROJECT_ROOT, ModelConfig, TextConfig, TransformerConfig, load_config
from infworld.devices import pick_device, pick_dtype, pick_vae_dtype
from infworld.dit import InfiniteWorldTransformer
from infworld.layers import fastest_attention
from infworld.memory import MAX_SINGLE_PASS, memory_latents
from infworld.pictures import prepare_image
from infworld.presets import EXACT, PRESETS
from infworld.sampler import sample, schedule
from infworld.session import Session
from infworld.vae import build_vae
from infworld.world import Chunk, World

WAYS = ("exact", "naive")
REPEATS = 3
TERA = 1e12
TOP_KERNELS = 15
PATCH_PIXELS = 16 * 16  # of one token

# In float32 the fast way and the plain one are compared closely, with a transformer that is small enough for it.
SMALL = TransformerConfig(
    dim=192, ffn_dim=512, num_heads=4, num_layers=4, caption_channels=64,
    memory_hidden_dim=32, memory_num_heads=2, action_embed_dim=32, action_hidden_dim=64,
)  # fmt: skip
SMALL_TEXT = TextConfig(dim=SMALL.caption_channels, model_max_length=32)
SMALL_SIZE, SMALL_HISTORY, SMALL_STEPS = (32, 48), 101, 4
ERROR_STEPS = 6  # of a chunk whose error with compiled blocks is measured


class Bench:
    """A model of random weights, films of noise for it, and the clock."""

    def __init__(self, args: argparse.Namespace):
        self.device = pick_device(args.device)
        self.config = with_wishes(load_config(args.model), args)
        self.dtype = pick_dtype(self.device, getattr(torch, self.config.amp_dtype))
        vae_dtype = pick_vae_dtype(self.dtype)
        (self.size,) = self.config.buckets
        self.chunks = args.chunks
        self.histories = histories(self.config, args.histories, args.chunks)
        self.exact_latents: Tensor | None = None  # of the chunk after the longest history
        self.world, self.naive_vae = random_world(self.config, self.device, self.dtype, vae_dtype)
        settings = {
            "model": self.config.name,
            "picture": "x".join(map(str, self.size)),
            "steps": self.steps,
            "guidance": self.config.val_scheduler_cfg.text_cfg_scale,
            "transformer": name_of(self.dtype),
            "vae": name_of(vae_dtype),
            "film": f"{1 + self.chunks * self.config.chunk_frames} frames",
            "longest history": self.histories[0],
        }
        about = {"command": shlex.join(["python", "scripts/benchmark.py", *without_out(args.command)])}
        about |= {"machine": machine(self.device), "settings": settings}
        self.record = Record(Path(args.out), args.budget, about)

    @property
    def steps(self) -> int:
        return self.config.val_scheduler_cfg.num_sampling_steps

    def seconds(self, name: str, run: Callable[[], object], note: str = "", repeats: int = REPEATS) -> float | None:
        """Times `run`: once to warm up, then the median of as many repeats as there is time for."""
        if not self.record.allows(name, 0):
            return None
        first = self.once(run)
        repeats = min(repeats, int(self.record.left / first))
        if repeats < 1:
            return self.record.leave_out(name, f"it took {first:.1f} s to warm up and would take that again")
        times = [self.once(run) for _ in range(repeats)]
        median = statistics.median(times)
        self.record.put(name, median, "s", note, (max(times) - min(times)) / median if repeats > 1 else None)
        return median

    def once(self, run: Callable[[], object]) -> float:
        """Seconds from start to end, the device's work included."""
        self._wait()
        began = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - began

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


def with_wishes(config: ModelConfig, args: argparse.Namespace) -> ModelConfig:
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


def ceilings(bench: Bench) -> None:
    """What the card does at best: a large matrix product, and attention of the model's own sizes."""
    config, dtype, cuda = bench.config.model_cfg, bench.dtype, bench.device.type == "cuda"
    side = 8192 if cuda else 1024
    a, b = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2))
    rate(bench, "ceiling: matrix product", lambda: a @ b, 2 * side**3, f"{side}^3, {name_of(dtype)}")
    tokens = tokens_of(bench, bench.config.chunk_latents)
    keys = tokens + tokens_of(bench, memory_latents(bench.histories[0]))
    head_dim = config.dim // config.num_heads
    # As the blocks lay them out: heads beside each other in a token.
    q, k, v = (
        torch.randn(1, n, config.num_heads, head_dim, device=bench.device).to(dtype).transpose(1, 2)
        for n in (tokens, keys, keys)
    )
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION] if cuda else [SDPBackend.FLASH_ATTENTION]
    for backend in backends:
        name = f"ceiling: attention, {backend.name.removesuffix('_ATTENTION').lower()}"
        note = f"{tokens} queries, {keys} keys, {config.num_heads} heads of {head_dim}"
        try:
            with bench.attention(backend):
                rate(bench, name, lambda: F.scaled_dot_product_attention(q, k, v), 4 * tokens * keys * config.dim, note)
        except RuntimeError as error:
            bench.record.leave_out(name, str(error).splitlines()[0])


def rate(bench: Bench, name: str, run: Callable[[], object], operations: float, note: str) -> None:
    times = [bench.once(run) for _ in range(10)][3:]
    median = statistics.median(times)
    spread = (max(times) - min(times)) / median
    bench.record.put(name, operations / median / TERA, "TFLOP/s", note, spread)


def tokens_of(bench: Bench, latents: int) -> int:
    height, width = bench.size
    return latents * (height * width // PATCH_PIXELS)


def steady_step(bench: Bench) -> None:
    """The step that most of a film consists of, naive and exact."""
    exact_step(bench, bench.histories[0])
    naive_step(bench, bench.histories[0])
    share_of_ceilings(bench)


def other_steps(bench: Bench) -> None:
    for history in bench.histories[1:]:
        exact_step(bench, history)
        naive_step(bench, history, repeats=1)


def exact_step(bench: Bench, history: int) -> None:
    session, z, t = bench.session(history), bench.noise(bench.config.chunk_latents), timestep(bench)
    note = f"{memory_latents(history)} latents of memory"
    what = "compressor, texts and the memory's way through the blocks, once per chunk"
    bench.seconds(f"exact: prepare, history {history}", lambda: bench.world.velocity(session), what, repeats=1)
    velocity = bench.world.velocity(session)
    bench.seconds(f"exact: step, history {history}", lambda: velocity(z, t), note)


def naive_step(bench: Bench, history: int, repeats: int = 2) -> None:
    session, z, t = bench.session(history), bench.noise(bench.config.chunk_latents), timestep(bench)
    velocity = plain_velocity(bench.world, session)
    with bench.peak_memory(f"naive: peak memory, step, history {history}"), naive_attention(bench):
        bench.seconds(f"naive: step, history {history}", lambda: velocity(z, t), "everything computed", repeats)


def naive_attention(bench: Bench) -> AbstractContextManager:
    return bench.attention(SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def timestep(bench: Bench) -> Tensor:
    return torch.tensor(900.0, device=bench.device)


def share_of_ceilings(bench: Bench) -> None:
    """How near the steady step is to the time that its matrix products and attention would take at the ceilings."""
    config, record = bench.config.model_cfg, bench.record
    n, m = tokens_of(bench, bench.config.chunk_latents), tokens_of(bench, memory_latents(bench.histories[0]))
    text, branches = bench.config.text_encoder_cfg.model_max_length, 1 if guidance_of(bench) == 1 else 2
    # Multiply-adds of one block: q k v o and cross-attention's q o of noise, k v of memory, feed-forward.
    products = config.dim * (6 * n * config.dim + 2 * m * config.dim + 2 * n * config.ffn_dim)
    attention = 2 * n * (n + m + text) * config.dim
    work = [2 * branches * config.num_layers * w / TERA for w in (products, attention)]
    for name, amount in zip(("matrix products", "attention"), work, strict=True):
        record.put(f"work: {name} of a step, longest history", amount, "TFLOP", "counted")
    best = max(filter(None, (record[f"ceiling: attention, {b}"] for b in ("flash", "cudnn"))), default=None)
    seconds = record[f"exact: step, history {bench.histories[0]}"]
    if best and seconds:
        floor = work[0] / record["ceiling: matrix product"] + work[1] / best
        note = f"{floor:.3g} s if both ran at this run's ceilings and all else took no time"
        record.put("exact: share of the ceilings in a step, longest history", 100 * floor / seconds, "%", note)


def guidance_of(bench: Bench) -> float:
    return bench.config.val_scheduler_cfg.text_cfg_scale


def vae_times(bench: Bench) -> None:
    """A chunk's way through the VAE, and with it how large a session's encoder state is."""
    config, world = bench.config, bench.world
    latents, video = bench.noise(config.chunk_latents), clip(bench, config.chunk_frames + 1)
    with torch.inference_mode():
        _, state = world.vae.encode(video[:, :, :1])
        size = sum(tensor.nbytes for tensor in state.values()) / GIB
        bench.record.put("exact: encoder state of a session", size, "GiB", "crosses to the CPU and back once per chunk")
        bench.seconds("exact: decode a chunk", lambda: world.vae.decode(latents), f"{config.chunk_latents} latents")
        note = f"{config.chunk_frames} frames after a state"
        bench.seconds("exact: encode a chunk", lambda: world.vae.encode(video[:, :, 1:], state), note)
        naive, note = bench.naive_vae, "float32, one latent at a time"
        bench.seconds("naive: decode a chunk", lambda: naive.decode(latents, tile=1), note, repeats=1)
        note += f", {config.chunk_frames + 1} frames from the start"
        bench.seconds("naive: encode a chunk", lambda: naive.encode(video, tile=1), note, repeats=1)


def clip(bench: Bench, frames: int) -> Tensor:
    video = torch.rand(1, 3, frames, *bench.size, generator=generator(), dtype=torch.float32)
    return video.to(bench.device) * 2 - 1


def whole_chunk(bench: Bench) -> None:
    """One chunk as a user gets it, from session to session, after the longest history."""
    record, name = bench.record, "exact: chunk, longest history"
    guess = chunk_seconds(bench, "exact", bench.histories[0])
    if not record.allows(name, guess):
        return
    session = bench.session(bench.histories[0])
    with bench.peak_memory("exact: peak memory of a chunk"):
        taken, chunk = bench.made(session)
    record.put(name, taken, "s", f"measured once; {guess:.4g} by the sum of its parts")
    bench.exact_latents = chunk.latents


def chunk_seconds(bench: Bench, way: str, history: int, steps: float | None = None) -> float | None:
    """A chunk of so many steps (default: the model's own) by its measured parts; None if one is missing."""
    record = bench.record
    alike = [h for h in bench.histories if memory_latents(h) == memory_latents(history)]
    step = next(filter(None, (record[f"{way}: step, history {h}"] for h in alike)), None)
    decode, encode = record[f"{way}: decode a chunk"], record[f"{way}: encode a chunk"]
    if way == "exact":
        prepare = next(filter(None, (record[f"exact: prepare, history {h}"] for h in alike)), None)
        parts = [prepare, decode, encode]
    else:  # the whole history again, in proportion to its frames
        frames = 1 + (history - 1) * FRAMES_PER_LATENT
        parts = [decode, encode and encode * frames / (bench.config.chunk_frames + 1)]
    return None if step is None or None in parts else (steps or bench.steps) * step + sum(parts)


def film_sum(bench: Bench) -> None:
    """The whole film, chunk by chunk from the parts measured above."""
    for way in ("naive", "exact"):
        chunks = [chunk_seconds(bench, way, h) for h in film_histories(bench.config, bench.chunks)]
        name = f"{way}: film"
        if None in chunks:
            bench.record.leave_out(name, "a figure that it rests on is not there")
        else:
            bench.record.put(name, sum(chunks), "s", f"summed over {len(chunks)} chunks from their measured parts")


def faster_presets(bench: Bench) -> None:
    """A film by each of the presets that deviate: summed as above, and a chunk of it measured."""
    longest, sampler = bench.histories[0], bench.config.val_scheduler_cfg
    branches = 1 if guidance_of(bench) == 1 else 2
    for preset in PRESETS.values():
        if preset is EXACT:
            continue
        steps = preset.sampler_steps(sampler)
        passes = preset.passes(steps, guidance_of(bench)) / branches
        chunks = [chunk_seconds(bench, "exact", h, passes) for h in film_histories(bench.config, bench.chunks)]
        name, guess = f"{preset.name}: chunk, longest history", chunk_seconds(bench, "exact", longest, passes)
        if not bench.record.allows(name, guess):
            continue
        session = bench.session(longest).replace_settings(preset=preset.name, steps=steps)
        taken, chunk = bench.made(session)
        note = f"{steps} steps that cost as much as {passes:g} of exact; measured once; {guess:.4g} by its parts"
        bench.record.put(name, taken, "s", note)
        if bench.exact_latents is not None:
            error = relative_error(chunk.latents, bench.exact_latents)
            note = "of the chunk's latents, random weights: no measure of quality"
            bench.record.put(f"{preset.name}: deviation from exact", error, "", note)
        if None not in chunks:
            note = f"summed over {len(chunks)} chunks from the parts of exact"
            bench.record.put(f"{preset.name}: film", sum(chunks), "s", note)


def film_measured(bench: Bench) -> None:
    """The film itself, as far as time allows; chunks of the longest memory cost the same and may be counted by one."""
    session, taken, done = bench.session(1), [], 0
    chunks = film_histories(bench.config, bench.chunks)
    for history in chunks:
        if taken and taken[-1] * 1.2 > bench.record.left:
            break
        seconds, chunk = bench.made(session)
        taken.append(seconds)
        session, done = chunk.session, done + 1
        bench.record.put(f"exact: chunk {done} of the film", taken[-1], "s", f"history {history}, measured")
    if done < len(chunks) and chunks[done - 1] <= MAX_SINGLE_PASS:
        return bench.record.leave_out("exact: film, measured", f"only {done} chunks in the time that was left")
    note = f"{done} of {len(chunks)} chunks measured, the others taken to be like the last of them"
    bench.record.put("exact: film, measured", sum(taken) + taken[-1] * (len(chunks) - done), "s", note)


def errors(bench: Bench) -> None:
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
    each = [bench.record[step] for step in steps]
    if bench.record.allows(name, None if None in each else 1.1 * bench.steps * sum(each)):
        error = chunk_error(bench, bench.world, bench.session(history))
        bench.record.put(name, error, "", f"history {history}, {bench.steps} steps, guidance {guidance_of(bench):g}")


@torch.inference_mode()
def chunk_error(bench: Bench, world: World, session: Session) -> float:
    height, width = session.picture.shape[1:3]
    z = noise(world.config, (height, width), world.config.chunk_latents).to(bench.device)
    timesteps = schedule(world.config.val_scheduler_cfg, session.settings.steps)
    ours = sample(world.velocity(session), z, timesteps)
    with naive_attention(bench):
        plain = sample(plain_velocity(world, session), z, timesteps)
    return relative_error(ours, plain)


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@torch.inference_mode()
def vae_quality(bench: Bench) -> None:
    """What the VAE's rounding costs the picture: with the shipped, trained weights and a pan over an example."""
    tiny = load_config("tiny")
    path = tiny.path(tiny.vae_cfg.vae_pth)
    load = lambda dtype: load_strict(  # noqa: E731
        lambda: build_vae(tiny), read_tensors(path), where=path, device=bench.device, dtype=dtype
    )
    video = pan(PROJECT_ROOT / "examples" / "2-autumn-walk-and-return.png", tiny).to(bench.device)
    note = f"trained VAE of the tiny model, {video.shape[2]} frames of {video.shape[3]}x{video.shape[4]}"
    exact = load(torch.float32)
    latents = exact.encode(video)[0]
    true = exact.decode(latents)
    bench.record.put("vae quality: float32 against the film", psnr(true, video), "dB", note)
    dtype = next(bench.world.vae.parameters()).dtype
    if dtype != torch.float32:
        rounded, name = load(dtype), name_of(dtype)
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


def choices(bench: Bench) -> None:
    """What the engine chose between, each way measured."""
    two_texts_at_once(bench)
    fused_projections(bench)
    fused_gelu(bench)
    attention_backends(bench)
    vae_ways(bench)


def two_texts_at_once(bench: Bench) -> None:
    """Guidance as one batch of two through the cached memory, in place of one text after the other."""
    if guidance_of(bench) == 1:
        return
    model, session = bench.world.transformer, bench.session(bench.histories[0])
    z, t = bench.noise(bench.config.chunk_latents), timestep(bench)
    texts = NoiseText(bench.config).encode([session.settings.prompt, session.settings.negative_prompt]).to(bench.device)
    move, view = torch.zeros(2, 2, bench.config.chunk_frames + 1, dtype=torch.long, device=bench.device)
    with torch.inference_mode(), fastest_attention(bench.device):
        memory = model.latent_encoder(session.history.to(bench.device, model.dtype)).repeat(2, 1, 1, 1, 1)
        context, actions = model.embed_text(texts.hidden, texts.mask), model.action_encoder(move, view)
        stream = model.encode_memory(memory, context)
        batch = z.repeat(2, 1, 1, 1, 1), t.repeat(2)
        run = lambda: model.denoise(*batch, stream, actions, context)  # noqa: E731
        bench.seconds("choice: step with both texts as a batch", run, "against exact: step, longest history")


def fused_projections(bench: Bench) -> None:
    """The queries', keys' and values' projections as one matrix product and as three."""
    dim, tokens = bench.config.model_cfg.dim, tokens_of(bench, bench.config.chunk_latents)
    x, w = (torch.randn(n, dim, device=bench.device).to(bench.dtype) for n in (tokens, 3 * dim))
    parts = w.chunk(3)
    bench.seconds("choice: projections q, k, v of one block as one", lambda: F.linear(x, w), repeats=20)
    bench.seconds(
        "choice: projections q, k, v of one block as three", lambda: [F.linear(x, p) for p in parts], repeats=20
    )


def fused_gelu(bench: Bench) -> None:
    """The first half of a block's feed-forward with GELU inside the matrix product (a private function of torch)."""
    config, tokens = bench.config.model_cfg, tokens_of(bench, bench.config.chunk_latents)
    x, w = (torch.randn(n, config.dim, device=bench.device).to(bench.dtype) for n in (tokens, config.ffn_dim))
    b = torch.zeros(config.ffn_dim, device=bench.device).to(bench.dtype)
    together = lambda: torch._addmm_activation(b, x, w.T, use_gelu=True)  # noqa: E731
    bench.seconds("choice: half a feed-forward of one block, GELU inside", together, repeats=20)
    apart = lambda: F.gelu(F.linear(x, w, b), approximate="tanh")  # noqa: E731
    bench.seconds("choice: half a feed-forward of one block, GELU after", apart, repeats=20)


def attention_backends(bench: Bench) -> None:
    if bench.device.type != "cuda":
        return
    session, z, t = bench.session(bench.histories[0]), bench.noise(bench.config.chunk_latents), timestep(bench)
    model, order = bench.world.transformer, [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    texts = NoiseText(bench.config).encode([session.settings.prompt]).to(bench.device)
    move, view = torch.zeros(2, 1, bench.config.chunk_frames + 1, dtype=torch.long, device=bench.device)
    with torch.inference_mode(), bench.attention(*order, SDPBackend.MATH):
        context, actions = model.embed_text(texts.hidden, texts.mask), model.action_encoder(move, view)
        memory = model.latent_encoder(session.history.to(bench.device, model.dtype))
        stream = model.encode_memory(memory, context)
        run = lambda: model.denoise(z, t.reshape(1), stream, actions, context)  # noqa: E731
        bench.seconds("choice: one text's step with flash attention", run, "half a guided step")


def vae_ways(bench: Bench) -> None:
    """Other ways through the VAE on a GPU: dtype, form of the convolutions, latents per pass, compiled norms."""
    if bench.device.type != "cuda":
        return
    vae, latents = bench.world.vae, bench.noise(bench.config.chunk_latents)
    video = clip(bench, bench.config.chunk_frames + 1)
    with torch.inference_mode():
        bench.seconds("choice: decode a chunk, float32", lambda: bench.naive_vae.decode(latents), repeats=1)
        for tile in (1, 2, 4):
            with bench.peak_memory(f"choice: peak memory, decode {tile} latents at a time"):
                bench.seconds(
                    f"choice: decode a chunk, {tile} latents at a time", lambda n=tile: vae.decode(latents, tile=n)
                )
        for tile in (1, 4):
            bench.seconds(f"choice: encode a chunk, {tile} latents at a time", lambda n=tile: vae.encode(video, tile=n))
        with torch.backends.cudnn.flags(benchmark=True, allow_tf32=True):
            bench.seconds("choice: decode a chunk, cuDNN searching", lambda: vae.decode(latents), "after the search", 1)
        with mock.patch.object(infworld.vae, "_convolve_3d", infworld.vae._convolve_by_frame):
            bench.seconds("choice: decode a chunk, 2-D convolutions", lambda: vae.decode(latents), repeats=1)
            bench.seconds("choice: encode a chunk, 2-D convolutions", lambda: vae.encode(video), repeats=1)
        if bench.record.allows(name := "choice: decode a chunk, norms compiled", 60):
            with mock.patch.object(infworld.vae, "normalize", torch.compile(infworld.vae.normalize, dynamic=True)):
                bench.seconds(name, lambda: vae.decode(latents), repeats=1)


def compiled(bench: Bench) -> None:
    """The blocks compiled: how long the first step takes, the steady step, and what another history costs."""
    if not bench.record.allows("compiled: first step", 90.0 if bench.device.type == "cuda" else 0.0):
        return
    world = other_blocks(bench.world)
    world.transformer.compile_blocks()
    time_other_blocks(bench, "compiled", world, "compilation, the chunk's preparation and one step")


def packaged(bench: Bench) -> None:
    """The same with blocks that are compiled ahead of time, and how long that takes."""
    if not bench.record.allows("packaged: compiling ahead of time", 120.0):
        return
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / packages.folder_name(bench.config.name, bench.device)
        making = bench.once(lambda: packages.make(bench.config, bench.device, bench.dtype, package))
        bench.record.put("packaged: compiling ahead of time", making, "s", "once for a kind of card")
        world = other_blocks(bench.world)
        if not packages.apply(world.transformer, Path(folder)):
            return bench.record.leave_out("packaged: first step", "the package is of no use here, see the log")
        time_other_blocks(bench, "packaged", world, "loading the package, the chunk's preparation and one step")


def time_other_blocks(bench: Bench, way: str, world: World, first_note: str) -> None:
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


def repeated_step(bench: Bench) -> None:
    """The steady step once more, at the end: how much the machine itself varies."""
    name = "exact: step, longest history, once more at the end"
    if not bench.record.allows(name, 0):
        return
    session, z, t = bench.session(bench.histories[0]), bench.noise(bench.config.chunk_latents), timestep(bench)
    velocity = bench.world.velocity(session)
    bench.seconds(name, lambda: velocity(z, t), "the machine's own spread")


def profile(bench: Bench) -> None:
    """The kernels that a steady step, decoding and encoding spend their time in."""
    if not bench.record.allows("profile", 0):
        return
    session, z, t = bench.session(bench.histories[0]), bench.noise(bench.config.chunk_latents), timestep(bench)
    latents, video = bench.noise(bench.config.chunk_latents), clip(bench, bench.config.chunk_frames + 1)
    velocity = bench.world.velocity(session)
    with torch.inference_mode():
        kernels(bench, "exact step, longest history", lambda: velocity(z, t))
        kernels(bench, "exact prepare, longest history", lambda: bench.world.velocity(session))
        kernels(bench, "decode a chunk", lambda: bench.world.vae.decode(latents))
        kernels(bench, "encode a chunk", lambda: bench.world.vae.encode(video))


def kernels(bench: Bench, name: str, run: Callable[[], object]) -> None:
    cuda = bench.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    run()
    with torch.profiler.profile(activities=[activity]) as profiled:
        bench.once(run)
    found = [
        (event.key, event.self_device_time_total if cuda else event.self_cpu_time_total, event.count)
        for event in profiled.key_averages()
    ]
    total = sum(taken for _, taken, _ in found)
    top = sorted(found, key=lambda kernel: -kernel[1])[:TOP_KERNELS]
    bench.record.put_profile(name, total / 1e6, [(key, taken / 1e6, calls) for key, taken, calls in top])


PARTS = {
    "ceilings": ceilings,
    "steady": steady_step,
    "vae": vae_times,
    "chunk": whole_chunk,
    "steps": other_steps,
    "film": film_sum,
    "presets": faster_presets,
    "errors": errors,
    "quality": vae_quality,
    "compiled": compiled,
    "packaged": packaged,
    "choices": choices,
    "again": repeated_step,
    "measured-film": film_measured,
    "profile": profile,
    "small-cards": small_cards,
}
ON_REQUEST = ("packaged", "measured-film", "profile", "small-cards")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="whose sizes: tiny (default), infinite-world, or a YAML file")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--size", type=size, help="height x width; default: 448x896, or the model's first bucket")
    parser.add_argument("--steps", type=int, help="sampler steps per chunk; default: the model's own")
    parser.add_argument("--guidance", type=float, help="default: the model's own")
    parser.add_argument("--histories", type=integers, default=[1, 41, 121, 241], help="default: 1,41,121,241 latents")
    parser.add_argument("--chunks", type=int, default=13, help="of a film; default 13, which are 1041 frames")
    parser.add_argument("--budget", type=float, default=500, help="seconds that the run may take; default 500")
    usual = ",".join(part for part in PARTS if part not in ON_REQUEST)
    parser.add_argument("--parts", default=usual, help=f"default: {usual}; on request: {','.join(ON_REQUEST)}")
    parser.add_argument("--out", default="benchmark.json", help="the JSON file; default benchmark.json")
    parser.add_argument("--table", metavar="JSON", help="measure nothing: print the table of such a file")
    parser.add_argument("--docs", metavar="MARKDOWN", help="with --table: put it into this page, at its markers")
    parser.add_argument("--name", default="gpu", help="with --docs: the name of the markers; default gpu")
    args = parser.parse_args(arguments)
    args.parts = args.parts.split(",")
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}: known are {', '.join(PARTS)}")
    args.command = arguments
    return args


def size(text: str) -> tuple[int, int]:
    height, width = map(int, text.split("x"))
    return height, width


def integers(text: str) -> list[int]:
    return [int(item) for item in text.split(",")]


def main(arguments: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if arguments is None else arguments)
    if args.table:
        text = table(json.loads(Path(args.table).read_text(encoding="utf-8")))
        fill(Path(args.docs), args.name, text) if args.docs else print(text)
        return 0
    bench = Bench(args)
    for part in args.parts:
        try:
            PARTS[part](bench)
        except Exception as error:  # such as too little memory; what comes after may still be measured
            traceback.print_exc()
            bench.record.leave_out(part, f"{type(error).__name__}: {error}".splitlines()[0])
    print(table(bench.record.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
