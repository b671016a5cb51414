"""Films that a model makes of worlds whose truth is known: many at once, with the right or with a wrong memory.

The same chunks as `infworld.rollout` makes, batched over worlds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from infworld import live
from infworld.actions import NO_OP, ActionScript
from infworld.config import FRAMES_PER_LATENT
from infworld.dit import MemoryStream, TextContext
from infworld.presets import Preset, find_preset
from infworld.sampler import sample, schedule
from infworld.training.frames import to_frames, to_video
from infworld.training.pictures import Atlas
from infworld.training.render import render
from infworld.training.stages import Stages, framing_stages, render_stages
from infworld.training.walks import sample_actions
from infworld.training.worlds import Worlds, captions, make_worlds, spawn, walk
from infworld.world import World

TRIES = 8  # start poses to choose from, where a walk must not bump into things


@dataclass(frozen=True, eq=False)
class Bench:
    """One batch of B worlds and the model that films them."""

    model: World
    worlds: Worlds
    context: TextContext  # of the worlds' captions
    seed: int
    steps: int
    preset: Preset

    @property
    def chunk(self) -> int:
        """New frames per chunk: 80."""
        return self.model.config.chunk_frames

    @property
    def live_frames(self) -> int:
        """New frames per chunk of a live walk: 16."""
        return FRAMES_PER_LATENT * max(1, self.chunk // (5 * FRAMES_PER_LATENT))

    def render(self, poses: Tensor) -> Tensor:
        """The true frames (B, T, H, W, 3) uint8 seen from poses (B, T, 4)."""
        return render(self.worlds, poses, *self.model.config.buckets[0])


@dataclass(frozen=True, eq=False)
class PhotoBench(Bench):
    """B photographs as places to turn and walk in; its worlds lend their seeds alone."""

    stages: Stages
    photos: Atlas

    def render(self, poses: Tensor) -> Tensor:
        """As a bench's; the pose 0, 0, 0, 0 shows the middle of the photograph."""
        return render_stages(self.stages, self.photos, poses, *self.model.config.buckets[0])


@dataclass(frozen=True, eq=False)
class Film:
    """B films so far: frames (B, T, H, W, 3) uint8, their latents, and what the VAE encoder carries on."""

    frames: Tensor
    history: Tensor
    state: dict[str, Tensor]


def make_bench(
    model: World,
    text_encoder,
    seeds: Sequence[int],
    seed: int = 0,
    steps: int | None = None,
    preset: str | None = None,
) -> Bench:
    """A bench on the model's device.

    seeds: of the worlds, at least two, as each lends its memory to the next. seed: of the noise and of random walks.
    preset: the model's own if None. steps: of the sampler, the preset's if None. Raises ValueError for fewer worlds and
    for a model with guidance.
    """
    settings = model.config.val_scheduler_cfg
    if len(seeds) < 2:
        raise ValueError(f"{len(seeds)} world: at least 2 are needed, as each lends its memory to the next")
    if settings.text_cfg_scale != 1:
        raise ValueError(
            f"{model.config.name} has guidance {settings.text_cfg_scale}: only models without are measured"
        )
    worlds = make_worlds(seeds)
    with torch.inference_mode():
        text = text_encoder.encode(captions(worlds))
        context = model.transformer.embed_text(text.hidden, text.mask)
    found = find_preset(settings.preset if preset is None else preset)
    return Bench(model, worlds.to(model.device), context, seed, steps or found.sampler_steps(settings), found)


def make_photo_bench(
    model: World, text_encoder, photos: Atlas, seed: int = 0, steps: int | None = None, preset: str | None = None
) -> PhotoBench:
    """All photographs of an atlas, prompted with nothing. The rest as for `make_bench`."""
    bench = make_bench(model, text_encoder, range(len(photos)), seed, steps, preset)
    with torch.inference_mode():
        text = text_encoder.encode([""] * len(photos))
        context = model.transformer.embed_text(text.hidden, text.mask)
    stages = framing_stages(photos, torch.arange(len(photos))).to(model.device)
    return PhotoBench(model, bench.worlds, context, seed, bench.steps, bench.preset, stages, photos.to(model.device))


def true_film(bench: Bench, frames: Tensor) -> Film:
    """The film that consists of rendered frames (B, 1 + 4 n, H, W, 3)."""
    latents, state = bench.model.vae.encode(to_video(frames[:, :1]))
    film = Film(frames[:, :1], latents, state)
    for known in range(1, frames.shape[1], bench.chunk):
        film = append(bench, film, to_video(frames[:, known : known + bench.chunk]))
    return film


def append(bench: Bench, film: Film, video: Tensor) -> Film:
    """The film with more frames, given as video (B, 3, 4 n, H, W)."""
    latents, state = bench.model.vae.encode(video, film.state)
    frames = torch.cat([film.frames, to_frames(video)], dim=1)
    return Film(frames, torch.cat([film.history, latents], dim=2), state)


def own_film(bench: Bench, film: Film, script: Tensor, chunks: int) -> Film:
    """The film with chunks that the model makes: its own rollout."""
    for _ in range(chunks):
        film = append(bench, film, next_chunk(bench, film, script)[:, :, 1:])
    return film


@dataclass
class LiveMemory:
    """The memory of B live walks (`infworld.live`): compressed up to `length` latents, extended since.

    wrong: every world gets the compressed history of its neighbour in the batch, and its own latents since.
    """

    wrong: bool = False
    stream: MemoryStream | None = None
    length: int = 0
    known: int = 0

    def update(self, bench: Bench, film: Film) -> MemoryStream:
        """The memory of the film so far."""
        model, history = bench.model.transformer, film.history.to(bench.model.transformer.dtype)
        if self.stream is None or history.shape[2] - self.length > live.refresh_after(bench.model.config):
            compressed = model.latent_encoder.compress(history)
            if self.wrong:
                compressed = compressed.roll(1, dims=0)
            self.length = history.shape[2]
            self.stream = model.encode_memory(torch.cat([compressed, history[:, :, -1:]], dim=2), bench.context)
        elif history.shape[2] > self.known:
            self.stream = model.extend_memory(self.stream, history[:, :, self.known :], bench.context)
        self.known = history.shape[2]
        return self.stream


def live_film(bench: Bench, film: Film, script: Tensor, chunks: int, memory: LiveMemory) -> Film:
    """The film with chunks of `live_frames` new frames, as a live walk makes them."""
    for _ in range(chunks):
        done = script[:, :, : film.frames.shape[1] - 1 + bench.live_frames]
        held = torch.cat([done, done[:, :, -1:]], dim=2)
        latents = _sample(bench, film, held, bench.live_frames, memory.update(bench, film))
        film = append(bench, film, bench.model.vae.decode(latents)[:, :, 1:])
    return film


def next_chunk(
    bench: Bench, film: Film, script: Tensor, wrong_memory: bool = False, frames: int | None = None
) -> Tensor:
    """The next chunk as video (B, 3, 81, H, W), or its first 1 + `frames` frames; frame 0 repeats the last known one.

    script: (B, 2, T) move and view of every frame of the film, nothing is done past its end. wrong_memory: every world
    gets the compressed memory of its neighbour in the batch and its own last latent.
    """
    stream, forgetful = LiveMemory(wrong_memory).update(bench, film), None
    if bench.model.config.val_scheduler_cfg.memory_guidance and film.history.shape[2] > 1:
        model = bench.model.transformer
        forgetful = model.encode_memory(film.history[:, :, -1:].to(model.dtype), bench.context)
    latents = _sample(bench, film, script, bench.chunk, stream, forgetful)
    kept = latents.shape[2] if frames is None else 1 + frames // FRAMES_PER_LATENT
    return bench.model.vae.decode(latents[:, :, :kept])


def _sample(
    bench: Bench,
    film: Film,
    script: Tensor,
    frames: int,
    stream: MemoryStream,
    forgetful: MemoryStream | None = None,
) -> Tensor:
    """The latents (B, C, 1 + frames / 4, h, w) of the next chunk, of so many new frames. forgetful: without the memory,
    for its guidance."""
    model, sampler = bench.model.transformer, bench.model.config.val_scheduler_cfg
    known = film.frames.shape[1]
    script = torch.nn.functional.pad(script, (0, max(0, known + frames - script.shape[2])), value=NO_OP[0])
    actions = model.action_encoder(*script[:, :, known - 1 : known + frames].unbind(1))

    def velocity(stream: MemoryStream, z: Tensor, timestep: Tensor) -> Tensor:
        return bench.model.sign * model.denoise(z, timestep.to(z.device).reshape(1), stream, actions, bench.context)

    return sample(
        partial(velocity, stream),
        draw_noise(bench, film, frames),
        schedule(sampler, bench.steps, end_at_zero=bench.preset.end_at_zero),
        order=bench.preset.order,
        settled=sampler.settled,
        forgetful=forgetful and partial(velocity, forgetful),
        guidance=sampler.memory_guidance,
    )


def draw_noise(bench: Bench, film: Film, frames: int | None = None) -> Tensor:
    """Noise of the next chunk (B, C, 1 + frames / 4, h, w), by default of the model's own length: decided by seed,
    world and chunk, whatever the batch or device."""
    frames = frames or bench.chunk
    shape = (film.history.shape[1], 1 + frames // FRAMES_PER_LATENT, *film.history.shape[3:])
    chunk = film.frames.shape[1] // frames
    seeds = [(bench.seed * 1_000_003 + world) * 1009 + chunk for world in bench.worlds.seed.tolist()]
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(noise).to(film.history.device)


def same_script(bench: Bench, text: str) -> Tensor:
    """One script, such as "right 80, left 80", for all worlds: (B, 2, T)."""
    pairs = torch.tensor(ActionScript.parse(text).pairs(), device=bench.model.device)
    return pairs.T.expand(len(bench.worlds), -1, -1)


def random_script(bench: Bench, mixture: dict[str, float], frames: int) -> Tensor:
    """A random walk for each world, (B, 2, frames), decided by seed and world."""
    generator, scripts = torch.Generator(), []
    for world in bench.worlds.seed.tolist():
        move, view = sample_actions(mixture, 1, frames, generator.manual_seed(bench.seed * 1_000_003 + world))
        scripts.append(torch.stack([move[0], view[0]]))
    return torch.stack(scripts).to(bench.model.device)


def free_starts(bench: Bench, scripts: Tensor) -> Tensor:
    """Start poses (B, 4) with room to walk: of several, that from which scripts (B, K, 2, T) lead furthest in all."""
    count, ways = scripts.shape[:2]
    starts = torch.stack([spawn(bench.worlds, seed) for seed in range(TRIES)], dim=1)
    worlds = bench.worlds[torch.arange(count, device=starts.device).repeat_interleave(TRIES * ways)]
    move, view = scripts[:, None].expand(-1, TRIES, -1, -1, -1).flatten(0, 2).unbind(1)
    poses = walk(worlds, starts.repeat_interleave(ways, dim=1).flatten(0, 1), move, view)
    length = poses[:, :, :2].diff(dim=1).norm(dim=-1).sum(1).view(count, TRIES, ways).sum(2)
    return starts[torch.arange(count, device=starts.device), length.argmax(1)]


def true_walk(bench: Bench, script: Tensor) -> Tensor:
    """The frames of a walk along a script, from a start with room for it: (B, T + 1, H, W, 3)."""
    return bench.render(walk(bench.worlds, free_starts(bench, script[:, None]), *script.unbind(1)))
