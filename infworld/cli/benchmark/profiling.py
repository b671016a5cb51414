"""The benchmark's profiles: the kernels that take the time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from infworld.cli.benchmark.harness import Benchmark, clip, timestep

TOP_KERNELS = 15


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
