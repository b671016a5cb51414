"""The story: a World films a walk chunk by chunk; a Session is all that one film needs to go on (spec section 9).

A World holds only the models. What a film has become is a Session, a value on the CPU that can be saved, sent to
another process and continued, any number of times.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from infworld import packages
from infworld.actions import ActionScript, Segment
from infworld.budget import FASTEST, GB, Needs, NotEnoughMemory, Plan, choose, leaner
from infworld.checkpoint import RELEASED_EXTRAS, check_file, load_strict, read_metadata, read_tensors, save_tensors
from infworld.config import ModelConfig, load_config
from infworld.dit import InfiniteWorldTransformer, MemoryStream, TextContext
from infworld.layers import fastest_attention
from infworld.parallel import Rows, Team
from infworld.presets import EXACT, find_preset
from infworld.sampler import guide, guided, sample, schedule
from infworld.text import TextEmbedding, free_memory, open_text_encoder
from infworld.vae import VideoVAE
from infworld.video import prepare_image, to_uint8

log = logging.getLogger(__name__)

SESSION_FORMAT = "infworld-session-1"
_TOO_LITTLE = (
    "there is too little GPU memory for a chunk: close other programs that use the GPU, take a smaller picture or the "
    "CPU; what was filmed before is kept"
)
STAGES = ("text", "memory", "sample", "decode", "encode")  # of a chunk, in order; "sample" once per step
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Progress:
    """Where a call stands, after a stage of a chunk is done: "text", "memory", "sample" (each step) or "decode".

    `chunk` counts from 1. `remaining` is an estimate in seconds, None before the first step. A chunk's last stage
    (taking its frames into the history) makes no Progress: it is the Chunk itself, which nothing can then lose.
    """

    chunk: int
    chunks: int
    stage: str
    step: int
    steps: int
    frames: int
    total_frames: int
    seconds: float
    remaining: float | None


Callback = Callable[[Progress], None]


@dataclass(frozen=True, eq=False)
class Session:
    """One film's state between chunks: CPU tensors and plain values only.

    history: latents of all known frames, (1, 16, T, h, w), T = 1 + 20 per chunk. encoder_state: what the VAE encoder
    carries on. chunk_latents: the sampled latents of each chunk, (1, 16, 21, h, w) float16, from which the film can
    be shown again. picture: (1, H, W, 3) uint8. generator_state: of the noise generator.
    """

    model: str
    picture: np.ndarray
    history: Tensor
    encoder_state: dict[str, Tensor]
    chunk_latents: tuple[Tensor, ...]
    generator_state: Tensor
    actions: ActionScript
    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance: float
    num_frames: int = 1
    preset: str = EXACT.name

    def with_actions(self, actions) -> Session:
        """The same film with other actions for the frames to come (anything `ActionScript.of` takes)."""
        return dataclasses.replace(self, actions=self.actions.cut(self.num_frames - 1) + ActionScript.of(actions))

    def with_prompt(self, prompt: str, negative_prompt: str | None = None) -> Session:
        """The same film with another prompt for what comes; the negative prompt stays unless given."""
        negative = self.negative_prompt if negative_prompt is None else negative_prompt
        return dataclasses.replace(self, prompt=prompt, negative_prompt=negative)

    def with_seed(self, seed: int) -> Session:
        """The same film with fresh noise from `seed` for what comes. ValueError if it is none."""
        return dataclasses.replace(self, seed=seed, generator_state=_generator_state(seed))

    def save(self, path: str | Path) -> None:
        """Writes one `.safetensors` file. ValueError if it cannot be written."""
        tensors = {"history": self.history, "generator_state": self.generator_state}
        tensors["picture"] = torch.from_numpy(self.picture)
        tensors |= {f"encoder_state.{name}": tensor for name, tensor in self.encoder_state.items()}
        tensors |= {f"chunk_latents.{i}": tensor for i, tensor in enumerate(self.chunk_latents)}
        values = {name: getattr(self, name) for name in _PLAIN_FIELDS}
        values["actions"] = [[s.move, s.view, s.frames] for s in self.actions.segments]
        save_tensors(path, tensors, {"format": SESSION_FORMAT, "session": json.dumps(values)})

    @staticmethod
    def load(path: str | Path) -> Session:
        """Reads what `save` wrote. FileNotFoundError, or ValueError for a file that is no whole session."""
        if not Path(path).expanduser().exists():
            raise FileNotFoundError(f"no session file at {path}")
        metadata = read_metadata(path)
        if metadata.get("format") != SESSION_FORMAT:
            raise ValueError(f"{path} is not a session file of this program (format {SESSION_FORMAT})")
        tensors = read_tensors(path)
        try:
            values = json.loads(metadata["session"])
            values = _OLDER | values if isinstance(values, dict) else {}
            _check_values(values)
            actions = ActionScript(tuple(Segment(*segment) for segment in values.pop("actions")))
            session = Session(
                picture=tensors["picture"].numpy(),
                history=tensors["history"],
                encoder_state=_under("encoder_state.", tensors),
                chunk_latents=tuple(
                    tensors[f"chunk_latents.{i}"] for i in range(len(_under("chunk_latents.", tensors)))
                ),
                generator_state=tensors["generator_state"],
                actions=actions,
                **values,
            )
            torch.Generator().set_state(session.generator_state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"the session file {path} is damaged: {error}") from error
        return session


_PLAIN_FIELDS = {
    **{"model": str, "prompt": str, "negative_prompt": str},
    **{"seed": int, "steps": int, "guidance": (int, float), "num_frames": int, "preset": str},
}
_OLDER = {"preset": EXACT.name}  # what files say that were saved before there was such a field


def _check_values(values: object) -> None:
    """Raises ValueError unless `values` are a session file's plain fields, each of its own type, and its actions."""
    if not isinstance(values, dict) or values.keys() != {*_PLAIN_FIELDS, "actions"}:
        raise ValueError("it lacks fields or has others")
    for name, kind in _PLAIN_FIELDS.items():
        if not isinstance(values[name], kind):
            raise ValueError(f"{name} is {values[name]!r}")
    find_preset(values["preset"])


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
        plan: Plan = FASTEST,
    ):
        self.config = config
        self.transformer = transformer
        self.vae = vae
        self.team = team
        self.plan = FASTEST
        self._carry_out(plan)

        def encode(*texts: str) -> TextEmbedding:  # a film's texts together: what is loaded for them is large
            return text_encoder.encode(list(texts)).to("cpu")

        self._encode_texts = lru_cache(maxsize=16)(encode if team is None else team.by_first(encode))

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
        wishes = {"negative_prompt": negative_prompt, "steps": steps, "guidance": guidance, "preset": preset}
        session = self.start(image, actions, prompt, seed=seed, **wishes)
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
        steps = found.steps_of(defaults) if steps is None else steps
        guidance = defaults.text_cfg_scale if guidance is None else guidance
        schedule(defaults, steps)
        if not isinstance(guidance, (int, float)) or not math.isfinite(guidance):
            raise ValueError(f"guidance must be a finite number, not {guidance!r}")
        generator_state = _generator_state(seed)
        script = ActionScript.of(actions)
        video = prepare_image(image, self.config.buckets)
        rows = None if self.team is None else self.team.rows(video.shape[3] // self.vae.space)
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
        return made if self.team is None else self.team.together(made)

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
        return shown if self.team is None else self.team.together(shown)

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

    def _make_chunk(self, session: Session, tracker: _Tracker, noise: Tensor | None) -> Chunk:
        """`_compute_chunk`; where the GPU's memory runs out in spite of the plan, once more by a leaner one."""
        counts = dict(tracker.counts)
        try:
            return self._compute_chunk(session, tracker, noise)
        except torch.OutOfMemoryError as error:
            if self.team is not None:  # the others would have to begin again too
                raise NotEnoughMemory(_TOO_LITTLE) from error
        # Not above, where the error still holds all that the chunk had on the GPU.
        gc.collect()
        needs = self.needs()
        # What the last plan took of the CPU's memory is this process's to use again.
        plan = leaner(needs, self.plan, psutil.virtual_memory().available + needs.cpu(self.plan))
        if plan is None:
            raise NotEnoughMemory(_TOO_LITTLE)
        log.warning("the GPU's memory is full; once more with %s", plan)
        self._carry_out(plan)
        tracker.counts = counts
        try:
            return self._compute_chunk(session, tracker, noise)
        except torch.OutOfMemoryError as error:
            raise NotEnoughMemory(_TOO_LITTLE) from error

    def needs(self) -> Needs:
        """What a film takes by the sums of `budget`."""
        return Needs.of(self.config, self.transformer, self.vae)

    def _carry_out(self, plan: Plan) -> None:
        if plan.blocks == "cpu" and self.plan.blocks == "gpu":
            self.transformer.offload_blocks()
        self.plan = plan
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _compute_chunk(self, session: Session, tracker: _Tracker, noise: Tensor | None) -> Chunk:
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

    def _sample(self, session: Session, noise: Tensor, tracker: _Tracker) -> Tensor:
        """The latents of the session's next chunk. Apart, so that what served them is freed before they are decoded."""
        velocity = self.velocity(session, tracker.done)
        preset = find_preset(session.preset)
        timesteps = schedule(self.config.val_scheduler_cfg, session.steps, even=preset.even)
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
        split = self.team and self.team.split(guided=len(prompts) == 2 and preset.guided == 1)
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
        return guided(*of_texts, session.guidance, preset.guided)

    def _tracker(self, callback: Callback | None, chunks: int, session: Session) -> _Tracker:
        heard = callback if self.team is None else self.team.heard(callback)
        return _Tracker(heard, chunks, session, self.config.chunk_frames)

    def _rows(self, latents: Tensor) -> Rows | None:
        """Over which devices the rows of a picture of these latents are split; None if they are not."""
        return None if self.team is None else self.team.rows(latents.shape[3])

    @torch.inference_mode()
    def _encode(
        self, video: Tensor, state: dict[str, Tensor] | None, rows: Rows | None
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
    def _decode(self, latents: Tensor, rows: Rows | None) -> Tensor:
        """Whole latents on the device -> this device's rows of the video."""
        return self.vae.decode(latents if rows is None else rows.own(latents, 3), rows=rows)


def check_session(session: Session, config: ModelConfig) -> None:
    """Raises ValueError if the session is not of the model of this config or does not hang together."""
    if session.model != config.name:
        raise ValueError(f"this session was made with the model {session.model!r}, but {config.name!r} is loaded")
    made, channels, per_chunk = len(session.chunk_latents), config.vae_cfg.z_dim, config.chunk_latents
    height, width = session.history.shape[-2:]
    shapes = {
        "picture": (session.picture, (1, height * config.vae_cfg.space, width * config.vae_cfg.space, 3)),
        "history": (session.history, (1, channels, 1 + made * (per_chunk - 1), height, width)),
        **{f"chunk {i}": (z, (1, channels, per_chunk, height, width)) for i, z in enumerate(session.chunk_latents)},
    }
    for name, (found, expected) in shapes.items():
        if tuple(found.shape) != expected:
            raise ValueError(f"the session is damaged: its {name} is {tuple(found.shape)} and not {expected}")
    if session.num_frames != 1 + made * config.chunk_frames:
        raise ValueError(f"the session is damaged: {made} chunks make no {session.num_frames} frames")


def load(
    name: str | Path | ModelConfig = "tiny",
    device: str = "auto",
    *,
    text_placement: str = "auto",
    compile: bool = False,
    team: Team | None = None,
) -> World:
    """Loads a model: "tiny", "infinite-world", the path of a config YAML, or the config itself.

    device: "auto" (the GPU if there is one), "cuda", "cuda:1", "cpu". text_placement: where a large text encoder works
    and whether it stays: "auto", "gpu" or "cpu", see `UMT5OnDemand`. compile: whether torch.compile makes the
    transformer's blocks faster, which the first chunk waits for (docs/performance.md); blocks compiled ahead of time
    (`packages`) are used unasked where they fit, and make that superfluous. team: of `parallel.joined`, to film
    together with other processes; its device is used. What stays on a GPU is planned by its free memory (see
    `budget`), except with text_placement "gpu", which wants everything there. Raises FileNotFoundError or ValueError
    for missing, truncated or foreign weights, naming the file.
    """
    began = time.monotonic()
    config = name if isinstance(name, ModelConfig) else load_config(name)
    device = pick_device(device) if team is None else team.device
    dtype = pick_dtype(device, getattr(torch, config.amp_dtype))
    path, vae_path = check_file(config.path(config.checkpoint_path)), check_file(config.path(config.vae_cfg.vae_pth))
    text_encoder = None  # except on the device that encodes for all
    if team is None or team.first:  # before the transformer, as it may be the one that is cut
        text_encoder = open_text_encoder(config, device, dtype, text_placement)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(pick_threads(torch.get_num_threads()))
    plan = make_plan(config, device, dtype, team) if device.type == "cuda" and text_placement != "gpu" else FASTEST
    transformer = load_strict(
        lambda: InfiniteWorldTransformer(config.model_cfg),
        read_tensors(path),
        where=path,
        device=device,
        dtype=dtype,
        drop=RELEASED_EXTRAS,
    )
    if plan.blocks == "gpu":
        packaged = team is None and packages.apply(transformer, path.parent)
        if compile and not packaged:
            transformer.compile_blocks()
    vae = load_strict(
        lambda: build_vae(config),
        read_tensors(vae_path),
        where=vae_path,
        device=device,
        dtype=pick_vae_dtype(dtype),
    )
    log.info("%s from %s on %s (%s) in %.1f s", config.name, path, device, dtype, time.monotonic() - began)
    return World(config, transformer, vae, text_encoder, team, plan)


def make_plan(config: ModelConfig, device: torch.device, dtype: torch.dtype, team: Team | None = None) -> Plan:
    """What of a model, which is not loaded yet, stays on a GPU: by what this process may still have of its memory."""
    with torch.device("meta"):
        transformer, vae = InfiniteWorldTransformer(config.model_cfg).to(dtype), build_vae(config)
    needs = Needs.of(config, transformer, vae.to(pick_vae_dtype(dtype)))
    free = free_memory(device)
    plan = choose(needs, free, psutil.virtual_memory().available, team is not None)
    log.info("%.1f GB of GPU memory: %s; %.1f GB at most", free / GB, plan, needs.gpu(plan) / GB)
    return plan


def build_vae(config: ModelConfig) -> VideoVAE:
    """The VAE of a config, untrained."""
    sizes = {k: v for k, v in dataclasses.asdict(config.vae_cfg).items() if k != "vae_pth"}
    return VideoVAE(**sizes)


def pick_device(name: str) -> torch.device:
    """ "auto" or a torch device name -> device, a GPU with its number. ValueError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}: use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported: use auto, cpu or cuda")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} GPUs; use auto or cpu")
    if device.type == "cuda" and device.index is None:  # without a number, torch knows no limit of its memory
        return torch.device(f"cuda:{torch.cuda.current_device()}")
    return device


def pick_dtype(device: torch.device, wanted: torch.dtype) -> torch.dtype:
    """`wanted` on a GPU; on a CPU bfloat16 only where it has instructions for it, else float32."""
    if device.type == "cuda":
        return wanted
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    fast = any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    return torch.bfloat16 if fast and wanted != torch.float32 else torch.float32


def pick_threads(threads: int, quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """How many of `threads` threads this process gets the time for: a container may have less than the host's cores.

    More than that wait for each other. `quota_file` is the kernel's (cgroup v2): microseconds of work in each period.
    """
    try:
        quota, period = map(int, quota_file.read_text().split())  # "max" in place of a number: no limit
    except (OSError, ValueError):
        return threads
    return max(1, min(threads, round(quota / period)))


def pick_vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """The VAE's dtype beside a transformer in `dtype`: bfloat16 with it, else float32.

    The reference's is float32 (spec section 7); bfloat16 takes half the memory and about half the time, and
    docs/performance.md says what it costs the picture.
    """
    return dtype if dtype == torch.bfloat16 else torch.float32


@dataclass
class _Tracker:
    """Counts a call's finished stages and estimates the time left from how long each kind has taken so far."""

    callback: Callback | None
    chunks: int
    session: Session
    chunk_frames: int
    chunk: int = 1
    step: int = 0
    began: float = field(default_factory=time.monotonic)
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    last: float = field(default_factory=time.monotonic)

    def done(self, stage: str, step: int = 0) -> None:
        """One stage of the current chunk, or one sampler step, has been finished."""
        now = time.monotonic()
        self.spent[stage] += now - self.last
        self.counts[stage] += 1
        self.last = now
        self.step = {"text": 0, "memory": 0, "sample": step}.get(stage, self.step)
        if stage == STAGES[-1]:
            self.chunk += 1
        elif self.callback is not None:
            self.callback(
                Progress(
                    chunk=self.chunk,
                    chunks=self.chunks,
                    stage=stage,
                    step=self.step,
                    steps=self.session.steps,
                    frames=self.session.num_frames + (self.chunk - 1) * self.chunk_frames,
                    total_frames=self.session.num_frames + self.chunks * self.chunk_frames,
                    seconds=now - self.began,
                    remaining=self._remaining(),
                )
            )

    def _remaining(self) -> float | None:
        if not self.counts["sample"]:
            return None
        per_step = self.spent["sample"] / self.counts["sample"]
        left = 0.0
        for stage in STAGES:
            total = self.chunks * (self.session.steps if stage == "sample" else 1)
            mean = self.spent[stage] / self.counts[stage] if self.counts[stage] else per_step
            left += (total - self.counts[stage]) * mean
        return left


def _generator_state(seed: int) -> Tensor:
    """State of a CPU generator: the noise is the same whatever the device. ValueError for a seed that is none."""
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"the seed must be a whole number from 0 to {MAX_SEED}, not {seed!r}")
    return torch.Generator().manual_seed(seed).get_state()


def _new_frames(index: int, picture: np.ndarray, video: Tensor) -> np.ndarray:
    """A decoded chunk's new frames; the film's first chunk begins with the picture itself."""
    frames = to_uint8(video[:, :, 1:])
    return np.concatenate([picture, frames]) if index == 0 else frames


def _whole(video: Tensor, rows: Rows | None) -> Tensor:
    return video if rows is None else rows.whole(video, 3)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
