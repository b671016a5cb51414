"""Live play: a film that goes on in short chunks, whose actions are known only when each begins.

A World films any chunk from its session alone. A LiveWalk keeps what does not change from one short chunk to the next:
the history is compressed anew every few chunks only, and the latents since then follow it uncompressed, each chunk's
behind the memory that there was. A chunk after a fresh compression is the one that the World makes without guidance by
the memory, unless the history is so long that it is compressed in windows: those that have hardly moved are kept. The
memory is made ready between two chunks, so that what is steered does not wait for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from infworld.actions import ActionScript
from infworld.config import FRAMES_PER_LATENT, ModelConfig
from infworld.dit import KeptMemory
from infworld.layers import fastest_attention
from infworld.memory import MAX_SINGLE_PASS, WINDOW, WINDOWS, memory_latents, window_starts
from infworld.memory_plan import FASTEST
from infworld.presets import find_preset
from infworld.progress import Progress
from infworld.sampler import Velocity
from infworld.session import Session
from infworld.settings import FilmSettings
from infworld.world import Chunk, CompressedHistory, Frames, Ways, World, of_all_texts

REFRESH = 16  # latents that follow the compressed history at most, as models for short chunks are trained
UNTRAINED_REFRESH = 4  # the same for other models, which soon forget what is not compressed (docs/performance.md)
SLACK = 16  # latents that a window of a long history may move before it is compressed anew, but the last of them
MAX_KEPT_BYTES = 2**30  # of keys and values: beyond, they are computed anew for each chunk


@dataclass(frozen=True, eq=False)
class Kept:
    """What a walk keeps between chunks: the compressed history; and, unless it is too large, for each text the keys and
    values of the whole memory, which hold for this basis (`LiveWalk._basis`)."""

    compressed: CompressedHistory
    basis: tuple
    memories: list[KeptMemory]


class LiveWalk:
    """A film that goes on in short chunks. `session` is the film after the last finished chunk.

    Its settings may be changed between chunks (`walk.session = walk.session.with_prompt("night")`); another film needs
    another walk. `refresh`: how many latents may follow the compressed history before it is compressed anew. `slack`:
    by how many a window of a long history may move before that is; 0 for models that walk in whole chunks. Raises
    ValueError for a session that does not fit the world's model.
    """

    def __init__(self, world: World, session: Session):
        world.check_session(session)
        self.world = world
        self.session = session
        self.refresh = refresh_after(world.config)
        self.slack = SLACK if min(world.config.validation_data.live_lengths) < world.config.chunk_frames else 0
        self._kept: Kept | None = None
        self._windows: dict[int, tuple[int, Tensor]] = {}  # of a long history: by place, the first latent; compressed
        self._encoder: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}  # the last state and the same unreduced

    def iterate_chunk(self, actions: ActionScript, frames: int) -> Generator[Progress | Frames | Chunk]:
        """The next chunk step by step: a Progress after each stage and step, the new Frames as soon as they are
        decoded, and at last the Chunk.

        actions: of the new frames alone; they take the place of all that the session's script had from there on.
        frames: new ones, a multiple of 4 up to 80. Closing the iterator ends the work after the step it is in, and
        leaves `session` as it was. Raises ValueError for a chunk that cannot be, before anything is computed.
        """
        session = self.session.with_actions(actions)
        return self._made(self.world.iterate(session, 1, frames, ways=Ways(self._velocities, self._encode)))

    def _made(self, results: Generator[Progress | Frames | Chunk]) -> Generator[Progress | Frames | Chunk]:
        with closing(results):
            for result in results:
                if isinstance(result, Chunk):
                    self.session, frames = result.session, FRAMES_PER_LATENT * (result.latents.shape[2] - 1)
                yield result
        with suppress(torch.OutOfMemoryError):  # with which the next chunk can deal
            self._prepare(frames)

    def _velocities(self, session: Session, frames: int) -> tuple[Velocity, None]:
        """The velocity of the next chunk, without memory guidance: time matters more."""
        return self._velocity(session, frames), None

    @torch.inference_mode()
    def _velocity(self, session: Session, frames: int) -> Velocity:
        """The velocity of the next chunk. What is kept of the memory is extended by the latents that are new."""
        world, settings = self.world, session.settings
        # A chunk also sees the first action after it: the last one, as if its key were held.
        known = session.settings.actions.pairs(0, session.num_frames - 1 + frames)
        session = session.replace_settings(actions=ActionScript.from_pairs([*known, known[-1]]))
        kept = self._prepared(session)
        if not kept.memories:
            return world.velocity(session, frames, kept.compressed)
        with fastest_attention(world.device):
            actions = world.encode_actions(session, frames)

        def of_text(memory: KeptMemory, steps: Iterator[int]) -> Velocity:
            @torch.inference_mode()
            @fastest_attention(world.device)
            def velocity(z: Tensor, timestep: Tensor) -> Tensor:
                return world.sign * memory.denoise(z, next(steps), actions)

            return velocity

        # The negative prompt's velocity is asked for at every few steps only.
        every = 1, find_preset(settings.preset).guidance_interval
        steps = (itertools.count(0, interval) for interval in every)
        return of_all_texts([of_text(*each) for each in zip(kept.memories, steps, strict=False)], settings)

    @torch.inference_mode()
    def _prepare(self, frames: int) -> None:
        """All that the next chunk, of about as many frames, needs and that does not depend on its actions: computed
        before it is known what they are, so that a key does not wait for it."""
        compressed = self._prepared(self.session).compressed
        if not self.world.team:
            self._compress_ahead(self.session, compressed.length, frames // FRAMES_PER_LATENT)

    def _prepared(self, session: Session) -> Kept:
        """What is kept, extended by the latents that are new, or made anew where it is old or other settings hold."""
        kept, history = self._kept, session.history
        if kept is None or history.shape[2] - kept.compressed.length > self.refresh:
            compressed = self.world.compress(session) if self.world.team else self._compress(session)
            kept = None
        else:
            compressed = kept.compressed
        if kept is None or kept.basis != self._basis(session.settings):
            kept = Kept(compressed, self._basis(session.settings), self._memories(session, compressed))
        with fastest_attention(self.world.device):
            for memory in kept.memories:
                seen = compressed.length - 1 + memory.latents - compressed.latents.shape[2]
                if seen < history.shape[2]:
                    memory.extend(history[:, :, seen:].to(self.world.device))
        self._kept = kept
        return kept

    def _memories(self, session: Session, compressed: CompressedHistory) -> list[KeptMemory]:
        """The memory of the session for each text, or none where it is not to be kept."""
        world, model = self.world, self.world.transformer
        timesteps = world.timesteps(session.settings)[:-1]
        size = (session.history.shape[3], session.history.shape[4])
        room = memory_latents(MAX_SINGLE_PASS) + self.refresh + world.config.chunk_latents
        nbytes = KeptMemory.nbytes(model.config, len(timesteps), size, room, model.dtype)
        if world.team or world.plan != FASTEST or nbytes > MAX_KEPT_BYTES:
            return []
        recent = session.history[:, :, compressed.length - 1 :].to(compressed.latents)
        latents, memories = torch.cat([compressed.latents, recent], dim=2), []
        with fastest_attention(world.device):
            for text in world.texts(session):
                memory = model.keep_memory(model.embed_text(text.hidden, text.mask), timesteps, size, room)
                memory.extend(latents)
                memories.append(memory)
        return memories

    def _compress(self, session: Session) -> CompressedHistory:
        """`World.compress`, but for windows of a long history that have moved by less than `slack`."""

        def map_windows(encode: Callable[[Tensor], Tensor], windows: list[Tensor]) -> Iterable[Tensor]:
            for place, start in enumerate(window_starts(session.history.shape[2])):
                if not self._is_kept(place, start):
                    self._windows[place] = start, encode(windows[place])
            return [self._windows[place][1] for place in range(WINDOWS)]

        return self.world.compress(session, map_windows)

    def _compress_ahead(self, session: Session, length: int, new: int) -> None:
        """Compresses one window of those that the next refreshment will need, or the first that needs windows at all,
        if its latents are there.

        length: of the compressed history. new: latents of a chunk.
        """
        known = until = session.history.shape[2]
        while until - length <= self.refresh:
            until += new
        starts = window_starts(max(until, MAX_SINGLE_PASS + 1) if self.slack else until)
        missing = [place for place, start in enumerate(starts) if not self._is_kept(place, start)]
        if len(starts) > 1 and missing and starts[missing[0]] + WINDOW <= known:
            start, model = starts[missing[0]], self.world.transformer
            window = session.history[:, :, start : start + WINDOW].to(self.world.device, model.dtype)
            with fastest_attention(self.world.device):
                self._windows[missing[0]] = start, model.latent_encoder.encode(window)

    def _is_kept(self, place: int, start: int) -> bool:
        """Whether what is kept of the window at this place will do for one that begins with this latent."""
        if place not in self._windows:
            return False
        moved = start - self._windows[place][0]
        return moved == 0 or (0 < moved < self.slack and place < WINDOWS - 1)

    @torch.inference_mode()
    def _encode(self, video: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """`World.encode`, from the whole of a state if that was the last one."""
        if self.world.team:
            return self.world.encode(video, state)
        last, whole = self._encoder
        latents, whole = self.world.vae.encode(video, whole if state is last else state, whole=True)
        state = {name: tensor.cpu() for name, tensor in self.world.vae.reduced(whole).items()}
        self._encoder = state, whole
        return latents.cpu(), state

    def _basis(self, settings: FilmSettings) -> tuple:
        """What keys and values of a memory depend on besides the latents, and whether they are kept at all."""
        prompts = settings.prompt, settings.guidance == 1 or settings.negative_prompt
        return *prompts, settings.steps, settings.preset, self.refresh, self.world.plan


def refresh_after(config: ModelConfig) -> int:
    """`LiveWalk.refresh` of a model's walks."""
    return REFRESH if min(config.validation_data.chunk_lengths) < config.chunk_frames else UNTRAINED_REFRESH
