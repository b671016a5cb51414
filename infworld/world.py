"""The story: a World films a walk chunk by chunk; a Session is all that one film needs to go on (spec section 9).

A World holds only the models. What a film has become is a Session, a value on the CPU that can be saved, sent to
another process and continued, any number of times.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from torch import Tensor

from infworld.config import FRAMES_PER_LATENT, ModelConfig
from infworld.dit import InfiniteWorldTransformer, MemoryStream, TextContext
from infworld.layers import LOCAL, WithKernel, fastest_attention
from infworld.memory import MapWindows
from infworld.memory_plan import FASTEST, TOO_LITTLE, MemoryEstimate, MemoryPlan, NotEnoughMemory, next_smaller_plan
from infworld.pictures import prepare_image, to_uint8
from infworld.presets import find_preset
from infworld.progress import Callback, Progress, ProgressTracker
from infworld.sampler import Velocity, guide, guided, sample_steps, schedule
from infworld.session import Session, check_session, generator_state_of
from infworld.settings import FilmSettings
from infworld.text import TextEmbedding
from infworld.vae import VideoVAE

if TYPE_CHECKING:
    from infworld.parallel import Team

log = logging.getLogger(__name__)

# Of a session's next chunk, of so many new frames: its velocity, and with memory guidance the one without memory.
VelocitiesOf = Callable[[Session, int], tuple[Velocity, Velocity | None]]


@dataclass(frozen=True)
class Ways:
    """How a chunk's velocity and its new frames' latents are computed: what a live walk does with what it keeps.

    velocities: as `World.velocities`. encode: as `World.encode`.
    """

    velocities: VelocitiesOf
    encode: Callable[[Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, eq=False)
class Chunk:
    """One finished chunk: its new frames (T H W 3 uint8; the film's first begins with the picture), the latents
    (1, 16, 21, h, w) they were decoded from, and the session that follows."""

    index: int
    frames: np.ndarray
    latents: Tensor
    seconds: float
    session: Session


@dataclass(frozen=True, eq=False)
class Frames:
    """The new frames of chunk `index` (T H W 3 uint8, the film's first with the picture before them), as soon as they
    are decoded: what remains to be done before the Chunk is encoding them into the history."""

    index: int
    frames: np.ndarray


@dataclass(frozen=True, eq=False)
class CompressedHistory:
    """The compressed part of a memory (1, 16, M, h, w), on the model's device, and how many latents it was made of."""

    latents: Tensor
    length: int


class World:
    """A loaded model, ready to film. Make it with `load`; it is shared freely, since it keeps nothing of a film."""

    def __init__(
        self,
        config: ModelConfig,
        transformer: InfiniteWorldTransformer,
        vae: VideoVAE,
        text_encoder,
        team: Team | None = None,
        plan: MemoryPlan = FASTEST,
    ):
        self.config = config
        self.transformer = transformer
        self.vae = vae
        self.team = team
        self.plan = FASTEST
        self.apply_plan(plan)
        self._coder = vae if team is None else team.shard_vae(vae)

        def encode(*texts: str) -> TextEmbedding:  # a film's texts together: what is loaded for them is large
            return text_encoder.encode(list(texts)).to("cpu")

        self._encode_texts = lru_cache(maxsize=16)(encode if team is None else team.computed_on_rank0(encode))

    @property
    def device(self) -> torch.device:
        return self.transformer.patch_embedding.weight.device

    def rollout(
        self,
        image,
        actions=None,
        prompt: str = "",
        num_frames: int = 161,
        seed: int = 0,
        callback: Callback | None = None,
        *,
        negative_prompt: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        preset: str | None = None,
        chunk_frames: int | None = None,
    ) -> Generator[Chunk]:
        """Films a walk from a picture, yielding each chunk as soon as it is finished.

        image: PIL picture, array (H W 3 uint8) or path. actions: list of {"move", "view"} per frame, ActionScript,
        script text or JSON path; frames past its end have no action. num_frames: 1 + whole chunks of `chunk_frames` new
        frames, which are 80 or fewer in steps of 4 (`validation_data.chunk_lengths`: what the model knows). callback
        receives a Progress after every stage and step; what it raises ends the film and is passed on. preset: one of
        `presets.PRESETS`: "exact", or faster ones. Left out, the steps are the preset's; preset, negative prompt and
        guidance the model's own. Raises ValueError for bad input before anything is computed.
        """
        chunks = self.config.chunks_for(num_frames, chunk_frames)
        choices: dict[str, Any] = {"negative_prompt": negative_prompt, "steps": steps}
        choices |= {"guidance": guidance, "preset": preset}
        settings = FilmSettings.for_model(self.config, actions, prompt, seed=seed, **choices)
        return self.extend(self.start(image, settings), chunks, callback, frames=chunk_frames)

    def start(self, image, settings: Any = None, *args, **choices) -> Session:
        """A film of one frame, the picture (as for `rollout`). In place of settings: the arguments of
        `FilmSettings.for_model` after the config."""
        if not isinstance(settings, FilmSettings):
            settings = FilmSettings.for_model(self.config, settings, *args, **choices)
        video = prepare_image(image, self.config.buckets)
        encode = partial(self.encode, video, None)
        history, state = encode() if self.team is None else self.team.together(encode)
        return Session(
            model=self.config.name,
            picture=to_uint8(video),
            history=history,
            encoder_state=state,
            chunk_latents=(),
            generator_state=generator_state_of(settings.seed),
            settings=settings,
        )

    def extend(
        self, session: Session, chunks: int, callback: Callback | None = None, *, frames: int | None = None
    ) -> Generator[Chunk]:
        """Adds chunks of `frames` new frames each (None: 80) to a film; each Chunk's session can be saved, or extended
        again. callback: as for `rollout`."""
        with closing(self.iterate(session, chunks, frames)) as results:
            for result in results:
                if isinstance(result, Chunk):
                    yield result
                elif isinstance(result, Progress) and callback is not None:
                    callback(result)

    def next_chunk(self, session: Session, callback: Callback | None = None, **options) -> Chunk:
        """The next chunk. `session` itself is unchanged. callback as for `rollout`, options as for `iterate_chunk`."""
        with closing(self.iterate_chunk(session, **options)) as results:
            for result in results:
                if isinstance(result, Progress) and callback is not None:
                    callback(result)
        return result  # type: ignore[return-value]  # the last one is the Chunk

    def iterate_chunk(
        self,
        session: Session,
        *,
        frames: int | None = None,
        noise: Tensor | None = None,
        compressed: CompressedHistory | None = None,
    ) -> Generator[Progress | Chunk]:
        """The next chunk step by step: a Progress after each stage and step, and at last the Chunk.

        frames: new ones, a multiple of 4 up to 80 (None: 80). noise: (1, 16, 1 + frames / 4, h, w) in place of what the
        session's generator would draw. compressed: what `compress` made of an earlier session of this film. The latents
        since then follow it uncompressed: a deviation from the spec that saves compressing anew for each short chunk.
        Closing the iterator ends the work after the step it is in. It may be run by any thread.
        """
        ways = Ways(partial(self.velocities, compressed=compressed), self.encode)
        return _without_frames(self.iterate(session, 1, frames, noise, ways))

    @torch.inference_mode()
    def compress(self, session: Session, map_windows: MapWindows | None = None) -> CompressedHistory:
        """The compressed part of the session's memory, for `iterate_chunk` of this session and its successors.

        map_windows: as for `MemoryCompressor`.
        """
        with fastest_attention(self.device):
            history = session.history.to(self.device, self.transformer.dtype)
            map_windows = map_windows or (self.team.map if self.team else map)
            return CompressedHistory(self.transformer.latent_encoder.compress(history, map_windows), history.shape[2])

    def iterate(
        self,
        session: Session,
        chunks: int,
        frames: int | None = None,
        noise: Tensor | None = None,
        ways: Ways | None = None,
    ) -> Generator[Progress | Frames | Chunk]:
        """All that there is to hear of the next chunks: as `iterate_chunk`, and each chunk's Frames before it.

        ways: how to compute what depends on the past, in place of this World's own.
        """
        self.check_session(session)
        ways = ways or Ways(self.velocities, self.encode)
        results = self._make_chunks(session, chunks, self.config.check_chunk_frames(frames), noise, ways)
        return results if self.team is None else self.team.synced_iterator(results)

    def _make_chunks(
        self, session: Session, chunks: int, frames: int, noise: Tensor | None, ways: Ways
    ) -> Generator[Progress | Frames | Chunk]:
        tracker = ProgressTracker(chunks, session, frames)
        for _ in range(chunks):
            chunk = yield from self._make_chunk(session, tracker, noise, ways)
            session = chunk.session
            yield chunk

    def replay(self, session: Session) -> Generator[Chunk]:
        """The film so far once more, decoded from its stored latents.

        Pixels may differ by rounding, as the stored latents are float16.
        """
        shown = self._replay(session)
        return shown if self.team is None else self.team.synced_iterator(shown)

    def _replay(self, session: Session) -> Generator[Chunk]:
        self.check_session(session)
        for index, latents in enumerate(session.chunk_latents):
            began = time.monotonic()
            frames = _new_frames(index, session.picture, self._decode(latents.float().to(self.device)))
            yield Chunk(index, frames, latents.float(), time.monotonic() - began, session)

    def check_session(self, session: Session) -> None:
        """Raises ValueError if the session is inconsistent or of another model."""
        check_session(session, self.config)

    def _make_chunk(
        self,
        session: Session,
        tracker: ProgressTracker,
        noise: Tensor | None,
        ways: Ways,
    ) -> Generator[Progress | Frames, None, Chunk]:
        """`_compute_chunk`, retried once with the next smaller plan where the GPU runs out of memory."""
        tracker.begin_chunk()
        try:
            return (yield from self._compute_chunk(session, tracker, noise, ways))
        except torch.OutOfMemoryError:
            if self.team is not None:  # which ends the chunk on all ranks alike
                raise
        # Not above, where the error still holds all that the chunk had on the GPU.
        gc.collect()
        needs = self.memory_estimate()
        # What the last plan took of the CPU's memory is this process's to use again.
        plan = next_smaller_plan(needs, self.plan, psutil.virtual_memory().available + needs.cpu(self.plan))
        if plan is None:
            raise NotEnoughMemory(TOO_LITTLE)
        log.warning("the GPU's memory is full; retrying with %s", plan)
        self.apply_plan(plan)
        tracker.retry_chunk()
        try:
            return (yield from self._compute_chunk(session, tracker, noise, ways))
        except torch.OutOfMemoryError as error:
            raise NotEnoughMemory(TOO_LITTLE) from error

    def memory_estimate(self) -> MemoryEstimate:
        """Estimate of the memory that a film takes."""
        return MemoryEstimate.of(self.config, self.transformer, self.vae)

    def apply_plan(self, plan: MemoryPlan) -> None:
        if plan.blocks == "cpu" and self.plan.blocks == "gpu":
            self.transformer.offload_blocks()
        self.plan = plan
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()  # while it runs: between two results the caller's mode is its own
    def _compute_chunk(
        self,
        session: Session,
        tracker: ProgressTracker,
        noise: Tensor | None,
        ways: Ways,
    ) -> Generator[Progress | Frames, None, Chunk]:
        began = time.monotonic()
        generator = torch.Generator()
        generator.set_state(session.generator_state)
        if noise is None:
            latents = 1 + tracker.chunk_frames // FRAMES_PER_LATENT
            shape = (*session.history.shape[:2], latents, *session.history.shape[3:])
            noise = torch.randn(shape, generator=generator)
        latents = yield from self._sample(session, noise.to(self.device), tracker, ways.velocities)
        video = self._decode(latents)
        yield tracker.done("decode")
        index = len(session.chunk_latents)
        frames = _new_frames(index, session.picture, video)
        yield Frames(index, frames)
        # The picture's own frame is known already: the decoded first frame repeats it.
        added, state = ways.encode(video[:, :, 1:], session.encoder_state)
        latents = latents.cpu()
        after = dataclasses.replace(
            session,
            history=torch.cat([session.history, added], dim=2),
            encoder_state=state,
            chunk_latents=(*session.chunk_latents, latents.half()),
            generator_state=generator.get_state(),
            num_frames=session.num_frames + tracker.chunk_frames,
        )
        tracker.done("encode")
        tracker.made += 1
        return Chunk(index, frames, latents, time.monotonic() - began, after)

    def _sample(
        self, session: Session, noise: Tensor, tracker: ProgressTracker, velocities_of: VelocitiesOf
    ) -> Generator[Progress, None, Tensor]:
        """The latents of the session's next chunk. Apart, so that what it needed is freed before they are decoded."""
        self._encode_texts(*_prompts(session))  # `velocity` finds them in the cache
        yield tracker.done("text")
        velocity, forgetful = velocities_of(session, tracker.chunk_frames)
        yield tracker.done("memory")
        sampler, z = self.config.val_scheduler_cfg, noise
        results = sample_steps(
            velocity,
            noise,
            self.timesteps(session.settings),
            order=find_preset(session.settings.preset).order,
            settled=sampler.settled,
            forgetful=forgetful,
            guidance=sampler.memory_guidance,
        )
        for step, z in enumerate(results, 1):  # noqa: B007
            yield tracker.done("sample", step)
        return z

    def timesteps(self, settings: FilmSettings) -> Tensor:
        """Those of a chunk's steps and the final 0, (steps + 1,)."""
        sampler, preset = self.config.val_scheduler_cfg, find_preset(settings.preset)
        return schedule(sampler, settings.steps, end_at_zero=preset.end_at_zero)

    def velocities(
        self, session: Session, frames: int | None = None, compressed: CompressedHistory | None = None
    ) -> tuple[Velocity, Velocity | None]:
        """The next chunk's `velocity`, and with memory guidance the one that knows nothing but the last latent, or all
        since the history was compressed. A first chunk has no other memory. Arguments as for `velocity`."""
        if not self.config.val_scheduler_cfg.memory_guidance or session.history.shape[2] == 1:
            return self.velocity(session, frames, compressed), None
        compressed = compressed or self.compress(session)
        nothing = dataclasses.replace(compressed, latents=compressed.latents[:, :, :0])
        return self.velocity(session, frames, compressed), self.velocity(session, frames, nothing)

    @torch.inference_mode()
    def velocity(
        self, session: Session, frames: int | None = None, compressed: CompressedHistory | None = None
    ) -> Velocity:
        """The guided velocity of the session's next chunk as a function of noisy latents and timestep, to be called
        step by step: what a preset saves depends on the steps before. frames, compressed: as for `iterate_chunk`.

        Both on the model's device: (1, 16, 21, h, w) and a scalar. Everything that does not depend on them is computed
        here, once: the compressed memory, each text's keys and values, and the memory's tokens at every block for
        each text.
        """
        model, device, settings = self.transformer, self.device, session.settings
        texts = self.texts(session)
        preset = find_preset(settings.preset)
        guided_always = len(texts) == 2 and preset.guidance_interval == 1
        branches = self.team.branches(guided_always) if self.team else None
        layout = (branches and branches.layout) or LOCAL
        texts = texts[branches.own] if branches else texts
        with fastest_attention(device):
            actions = self.encode_actions(session, self.config.check_chunk_frames(frames))
            compressed = compressed or self.compress(session)
            recent = session.history[:, :, compressed.length - 1 :].to(compressed.latents)
            memory = torch.cat([compressed.latents, recent], dim=2)
            contexts = [model.embed_text(text.hidden, text.mask) for text in texts]
            streams = [model.encode_memory(memory, context, self.plan.streams, layout) for context in contexts]
        if preset.narrow_attention and model.narrow_kernel:
            layout = WithKernel(layout, model.narrow_kernel)

        @torch.inference_mode()
        @fastest_attention(device)
        def velocity(stream: MemoryStream, context: TextContext, z: Tensor, timestep: Tensor) -> Tensor:
            return self.sign * model.denoise(z, timestep.reshape(1), stream, actions, context, layout)

        # One text after the other: both at once would need twice the memory for the same arithmetic.
        of_texts = [partial(velocity, *text) for text in zip(streams, contexts, strict=True)]
        if branches and branches.pair:
            return lambda z, timestep: guide(*branches.both(of_texts[0](z, timestep)), settings.guidance)
        return of_all_texts(of_texts, settings)

    @property
    def sign(self) -> int:
        """Times what the transformer returns is the velocity."""
        return 1 if self.config.val_scheduler_cfg.use_reversed_velocity else -1

    def texts(self, session: Session) -> list[TextEmbedding]:
        """The texts that the session's next chunk needs, on the model's device: the prompt, with guidance the negative
        prompt too."""
        return self._encode_texts(*_prompts(session)).to(self.device).each()

    def encode_actions(self, session: Session, frames: int) -> Tensor:
        """The action vectors (1, 1 + frames / 4, dim) of the session's next chunk."""
        pairs = session.settings.actions.pairs(session.num_frames - 1, session.num_frames + frames)
        move, view = torch.tensor(pairs, device=self.device).T.unsqueeze(1)
        return self.transformer.action_encoder(move, view)

    @torch.inference_mode()
    def encode(self, video: Tensor, state: dict[str, Tensor] | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The latents of video that follows an encoder's state, and the next state; both on the CPU."""
        if state is not None:
            state = {name: tensor.to(self.device) for name, tensor in state.items()}
        latents, state = self._coder.encode(video.to(self.device), state)
        return latents.cpu(), {name: tensor.cpu() for name, tensor in state.items()}

    @torch.inference_mode()
    def _decode(self, latents: Tensor) -> Tensor:
        return self._coder.decode(latents)


def of_all_texts(velocities: Sequence[Velocity], settings: FilmSettings) -> Velocity:
    """One chunk's velocity from that of its prompt and, with guidance, that of its negative prompt."""
    if len(velocities) == 1:
        return velocities[0]
    positive, negative = velocities
    return guided(positive, negative, settings.guidance, find_preset(settings.preset).guidance_interval)


def _without_frames(results: Generator[Progress | Frames | Chunk]) -> Generator[Progress | Chunk]:
    with closing(results):
        for result in results:
            if not isinstance(result, Frames):
                yield result


def _prompts(session: Session) -> list[str]:
    """The texts that the next chunk needs: guidance 1 needs no negative prompt."""
    settings = session.settings
    return [settings.prompt] if settings.guidance == 1 else [settings.prompt, settings.negative_prompt]


def _new_frames(index: int, picture: np.ndarray, video: Tensor) -> np.ndarray:
    """A decoded chunk's new frames; the film's first chunk begins with the picture itself."""
    frames = to_uint8(video[:, :, 1:])
    return np.concatenate([picture, frames]) if index == 0 else frames
