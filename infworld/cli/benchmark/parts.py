"""The benchmark's steps and passes, naive and exact; the card's ceilings; the kernels that take the time."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from infworld.cli.benchmark.harness import Benchmark, clip, guidance_of, naive_kernels, timestep, tokens_of
from infworld.cli.benchmark.model import plain_velocity
from infworld.cli.benchmark.record import GIB, name_of
from infworld.fused import plain_torch, reason
from infworld.kernels import KERNELS
from infworld.layers import Kernel
from infworld.memory import memory_latents

COPY, PRODUCT = "ceiling: copy", "ceiling: matrix product"
TERA = 1e12
TOP_KERNELS = 15


def ceilings(bench: Benchmark) -> None:
    """What the card does at best: a copy, a large matrix product, and attention of the model's own sizes."""
    config, dtype, cuda = bench.config.model_cfg, bench.dtype, bench.device.type == "cuda"
    large = torch.zeros(GIB if cuda else GIB // 16, dtype=torch.uint8, device=bench.device)
    rate(bench, COPY, large.clone, 2 * large.nbytes, "read and written", "TB/s")
    del large
    side = 8192 if cuda else 1024
    a, b = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2))
    rate(bench, PRODUCT, lambda: a @ b, 2 * side**3, f"{side}^3, {name_of(dtype)}")
    tokens = tokens_of(bench, bench.config.chunk_latents)
    keys = tokens + tokens_of(bench, memory_latents(bench.histories[0]))
    head_dim = config.dim // config.num_heads
    # As the blocks lay them out: heads beside each other in a token.
    q, k, v = (
        torch.randn(1, n, config.num_heads, head_dim, device=bench.device).to(dtype).transpose(1, 2)
        for n in (tokens, keys, keys)
    )
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION] if cuda else [SDPBackend.FLASH_ATTENTION]
    ways: dict[str, tuple[AbstractContextManager, Callable[[], Kernel]]] = {
        backend.name.removesuffix("_ATTENTION").lower(): (
            bench.attention(backend),
            lambda: F.scaled_dot_product_attention,
        )
        for backend in backends
    }
    if cuda:
        ways |= {name: (nullcontext(), install) for name, install in KERNELS.items()}
    note = f"{tokens} queries, {keys} keys, {config.num_heads} heads of {head_dim}"
    for way, (chosen, install) in ways.items():
        name = f"ceiling: attention, {way}"
        try:
            with chosen:
                rate(bench, name, partial(install(), q, k, v), 4 * tokens * keys * config.dim, note)
        except (ImportError, RuntimeError) as error:
            bench.record.leave_out(name, reason(error))


def rate(
    bench: Benchmark, name: str, run: Callable[[], object], operations: float, note: str, unit: str = "TFLOP/s"
) -> None:
    times = [bench.once(run) for _ in range(10)][3:]
    median = statistics.median(times)
    spread = (max(times) - min(times)) / median
    bench.record.put(name, operations / median / TERA, unit, note, spread)


def steady_step(bench: Benchmark) -> None:
    """The step that most of a film consists of, naive and exact."""
    exact_step(bench, bench.histories[0])
    naive_step(bench, bench.histories[0])
    share_of_ceilings(bench)


def other_steps(bench: Benchmark) -> None:
    for history in bench.histories[1:]:
        exact_step(bench, history)
        naive_step(bench, history, repeats=1)


def exact_step(bench: Benchmark, history: int, way: str = "exact") -> None:
    session, z, t = bench.session(history), bench.noise(bench.config.chunk_latents), timestep(bench)
    note = f"{memory_latents(history)} latents of memory"
    what = "compressor, texts and the memory's way through the blocks, once per chunk"
    bench.seconds(f"{way}: prepare, history {history}", lambda: bench.world.velocity(session), what, repeats=1)
    velocity = bench.world.velocity(session)
    bench.seconds(f"{way}: step, history {history}", lambda: velocity(z, t), note)


def naive_step(bench: Benchmark, history: int, repeats: int = 2) -> None:
    session, z, t = bench.session(history), bench.noise(bench.config.chunk_latents), timestep(bench)
    velocity = plain_velocity(bench.world, session)
    with bench.peak_memory(f"naive: peak memory, step, history {history}"), naive_kernels(bench):
        bench.seconds(f"naive: step, history {history}", lambda: velocity(z, t), "everything computed", repeats)


def share_of_ceilings(bench: Benchmark) -> None:
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
    kernels = ("flash", "cudnn", *KERNELS)
    best = max(filter(None, (record[f"ceiling: attention, {name}"] for name in kernels)), default=None)
    product, seconds = record[PRODUCT], record[f"exact: step, history {bench.histories[0]}"]
    if best and product and seconds:
        floor = work[0] / product + work[1] / best
        note = f"{floor:.3g} s if both ran at this run's ceilings and all else took no time"
        record.put("exact: share of the ceilings in a step, longest history", 100 * floor / seconds, "%", note)


def vae_times(bench: Benchmark) -> None:
    """A chunk's way through the VAE, and with it how large a session's encoder state is."""
    state = exact_vae(bench)
    config, naive, note = bench.config, bench.naive_vae, "float32, one latent at a time"
    latents, video = bench.noise(config.chunk_latents), clip(bench, config.chunk_frames + 1)
    with torch.inference_mode():
        size = sum(tensor.nbytes for tensor in state.values()) / GIB
        bench.record.put("exact: encoder state of a session", size, "GiB", "crosses to the CPU and back once per chunk")
        with plain_torch():
            bench.seconds("naive: decode a chunk", lambda: naive.decode(latents, tile=1), note, repeats=1)
            note += f", {config.chunk_frames + 1} frames from the start"
            bench.seconds("naive: encode a chunk", lambda: naive.encode(video, tile=1), note, repeats=1)


def exact_vae(bench: Benchmark, way: str = "exact") -> dict[str, Tensor]:
    """Decoding and encoding of a chunk; returns the encoder's state before it."""
    config, model = bench.config, bench.world.vae
    latents, video = bench.noise(config.chunk_latents), clip(bench, config.chunk_frames + 1)
    with torch.inference_mode():
        bench.seconds(f"{way}: decode a chunk", lambda: model.decode(latents), f"{config.chunk_latents} latents")
        _, state = model.encode(video[:, :, :1])
        note = f"{config.chunk_frames} frames after a state"
        bench.seconds(f"{way}: encode a chunk", lambda: model.encode(video[:, :, 1:], state), note)
    return state


def repeated_step(bench: Benchmark) -> None:
    """The steady step once more, at the end: how much the machine itself varies."""
    name = "exact: step, longest history, once more at the end"
    if not bench.record.allows(name, 0):
        return
    session, z, t = bench.session(bench.histories[0]), bench.noise(bench.config.chunk_latents), timestep(bench)
    velocity = bench.world.velocity(session)
    bench.seconds(name, lambda: velocity(z, t), "the machine's own spread")


def profile(bench: Benchmark) -> None:
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


def kernels(bench: Benchmark, name: str, run: Callable[[], object]) -> None:
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
