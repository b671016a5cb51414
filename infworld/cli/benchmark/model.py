"""What the benchmark measures: a world of random weights, films of noise, and the plain way that saves nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from infworld.config import ModelConfig
from infworld.dit import InfiniteWorldTransformer
from infworld.presets import EXACT
from infworld.sampler import guide
from infworld.session import Session
from infworld.settings import FilmSettings
from infworld.text import TextEmbedding
from infworld.vae import VideoVAE, build_vae
from infworld.world import World


def random_world(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, vae_dtype: torch.dtype
) -> tuple[World, VideoVAE]:
    """A world of random weights, and the same VAE in float32 for the naive mode."""
    torch.manual_seed(0)
    with torch.device(device):
        transformer = InfiniteWorldTransformer(config.model_cfg).to(dtype).eval().requires_grad_(False)
        naive_vae, vae = (build_vae(config.vae_cfg).eval().requires_grad_(False) for _ in range(2))
    vae.load_state_dict(naive_vae.state_dict())
    return World(config, transformer, vae.to(vae_dtype), NoiseText(config)), naive_vae


class NoiseText:
    """Stands in for a text encoder: noise, always the same for one text, and a quarter of padding."""

    def __init__(self, config: ModelConfig):
        self.length, self.width = config.text_encoder_cfg.model_max_length, config.text_encoder_cfg.dim

    def encode(self, texts: list[str]) -> TextEmbedding:
        rows = [torch.randn(self.length, self.width, generator=generator(sum(text.encode()))) for text in texts]
        mask = (torch.arange(self.length) < self.length * 3 / 4).long()
        return TextEmbedding(torch.stack(rows), mask.repeat(len(texts), 1))


def picture_size(config: ModelConfig) -> tuple[int, int]:
    """Height and width to measure at: the spec's 448x896, or the first of a model that has not that."""
    return (448, 896) if (448, 896) in config.buckets else config.buckets[0]


def noise_session(world: World, size: tuple[int, int], history: int) -> Session:
    """A film in the middle, with so many latents of history (1 + 20 n), all of it noise."""
    config = world.config
    made = (history - 1) // (config.chunk_latents - 1)
    pixels = torch.randint(256, (*size, 3), generator=generator(), dtype=torch.uint8).numpy()
    actions = f"forward {(made + 1) * config.chunk_frames}"
    settings = FilmSettings.for_model(config, actions, "a walk", negative_prompt="blur", preset=EXACT.name)
    session = world.start(pixels, settings)
    return dataclasses.replace(
        session,
        history=noise(config, size, history),
        chunk_latents=(noise(config, size, config.chunk_latents).half(),) * made,
        num_frames=1 + made * config.chunk_frames,
    )


def noise(config: ModelConfig, size: tuple[int, int], latents: int) -> Tensor:
    height, width = (side // config.vae_cfg.space for side in size)
    return torch.randn(1, config.vae_cfg.z_dim, latents, height, width, generator=generator())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain_velocity(world: World, session: Session) -> Callable[[Tensor, Tensor], Tensor]:
    """`World.velocity` without any of its savings: everything in `forward`, both texts as a batch of two."""
    model, device = world.transformer, world.device
    prompts = (
        [session.settings.prompt, session.settings.negative_prompt]
        if session.settings.guidance != 1
        else [session.settings.prompt]
    )
    texts = NoiseText(world.config).encode(prompts).to(device)
    pairs = session.settings.actions.pairs(session.num_frames - 1, session.num_frames + world.config.chunk_frames)
    move, view = torch.tensor(pairs, device=device).T.unsqueeze(1)
    history = session.history.to(device)

    @torch.inference_mode()
    def velocity(z: Tensor, timestep: Tensor) -> Tensor:
        batch = [x.expand(len(prompts), *x.shape[1:]) for x in (z, timestep.reshape(1), history, move, view)]
        v = model(*batch, texts.hidden, texts.mask)
        return guide(v[:1], v[1:], session.settings.guidance) if len(v) == 2 else v

    return velocity
