"""Walks through procedural worlds as latents: what the world model trains on, kept on the GPU and partly renewed.

Everything is as inference has it: the history is the VAE's continued encoding of the whole walk, the target is the
fresh encoding of one chunk's 81 frames. For a config with shorter chunk lengths too there are fresh encodings of short
chunks all along the walk, and histories whose last latents are younger than their compressed part, as live play has
them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from infworld.config import FRAMES_PER_LATENT, ModelConfig
from infworld.text import ByteTextEncoder
from infworld.training.frames import to_video
from infworld.training.pictures import Pictures
from infworld.training.run import finish
from infworld.training.scenes import KINDS, draw_scenes
from infworld.training.walks import revisits, sample_actions
from infworld.training.worlds import TRAIN_SEEDS
from infworld.vae import VideoVAE

PIXELS_AT_ONCE = 16 * 96 * 128  # of one frame of all walks that are rendered, encoded or painted together
SEEDS_PER_RUN = 1_000_000
RETURNING = 4  # times more often a chunk is drawn if all that it shows was seen before and lost sight of
BLUR = (0.5, 2.5)  # pixels, standard deviation
PALE = (0.6, 1.0)  # contrast left


@dataclass(frozen=True)
class Cut:
    """Where in a chunk a short one begins and what its memory is like, all in latents.

    place: of the beginning, after the chunk's. new: what the target adds. recent: the last ones of the history, which
    came `new` at a time since it was compressed.
    """

    place: int
    new: int
    recent: int = 0


@dataclass
class Batch:
    """Samples with histories of one length: history (B, C, 1 + 20 k, h, w), target (B, C, 21, h, w), move and view
    (B, 81) int64, text ids and mask (B, L) int64. With a `Cut`, other lengths; the history's last `recent` latents came
    since it was compressed."""

    history: Tensor
    target: Tensor
    move: Tensor
    view: Tensor
    ids: Tensor
    mask: Tensor
    recent: int = 0


Painter = Callable[["Batch"], Tensor]
Labeller = Callable[[Tensor, Tensor], Tensor]


class WalkPool:
    """Up to `size` walks of `chunks` chunks each, as latents on `device`, from world seeds `first_seed`, + 1, ...

    A sample is some chunk of a walk with any number of chunks before it as its history: a walk is as good as all the
    shorter walks that lie in it.
    """

    def __init__(
        self,
        vae: VideoVAE,
        text: ByteTextEncoder,
        config: ModelConfig,
        *,
        size: int,
        chunks: int,
        mixture: dict[str, float],
        first_seed: int,
        device: torch.device,
        compile: bool = False,
        labeller: Labeller | None = None,
        faded: float = 0.0,
        pictures: Pictures | None = None,
        kinds: Sequence[str] = KINDS,
    ):
        """labeller: says of a walk's poses (T, 4) and of what was done (2, T - 1) what is learned as move and view; by
        default what was done. compile: the renderer. faded: the share of walks whose history fades (`fade`).
        pictures: on `device`; with them the walks of each renewal are of another of `kinds`; else of toy worlds.
        """
        self.vae, self.text, self.config, self.mixture = vae, text, config, mixture
        self.size, self.chunks, self.device, self.compile = size, chunks, device, compile
        self.labeller, self.faded = labeller, faded
        self.pictures, self.kinds, self.renewals = pictures, kinds if pictures else ("toy",), 0
        self.next_seed = first_seed
        self.generator = torch.Generator().manual_seed(first_seed)
        self.filled = self.oldest = 0
        height, width = config.buckets[0]
        shape = (config.vae_cfg.z_dim, height // config.vae_cfg.space, width // config.vae_cfg.space)
        made = {"dtype": vae.conv1.weight.dtype, "device": device}
        self.at_once = max(1, PIXELS_AT_ONCE // (height * width))
        self.new_latents = config.chunk_latents - 1
        self.shorts = short_lengths(config)
        self.places = range(self.shorts[0], self.new_latents, self.shorts[0]) if self.shorts else range(0)
        longest = self.places[-1] + self.shorts[-1] if self.shorts else self.new_latents
        # A short chunk that begins late in the walk's last one ends beyond it.
        self.frames = chunks * config.chunk_frames + FRAMES_PER_LATENT * max(0, longest - self.new_latents)
        self.history = torch.zeros(size, 1 + chunks * self.new_latents, *shape, **made)
        self.targets = torch.zeros(size, chunks, 1 + self.new_latents, *shape, **made)
        fresh = (size, chunks, len(self.places), 1 + max(self.shorts, default=0))
        self.short_targets = torch.zeros(*fresh, *shape, **made)
        self.actions = torch.zeros(size, 2, self.frames + 1, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(size, 2, text.model_max_length, dtype=torch.int64, device=device)
        self.returns = torch.full((size, self.frames), -1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def renew(self, count: int, painter: Painter | None = None) -> float:
        """Adds `count` walks, in place of the oldest ones once the pool is full; returns the seconds it took.

        painter: paints every chunk's target anew, given its history; the walks' histories become what it painted, so
        that a model learns from histories like its own. Targets stay the truth.
        """
        finish(self.device)
        began = time.monotonic()
        actions = torch.stack(sample_actions(self.mixture, count, self.frames + 1, self.generator), 1)
        kind, seeds = self.kinds[self.renewals % len(self.kinds)], range(self.next_seed, self.next_seed + count)
        move, view = actions[:, :, :-1].unbind(1)
        scenes = draw_scenes(kind, seeds, move, view, self.pictures, self.generator)
        self.renewals += 1
        if self.labeller:
            done = zip(scenes.poses, actions[:, :, :-1], strict=True)
            actions[:, :, :-1] = torch.stack([self.labeller(pose, action) for pose, action in done])
        slots = torch.arange(self.oldest, self.oldest + count) % self.size
        self.next_seed, self.oldest = self.next_seed + count, int(slots[-1] + 1) % self.size
        self.filled = min(self.size, self.filled + count)
        tokens = torch.stack(self.text.tokenize(scenes.captions), 1)
        self.actions[slots], self.tokens[slots] = actions.to(self.device), tokens.to(self.device)
        for first in range(0, count, self.at_once):
            part = slice(first, first + self.at_once)
            self.returns[slots[part]] = revisits(scenes.poses[part].to(self.device))[:, 1:]
            self._encode(slots[part], scenes.render(part, self.config.buckets[0], self.device, self.compile))
            if painter:
                self._paint(slots[part], painter)
        finish(self.device)
        return time.monotonic() - began

    def _encode(self, slots: Tensor, frames: Tensor) -> None:
        """Keeps walks' latents: continued ones as history, fresh ones of every chunk, short ones too, as targets.

        Some histories fade; targets do not.
        """
        video = to_video(frames, self.vae.conv1.weight.dtype)
        step = self.config.chunk_frames
        latents, _ = self.vae.encode(fade(video[:, :, : self.chunks * step + 1], self.faded, self.generator))
        self.history[slots] = rearrange(latents, "b c t h w -> b t c h w").to(self.history)
        for chunk in range(self.chunks):
            latents, _ = self.vae.encode(video[:, :, chunk * step : (chunk + 1) * step + 1])
            self.targets[slots, chunk] = rearrange(latents, "b c t h w -> b t c h w").to(self.targets)
            for i, place in enumerate(self.places):
                first = chunk * step + FRAMES_PER_LATENT * place
                latents, _ = self.vae.encode(video[:, :, first : first + 1 + FRAMES_PER_LATENT * self.shorts[-1]])
                self.short_targets[slots, chunk, i] = rearrange(latents, "b c t h w -> b t c h w").to(self.targets)

    def _paint(self, slots: Tensor, painter: Painter) -> None:
        """Puts the painter's films in place of the histories of these walks, chunk after chunk as in a rollout."""
        slots = slots.to(self.device)
        start = torch.zeros_like(slots)
        first = rearrange(self.targets[slots, 0, :1], "b t c h w -> b c t h w")
        _, state = self.vae.encode(self.vae.decode(first))
        for chunk in range(self.chunks):
            video = self.vae.decode(painter(self.select(slots, start, chunk)).to(self.history.dtype))
            latents, state = self.vae.encode(video[:, :, 1:], state)
            new = slice(1 + chunk * self.new_latents, 1 + (chunk + 1) * self.new_latents)
            self.history[slots, new] = rearrange(latents, "b c t h w -> b t c h w").to(self.history)

    def batch(self, chunks: int, count: int, cut: Cut | None = None) -> Batch:
        """`count` random samples with a history of that many chunks, more often such as need it: where the walk comes
        back to what the history has seen and then lost sight of. cut: of short chunks."""
        weights = 1 + RETURNING * self.needs(chunks, cut)
        drawn = torch.multinomial(weights.flatten(), count, replacement=True)
        return self.select(drawn // weights.shape[1], drawn % weights.shape[1], chunks, cut)

    def needs(self, chunks: int, cut: Cut | None = None) -> Tensor:
        """Of every sample with a history of that many chunks, by walk and first chunk: the share of the target's frames
        that need the history's memory (`walks.revisits`), (filled, self.chunks - chunks)."""
        cut = cut or Cut(0, self.new_latents)
        begun = self.config.chunk_frames * torch.arange(self.chunks - chunks, device=self.device)[:, None]
        known = begun + self.config.chunk_frames * chunks + FRAMES_PER_LATENT * cut.place
        frames = known + torch.arange(FRAMES_PER_LATENT * cut.new, device=self.device)
        seen = self.returns[: self.filled, frames]
        return ((begun <= seen) & (seen <= known)).float().mean(2)

    def select(self, index: Tensor, start: Tensor, chunks: int, cut: Cut | None = None) -> Batch:
        """Of the walks `index` (N,): `chunks` chunks from chunk `start` (N,) on as history, the next one as target.

        A history that begins inside a walk begins with that chunk's fresh encoding and goes on with the walk's own
        latents: by then the encoder has forgotten what it saw before, but for a thousandth of their deviation. cut: a
        short target that may begin later, and a longer history. The first action after a short target, which live play
        does not know, is the target's last.
        """
        short, cut = cut is not None, cut or Cut(0, self.new_latents)
        end = start + chunks
        count = FRAMES_PER_LATENT * cut.new
        frames = self._offsets(end * self.config.chunk_frames + FRAMES_PER_LATENT * cut.place, count + 1)
        if short:
            frames = torch.cat([frames[:, :-1], frames[:, -2:-1]], 1)
        move, view = self.actions[index[:, None], :, frames].unbind(2)
        ids, mask = self.tokens[index].unbind(1)
        known = 1 + chunks * self.new_latents + cut.place
        own = self.history[index[:, None], self._offsets(start * self.new_latents, known)]
        fresh = self.targets[index, start][:, :known]
        inside = (start > 0).view(-1, 1, 1, 1, 1)
        begun = torch.where(inside, fresh, own[:, : fresh.shape[1]])
        target = self.short_targets[index, end, self.places.index(cut.place)] if cut.place else self.targets[index, end]
        return Batch(
            history=rearrange(torch.cat([begun, own[:, fresh.shape[1] :]], 1), "b t c h w -> b c t h w").float(),
            target=rearrange(target[:, : 1 + cut.new], "b t c h w -> b c t h w").float(),
            move=move,
            view=view,
            ids=ids,
            mask=mask,
            recent=cut.recent,
        )

    def _offsets(self, first: Tensor, count: int) -> Tensor:
        """first (N,) -> first, first + 1, ... (N, count)."""
        return first[:, None] + torch.arange(count, device=self.device)


def short_lengths(config: ModelConfig) -> list[int]:
    """The latents that the trained chunks add which are shorter than the model's own, sorted."""
    own = config.chunk_latents - 1
    lengths = {frames // FRAMES_PER_LATENT for frames in config.validation_data.chunk_lengths}
    return sorted(length for length in lengths if length < own)


def fade(video: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """Blurs and pales a share of the videos (B, 3, T, H, W) more and more, as a model's own long films do.

    It learns to bring back what they lost: the truth that follows such a history is as crisp as ever. The first frame
    stays as it is. generator: on the CPU; it decides which, how far and how fast.
    """
    count, _, frames, *_ = video.shape
    draw = torch.rand(count, 4, generator=generator)
    faded = video.clone()
    for row in (draw[:, 0] < share).nonzero().flatten().tolist():
        sigma, left = (
            low + u * (high - low) for u, (low, high) in zip(draw[row, 1:3].tolist(), (BLUR, PALE), strict=True)
        )
        pictures = rearrange(video[row], "c t h w -> t c h w")
        pale = pictures.mean((2, 3), keepdim=True).lerp(blur(pictures, sigma), left)
        full = max(1, draw[row, 3].item() * frames)  # the frame from which on it fades no further
        along = (torch.arange(frames, device=video.device) / full).clamp(max=1).to(video.dtype)
        faded[row] = rearrange(pictures.lerp(pale, along.view(-1, 1, 1, 1)), "t c h w -> c t h w")
    return faded


def blur(pictures: Tensor, sigma: float) -> Tensor:
    """Pictures (B, C, H, W) under a Gaussian of `sigma` pixels."""
    reach = min(math.ceil(3 * sigma), *(size - 1 for size in pictures.shape[2:]))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=pictures.device) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(pictures.dtype)
    channels = pictures.shape[1]
    padded = F.pad(pictures, (reach, reach, reach, reach), mode="reflect")
    rows = F.conv2d(padded, kernel.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)
    return F.conv2d(rows, kernel.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)


def first_seed(run: int, rank: int, ranks: int) -> int:
    """The first world seed of a rank in run 0, 1, ... of a series: far enough from all others' that no two meet.

    Raises: ValueError for a run that would leave the training seeds.
    """
    runs = len(TRAIN_SEEDS) // SEEDS_PER_RUN
    if not 0 <= run < runs:
        raise ValueError(f"--seed is {run}: expected 0 to {runs - 1}, as the worlds beyond are kept for measuring")
    return SEEDS_PER_RUN * run + SEEDS_PER_RUN // ranks * rank
