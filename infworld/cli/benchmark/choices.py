"""The benchmark's choices: what the engine chose between, each way measured."""

from __future__ import annotations

from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

import infworld.vae
from infworld.cli.benchmark.harness import Benchmark, clip, guidance_of, timestep, tokens_of
from infworld.cli.benchmark.model import NoiseText
from infworld.layers import fastest_attention


def choices(bench: Benchmark) -> None:
    """What the engine chose between, each way measured."""
    two_texts_at_once(bench)
    fused_projections(bench)
    attention_backends(bench)
    vae_ways(bench)


def two_texts_at_once(bench: Benchmark) -> None:
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


def fused_projections(bench: Benchmark) -> None:
    """The queries', keys' and values' projections as one matrix product and as three."""
    dim, tokens = bench.config.model_cfg.dim, tokens_of(bench, bench.config.chunk_latents)
    x, w = (torch.randn(n, dim, device=bench.device).to(bench.dtype) for n in (tokens, 3 * dim))
    parts = w.chunk(3)
    bench.seconds("choice: projections q, k, v of one block as one", lambda: F.linear(x, w), repeats=20)
    bench.seconds(
        "choice: projections q, k, v of one block as three", lambda: [F.linear(x, p) for p in parts], repeats=20
    )


def attention_backends(bench: Benchmark) -> None:
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


def vae_ways(bench: Benchmark) -> None:
    """Other ways through the VAE on a GPU: dtype, form of the convolutions, latents per pass."""
    if bench.device.type != "cuda":
        return
    vae, latents = bench.world.vae, bench.noise(bench.config.chunk_latents)
    video = clip(bench, bench.config.chunk_frames + 1)
    with torch.inference_mode():
        bench.seconds("choice: decode a chunk, float32", lambda: bench.naive_vae.decode(latents), repeats=1)
        for tile in (1, 2, 4):
            with bench.peak_memory(f"choice: peak memory, decode {tile} latents at a time"):
                bench.seconds(
                    f"choice: decode a chunk, {tile} latents at a time", partial(vae.decode, latents, tile=tile)
                )
        for tile in (1, 4):
            bench.seconds(f"choice: encode a chunk, {tile} latents at a time", partial(vae.encode, video, tile=tile))
        with torch.backends.cudnn.flags(benchmark=True, allow_tf32=True):
            bench.seconds("choice: decode a chunk, cuDNN searching", lambda: vae.decode(latents), "after the search", 1)
        with mock.patch.object(infworld.vae, "_convolve_3d", infworld.vae._convolve_by_frame):
            bench.seconds("choice: decode a chunk, 2-D convolutions", lambda: vae.decode(latents), repeats=1)
            bench.seconds("choice: encode a chunk, 2-D convolutions", lambda: vae.encode(video), repeats=1)
