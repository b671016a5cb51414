"""The one function of the page that needs the GPU. One task in; progress and results out, all of it CPU values.

On a ZeroGPU Space it runs in a forked process that may be thrown away after the call, so a task carries all that is
needed and every result all that was made. Elsewhere `spaces.GPU` leaves the function as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import psutil
import spaces  # patches torch, so before anything touches CUDA
import torch

from infworld.devices import device_name
from infworld.presets import find_preset
from infworld.progress import Progress
from infworld.session import Session
from infworld.settings import FilmSettings
from infworld.world import Chunk, World

MIN_SECONDS, MAX_SECONDS = 20, 1200  # of one GPU call
# Seconds per pass through the released model (1.4 B parameters, 32,928 tokens; a sampler step takes one for each text)
# on half a ZeroGPU card, estimated from the time of an H100, and what decoding and encoding a chunk take there.
STEP_SECONDS, FRAMES_SECONDS = 3.0, 20.0
RELEASED_TOKENS, RELEASED_WIDTH = 32_928, 1536 * 30


@dataclass(frozen=True)
class Scene:
    """What a new film begins with: the settings, and the picture (uint8, H W 3)."""

    settings: FilmSettings
    picture: np.ndarray


@dataclass(frozen=True)
class Replay:
    """The film of a session once more, without computing it anew."""

    session: Session


@dataclass(frozen=True)
class Report:
    """A step that is done; the device it was done on, and the bytes of memory that it takes."""

    progress: Progress
    device: str
    memory: int


Task = Scene | Session | Replay
Result = Session | Report | Chunk
Compute = Callable[[Task], Iterator[Result]]


def on_gpu(world: World) -> Compute:
    """The page's way to the model: a function of one task that yields its results as they come.

    Scene: the session of the picture, then as for a Session. Session: Reports, then the next Chunk. Replay: Chunks.
    Closing the iterator ends the work after the step it is in.
    """

    def seconds(task: Task) -> int:
        return gpu_seconds(task, world)

    @spaces.GPU(duration=seconds)
    def compute(task: Task) -> Iterator[Result]:
        if isinstance(task, Replay):
            yield from world.replay(task.session)
            return
        if isinstance(task, Scene):
            task = world.start(task.picture, task.settings)
            yield task
        yield from step_by_step(world, task)

    return compute


def step_by_step(world: World, session: Session) -> Iterator[Report | Chunk]:
    """Yields a Report for each step of the session's next chunk, then the Chunk."""
    with closing(world.iterate_chunk(session)) as results:
        for result in results:
            if isinstance(result, Progress):
                result = Report(result, device_name(world.device), memory_used(world.device))
            yield result


def memory_used(device: torch.device) -> int:
    """Bytes: the most that torch has held on a GPU, or what this process holds now where it runs on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def gpu_seconds(task: Task, world: World) -> int:
    """Seconds of GPU time to ask a ZeroGPU Space for: from the steps, the picture's size and the model's size.

    Only matters on a GPU; a little generous, as a call that takes longer is cut off.
    """
    config = world.config
    session = task.session if isinstance(task, Replay) else task
    height, width = session.picture.shape[-3:-1]
    size = (height // 16) * (width // 16) * config.chunk_latents / RELEASED_TOKENS
    model = config.model_cfg.dim * config.model_cfg.num_layers / RELEASED_WIDTH
    frames = FRAMES_SECONDS * size
    if isinstance(task, Replay):
        total = frames / 2 * len(session.chunk_latents)
    else:
        settings = session.settings
        passes = find_preset(settings.preset).passes(settings.steps, settings.guidance)
        total = frames + STEP_SECONDS * passes * model * size**1.3
    return min(MAX_SECONDS, max(MIN_SECONDS, math.ceil(1.3 * total)))
