"""The story: a World films a walk chunk by chunk; a Session is all that one film needs to go on (spec section 9).

A World holds only the models. What a film has become is a Session, a value on the CPU that can be saved, sent to
another process and continued, any number of times.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import psutil
import torch
from torch import Tensor

from infworld.actions import ActionScript
from infworld.config import ModelConfig
from infworld.dit import InfiniteWorldTransformer, MemoryStream, TextContext
from infworld.layers import fastest_attention
from infworld.memory_plan import FASTEST, MemoryEstimate, MemoryPlan, NotEnoughMemory, next_smaller_plan
from infworld.parallel import SpatialShard, Team
from infworld.presets import find_preset
from infworld.progress import Callback, ProgressTracker
from infworld.sampler import guide, guided, sample, schedule
from infworld.session import Session, check_session, generator_state_of
from infworld.text import TextEmbedding
from infworld.vae import PIXELS_PER_LATENT, VideoVAE
from infworld.video import prepare_image, to_uint8

log = logging.getLogger(__name__)

_TOO_LITTLE = (
    "there is too little GPU memory for a chunk: close other programs that use the GPU, take a smaller picture or the "
    "CPU; what was filmed before is kept"
)


@dataclass(frozen=True, eq=False)
class Chunk:
    """One finished chunk: its new frames (T H W 3 uint8; the film's first begins with the picture), the latents
    (1, 16, 21, h, w) they were decoded from, and the session that follows."""

    index: int
    frames: np.ndarray
    latents: Tensor
    seconds: float
    session: Session


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
    ) -> Iterator[Chunk]:
        """Films a walk from a picture, yielding each chunk as soon as it is there.

        image: PIL picture, array (H W 3 uint8) or path. actions: list of {"move", "view"} per frame, ActionScript,
        script text or JSON path; past its end nothing is done. num_frames: 1 + whole chunks of 80. callback hears a
        Progress after every stage and step; what it raises ends the film and is passed on. preset: one of
        `presets.PRESETS`: "exact", or faster ones. Left out, the steps are the preset's; preset, negative prompt and
        guidance the model's own. Bad input is a ValueError before anything is computed.
        """
        chunks = self.config.chunks_for(num_frames)
        settings = {"negative_prompt": negative_prompt, "steps": steps, "guidance": guidance, "preset": preset}
        session = self.start(image, actions, prompt, seed=seed, **settings)
        return self.extend(session, chunks, callback)

    def start(
        self,
        image,
        actions=None,
        prompt: str = "",
        *,
        negative_prompt: str | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        preset: str | None = None,
    ) -> Session:
        """A film of one frame, the picture. Arguments as for `rollout`."""
        defaults = self.config.val_scheduler_cfg
        found = find_preset(defaults.preset if preset is None else preset)
        steps = found.sampler_steps(defaults) if steps is None else steps
        guidance = defaults.text_cfg_scale if guidance is None else guidance
        schedule(defaults, steps)
        if not isinstance(guidance, (int, float)) or not math.isfinite(guidance):
            raise ValueError(f"guidance must be a finite number, not {guidance!r}")
        generator_state = generator_state_of(seed)
        script = ActionScript.of(actions)
        video = prepare_image(image, self.config.buckets)
        rows = None if self.team is None else self.team.rows(video.shape[3] // PIXELS_PER_LATENT)
        history, state = self._encode(video if rows is None else rows.own(video, 3), None, rows)
        return Session(
            model=self.config.name,
            picture=to_uint8(video),
            history=history,
            encoder_state=state,
            chunk_latents=(),
            generator_state=generator_state,
            actions=script,
            prompt=prompt,
            negative_prompt=self.config.negative_prompt if negative_prompt is None else negative_prompt,
            seed=seed,
            steps=steps,
            guidance=float(guidance),
            preset=found.name,
        )

    def extend(self, session: Session, chunks: int, callback: Callback | None = None) -> Iterator[Chunk]:
        """Adds chunks to a film; each Chunk's session can be saved, or extended again."""
        made = self._extend(session, chunks, callback)
        return made if self.team is None else self.team.synced_iterator(made)

    def _extend(self, session: Session, chunks: int, callback: Callback | None) -> Iterator[Chunk]:
        self.check_session(session)
        tracker = self._tracker(callback, chunks, session)
        for _ in range(chunks):
            chunk = self._make_chunk(session, tracker, None)
            session = chunk.session
            yield chunk

    def next_chunk(self, session: Session, callback: Callback | None = None, *, noise: Tensor | None = None) -> Chunk:
        """The next chunk of 80 frames. `session` itself stays as it was.

        noise: (1, 16, 21, h, w) in place of what the session's generator would draw.
        """
        self.check_session(session)
        return self._make_chunk(session, self._tracker(callback, 1, session), noise)

    def replay(self, session: Session) -> Iterator[Chunk]:
        """The film so far once more, from its stored latents: a film after a restart needs no computing anew.

        Pixels may differ by rounding, as the stored latents are float16.
        """
        shown = self._replay(session)
        return shown if self.team is None else self.team.synced_iterator(shown)

    def _replay(self, session: Session) -> Iterator[Chunk]:
        self.check_session(session)
        rows = self._rows(session.history)
        for index, latents in enumerate(session.chunk_latents):
            began = time.monotonic()
            video = self._decode(latents.float().to(self.device), rows)
            frames = _new_frames(index, session.picture, _whole(video, rows))
            yield Chunk(index, frames, latents.float(), time.monotonic() - began, session)

    def check_session(self, session: Session) -> None:
        """Raises ValueError if the session is another model's or does not hang together."""
        check_session(session, self.config)

    def _make_chunk(self, session: Session, tracker: ProgressTracker, noise: Tensor | None) -> Chunk:
        """`_compute_chunk`, retried once with the next smaller plan where the GPU runs out of memory."""
        counts = dict(tracker.counts)
        try:
            return self._compute_chunk(session, tracker, noise)
        except torch.OutOfMemoryError as error:
            if self.team is not None:  # the others would have to begin again too
                raise NotEnoughMemory(_TOO_LITTLE) from error
        # Not above, where the error still holds all that the chunk had on the GPU.
        gc.collect()
        needs = self.memory_estimate()
        # What the last plan took of the CPU's memory is this process's to use again.
        plan = next_smaller_plan(needs, self.plan, psutil.virtual_memory().available + needs.cpu(self.plan))
        if plan is None:
            raise NotEnoughMemory(_TOO_LITTLE)
        log.warning("the GPU's memory is full; once more with %s", plan)
        self.apply_plan(plan)
        tracker.counts = counts
        try:
            return self._compute_chunk(session, tracker, noise)
        except torch.OutOfMemoryError as error:
            raise NotEnoughMemory(_TOO_LITTLE) from error

    def memory_estimate(self) -> MemoryEstimate:
        """What a film takes by the sums of `budget`."""
        return MemoryEstimate.of(self.config, self.transformer, self.vae)

    def apply_plan(self, plan: MemoryPlan) -> None:
        if plan.blocks == "cpu" and self.plan.blocks == "gpu":
            self.transformer.offload_blocks()
        self.plan = plan
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _compute_chunk(self, session: Session, tracker: ProgressTracker, noise: Tensor | None) -> Chunk:
        began = time.monotonic()
        generator = torch.Generator()
        generator.set_state(session.generator_state)
        if noise is None:
            shape = (*session.history.shape[:2], self.config.chunk_latents, *session.history.shape[3:])
            noise = torch.randn(shape, generator=generator)
        latents = self._sample(session, noise.to(self.device), tracker)
        rows = self._rows(latents)
        video = self._decode(latents, rows)
        tracker.done("decode")
        # The picture's own frame is known already: the decoded first frame repeats it.
        added, state = self._encode(video[:, :, 1:], session.encoder_state, rows)
        tracker.done("encode")
        latents = latents.cpu()
        after = dataclasses.replace(
            session,
            history=torch.cat([session.history, added], dim=2),
            encoder_state=state,
            chunk_latents=(*session.chunk_latents, latents.half()),
            generator_state=generator.get_state(),
            num_frames=session.num_frames + self.config.chunk_frames,
        )
        index = len(session.chunk_latents)
        frames = _new_frames(index, session.picture, _whole(video, rows))
        return Chunk(index, frames, latents, time.monotonic() - began, after)

    def _sample(self, session: Session, noise: Tensor, tracker: ProgressTracker) -> Tensor:
        """The latents of the session's next chunk. Apart, so that what served them is freed before they are decoded."""
        velocity = self.velocity(session, tracker.done)
        preset = find_preset(session.preset)
        timesteps = schedule(self.config.val_scheduler_cfg, session.steps, end_at_zero=preset.end_at_zero)
        return sample(velocity, noise, timesteps, partial(tracker.done, "sample"), order=preset.order)

    @torch.inference_mode()
    def velocity(
        self, session: Session, on_stage: Callable[[str], None] = lambda stage: None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The guided velocity of the session's next chunk as a function of noisy latents and timestep, to be asked for
        step by step: what a preset saves depends on the steps before.

        Both on the model's device: (1, 16, 21, h, w) and a scalar. Everything that does not depend on them is computed
        here, once: the compressed memory, each text's keys and values, and the memory's way through the transformer
        for each text. `on_stage` hears "text" and "memory".
        """
        model, device, preset = self.transformer, self.device, find_preset(session.preset)
        prompts = [session.prompt] if session.guidance == 1 else [session.prompt, session.negative_prompt]
        texts = self._encode_texts(*prompts).to(device).each()
        split = self.team and self.team.split(guided=len(prompts) == 2 and preset.guidance_interval == 1)
        sequence = split and split.sequence
        texts = texts[split.own] if split else texts
        on_stage("text")
        pairs = session.actions.pairs(session.num_frames - 1, session.num_frames + self.config.chunk_frames)
        move, view = torch.tensor(pairs, device=device).T.unsqueeze(1)
        with fastest_attention(device):
            actions = model.action_encoder(move, view)
            memory = model.latent_encoder(session.history.to(device, model.dtype), self.team)
            contexts = [model.embed_text(text.hidden, text.mask) for text in texts]
            streams = [model.encode_memory(memory, context, self.plan.streams, sequence) for context in contexts]
        on_stage("memory")
        sign = 1 if self.config.val_scheduler_cfg.use_reversed_velocity else -1

        @torch.inference_mode()
        @fastest_attention(device)
        def velocity(stream: MemoryStream, context: TextContext, z: Tensor, timestep: Tensor) -> Tensor:
            return sign * model.denoise(z, timestep.reshape(1), stream, actions, context, sequence)

        # One text after the other: both at once would need twice the memory for the same arithmetic.
        of_texts = [partial(velocity, *text) for text in zip(streams, contexts, strict=True)]
        if split and split.pair:
            return lambda z, timestep: guide(*split.both(of_texts[0](z, timestep)), session.guidance)
        if len(of_texts) == 1:
            return of_texts[0]
        return guided(*of_texts, session.guidance, preset.guidance_interval)

    def _tracker(self, callback: Callback | None, chunks: int, session: Session) -> ProgressTracker:
        heard = callback if self.team is None else self.team.synced_callback(callback)
        return ProgressTracker(heard, chunks, session, self.config.chunk_frames)

    def _rows(self, latents: Tensor) -> SpatialShard | None:
        """Over which devices the rows of a picture of these latents are split; None if they are not."""
        return None if self.team is None else self.team.rows(latents.shape[3])

    @torch.inference_mode()
    def _encode(
        self, video: Tensor, state: dict[str, Tensor] | None, rows: SpatialShard | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Appends frames, this device's rows of them, to the encoder's whole state; all results whole on the CPU."""
        if state is not None:
            own = state if rows is None else {name: rows.own(tensor, 2) for name, tensor in state.items()}
            state = {name: tensor.to(self.device) for name, tensor in own.items()}
        latents, state = self.vae.encode(video.to(self.device), state, rows=rows)
        if rows is not None:
            latents, state = rows.whole(latents, 3), {name: rows.whole(tensor, 2) for name, tensor in state.items()}
        return latents.cpu(), {name: tensor.cpu() for name, tensor in state.items()}

    @torch.inference_mode()
    def _decode(self, latents: Tensor, rows: SpatialShard | None) -> Tensor:
        """Whole latents on the device -> this device's rows of the video."""
        return self.vae.decode(latents if rows is None else rows.own(latents, 3), rows=rows)


def _new_frames(index: int, picture: np.ndarray, video: Tensor) -> np.ndarray:
    """A decoded chunk's new frames; the film's first chunk begins with the picture itself."""
    frames = to_uint8(video[:, :, 1:])
    return np.concatenate([picture, frames]) if index == 0 else frames


def _whole(video: Tensor, rows: SpatialShard | None) -> Tensor:
    return video if rows is None else rows.whole(video, 3)
