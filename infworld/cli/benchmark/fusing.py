"""The benchmark's kernels: each against plain torch and against the time that its bytes take, and what they save."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from infworld import layers, vae
from infworld.cli.benchmark.harness import Benchmark, relative_error, tokens_of
from infworld.cli.benchmark.parts import COPY, PRODUCT, TERA, exact_step, exact_vae
from infworld.fused import plain_torch
from infworld.memory import memory_latents
from infworld.sampler import sample, schedule

ERROR_STEPS = 6  # of a chunk whose error is measured


class Call(NamedTuple):
    """A fused function at the sizes of a steady step or of a pass through the VAE."""

    run: Callable[[], Tensor]
    moved: float  # bytes, at least
    operations: float = 0.0  # of a matrix product


def fused_kernels(bench: Benchmark) -> None:
    """What each kernel takes and saves; the steady step, decoding and encoding without kernels; what they deviate."""
    with torch.inference_mode():
        for name, call in calls(bench).items():
            against_the_ceiling(bench, name, call)
    with plain_torch():
        exact_step(bench, bench.histories[0], "plain torch")
        exact_vae(bench, "plain torch")
    deviations(bench)


@torch.inference_mode()
def deviations(bench: Benchmark) -> None:
    """Of a chunk's latents and frames, by kernels and by plain torch."""
    if not bench.record.allows("kernels: error of a chunk", 0):
        return
    z, session = bench.noise(bench.config.chunk_latents), bench.session(min(bench.histories))
    timesteps = schedule(bench.config.val_scheduler_cfg, min(bench.steps, ERROR_STEPS))
    found = sample(bench.world.velocity(session), z, timesteps)
    frames = bench.world.vae.decode(z)
    with plain_torch():
        error = relative_error(found, sample(bench.world.velocity(session), z, timesteps))
        frames_error = relative_error(frames, bench.world.vae.decode(z))
    note = f"latents of {len(timesteps) - 1} steps, history {min(bench.histories)}, against plain torch"
    bench.record.put("kernels: error of a chunk", error, "", note)
    bench.record.put("kernels: error of a chunk's frames", frames_error, "", "same latents, against plain torch")


def calls(bench: Benchmark) -> dict[str, Call]:
    config, dtype = bench.config.model_cfg, bench.dtype
    new, dim, head_dim = tokens_of(bench, bench.config.chunk_latents), config.dim, config.dim // config.num_heads
    old = tokens_of(bench, memory_latents(bench.histories[0]))

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=bench.device).to(dtype)

    noisy, memory, keys = draw(1, new, dim), draw(1, old, dim), draw(1, old + new, dim)
    shift, scale, gate, *_ = draw(1, 6, dim, dtype=torch.float32).chunk(6, dim=1)
    weight, rope = draw(dim), draw(1, old + new, head_dim // 2, 2, dtype=torch.float32)
    up, bias = draw(config.ffn_dim, dim), draw(config.ffn_dim)
    attended, heads, model = draw(1, new, dim), config.num_heads, bench.world.vae
    height, width = (side // model.fold for side in bench.size)
    frames, gamma = (draw(*shape, model.dim, dtype=model.conv1.weight.dtype) for shape in ((1, 4, height, width), ()))
    return {
        "modulate_both": Call(lambda: layers.modulate_both(memory, noisy, shift, scale), 2 * keys.nbytes),
        "modulate": Call(lambda: layers.modulate(noisy, shift, scale), 2 * noisy.nbytes),
        "gated_add": Call(lambda: layers.gated_add(noisy, attended, gate), 3 * noisy.nbytes),
        "norm_heads, keys": Call(lambda: layers.norm_heads(keys, weight, heads, rope), 2 * keys.nbytes + rope.nbytes),
        "norm_heads, not rotated": Call(lambda: layers.norm_heads(noisy, weight, heads, None), 2 * noisy.nbytes),
        "affine_gelu": Call(lambda: layers.affine_gelu(noisy, up, bias), noisy.nbytes, 2 * new * dim * config.ffn_dim),
        "normalize": Call(lambda: vae.normalize(frames, gamma, True), 2 * frames.nbytes),
    }


def against_the_ceiling(bench: Benchmark, name: str, call: Call) -> None:
    """One call's seconds, and how near they are to those of its bytes or its product at this run's ceilings."""
    if not bench.record.allows(f"kernel: {name}", 0):
        return
    taken = bench.each(call.run)
    with plain_torch():
        plain = bench.each(call.run)
    copy, product = bench.record[COPY], bench.record[PRODUCT]
    floors = [work / (rate * TERA) for work, rate in ((call.moved, copy), (call.operations, product)) if rate]
    note = f"{max(floors):.3g} s at the ceiling" if floors else "no ceiling was measured"
    bench.record.put(f"kernel: {name}", taken, "s", note)
    bench.record.put(f"plain torch: {name}", plain, "s")
