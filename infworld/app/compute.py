"""The border to the models: one task in; progress and results out, all of it CPU values. Only the runner crosses it.

On a ZeroGPU Space a task is done in a forked process that may be thrown away after the call, so it carries all that is
needed and its results all that was made. On several GPUs of a host rank 0 broadcasts its tasks, and the others do the
same work (`follow`).
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import spaces  # patches torch, so before anything touches CUDA
import torch

from infworld.actions import ActionScript
from infworld.app.pace import Pace
from infworld.app.steering import Helm, Steering, SteeringFile
from infworld.config import ModelConfig
from infworld.devices import device_name
from infworld.live import LiveWalk
from infworld.memory_plan import NotEnoughMemory
from infworld.parallel import Abandoned, Team
from infworld.presets import find_preset
from infworld.progress import Progress
from infworld.session import Session
from infworld.settings import FilmSettings
from infworld.world import Chunk, Frames, World

# A ZeroGPU Space takes what is on the GPU before the page is launched, and nothing later.
ON_ZERO_GPU = os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")
MIN_SECONDS, MAX_SECONDS = 20, 1200  # of one GPU call
WALK_SECONDS = 60  # of one GPU call that a walk is played in, after which the next follows
POLL = 0.02  # seconds between two looks at the steering
# Seconds per pass through the released model (1.4 B parameters, 32,928 tokens; a sampler step takes one for each text)
# on half a ZeroGPU card, estimated from the time of an H100, and what decoding and encoding a chunk take there.
STEP_SECONDS, FRAMES_SECONDS = 3.0, 20.0
RELEASED_TOKENS, RELEASED_WIDTH = 32_928, 1536 * 30


@dataclass(frozen=True, eq=False)
class Opening:
    """Begin a film with this picture (uint8, H W 3), and make its first chunk."""

    picture: np.ndarray
    settings: FilmSettings


@dataclass(frozen=True, eq=False)
class Replay:
    """Decode the film of a session once more, without computing it anew."""

    session: Session


@dataclass(frozen=True, eq=False)
class Walk:
    """Make one chunk after the other as it is steered through this file. made: frames of the walk so far; seconds: for
    at most so long."""

    begin: Opening | Session
    steering: Path
    made: int = 0
    seconds: float = math.inf


@dataclass(frozen=True)
class Live:
    """A walk goes on: the steering that its present chunk is made with, or the latest between two. actions: of a chunk
    that begins, or whose Frames come next; then these and those before them have to last for so many seconds."""

    steering: Steering
    actions: ActionScript | None = None
    lasts: float = 0.0


@dataclass(frozen=True)
class Report:
    """A step that is done; the device it was done on, and the bytes of memory that it takes."""

    progress: Progress
    device: str
    memory: int


Task = Opening | Session | Replay | Walk
Result = Session | Report | Live | Frames | Chunk
Compute = Callable[[Task], Generator[Result]]


def perform(world: World, task: Task, frames: int | None = None) -> Generator[Result]:
    """Opening: the session of the picture, then as for it. Session: Reports, then the next Chunk. Replay: Chunks.
    Walk: as `walk`. frames: new ones of the chunk, None for the model's own.

    Closing the iterator ends the work after the step it is in.
    """
    if isinstance(task, Replay):
        yield from world.replay(task.session)
        return
    if isinstance(task, Walk):
        session = task.begin
        if isinstance(session, Opening):
            session = world.start(session.picture, session.settings)
            yield session
        yield from walk(task, LiveWalk(world, session), world.config)
        return
    if isinstance(task, Opening):
        task = world.start(task.picture, task.settings)
        yield task
    with closing(world.iterate_chunk(task, frames=frames) if frames else world.iterate_chunk(task)) as results:
        for result in results:
            if isinstance(result, Progress):
                result = Report(result, device_name(world.device), memory_used(world.device))
            yield result


class Walker(Protocol):
    """What makes a chunk of given actions, and has the session after it: a `LiveWalk`."""

    session: Session

    def iterate_chunk(self, actions: ActionScript, frames: int) -> Generator[Any]: ...


def walk(task: Walk, walker: Walker, config: ModelConfig) -> Generator[Live | Frames | Chunk]:
    """Chunk after chunk: a Live with its actions, another one after each step, one that says how long its frames have
    to last, its Frames as soon as they are there, and the Chunk; between chunks a Live every few hundredths of a
    second. Ends where the film is full.
    """
    file, helm, ends = SteeringFile(task.steering), Helm(), time.monotonic() + task.seconds
    pace = Pace(config.validation_data.live_lengths, config.validation_data.fps)
    made = task.made
    while walker.session.num_frames + pace.frames <= config.max_frames and time.monotonic() < ends:
        steering, began = file.read(), time.monotonic()
        since = began - steering.at if steering.at else 0.0  # nothing was shown before the first word of the browser
        if steering.paused or not pace.is_due(made, steering.shown, since):
            yield Live(steering)
            time.sleep(POLL)
            continue
        actions, until_shown = helm.actions(steering, pace.frames), 0.0
        yield Live(steering, actions)
        with closing(walker.iterate_chunk(actions, pace.frames)) as results:
            for result in results:
                if isinstance(result, Frames):
                    made += len(result.frames)
                    until_shown = time.monotonic() - began
                    yield Live(steering, actions, pace.until_next(until_shown))
                if not isinstance(result, Progress):
                    yield result
                elif not until_shown:  # what has been shown is kept: no stopping from there to the Chunk
                    yield Live(steering)
        pace.took(time.monotonic() - began, until_shown, steering.stalls)


def on_gpu(world: World) -> Compute:
    """`perform`, on ZeroGPU in a process that has the GPU for as long as the task should take."""

    def seconds(task: Task) -> int:
        return gpu_seconds(task, world)

    @spaces.GPU(duration=seconds)
    def compute(task: Task) -> Generator[Result]:
        yield from perform(world, task)

    def limited(task: Task) -> Generator[Result]:
        walks = ON_ZERO_GPU and isinstance(task, Walk)
        return compute(dataclasses.replace(task, seconds=WALK_SECONDS) if walks else task)

    return limited


def memory_used(device: torch.device) -> int:
    """Bytes: the most that torch has held on a GPU, or what this process holds now where it runs on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def gpu_seconds(task: Task, world: World) -> int:
    """Seconds of GPU time to ask a ZeroGPU Space for: from the steps, the picture's size and the model's size.

    Only matters on a GPU; a little generous, as a call that takes longer is cut off.
    """
    if isinstance(task, Walk):
        return math.ceil(1.2 * WALK_SECONDS)
    config = world.config
    shown = task.session if isinstance(task, Replay) else task
    height, width = shown.picture.shape[-3:-1]
    size = (height // 16) * (width // 16) * config.chunk_latents / RELEASED_TOKENS
    model = config.model_cfg.dim * config.model_cfg.num_layers / RELEASED_WIDTH
    frames = FRAMES_SECONDS * size
    if isinstance(task, Replay):
        total = frames / 2 * len(shown.chunk_latents)
    else:
        passes = find_preset(shown.settings.preset).passes(
            config.val_scheduler_cfg, shown.settings.steps, shown.settings.guidance
        )
        total = frames + STEP_SECONDS * passes * model * size**1.3
    return min(MAX_SECONDS, max(MIN_SECONDS, math.ceil(1.3 * total)))


# ------------------------------------------------------------------------------------------------------- several GPUs


@dataclass(frozen=True)
class Order:
    """A task for the model of this name; where `task` is None, the last session with these changes. frames: of its next
    chunk; None for the model's own.

    A session that goes on from the last one shares its history and what the encoder carries on with it, which are
    hundreds of megabytes that the other ranks have already.
    """

    model: str
    task: Task | None
    changes: dict[str, Any]
    frames: int | None = None


def leading(world: World) -> Compute:
    """`perform` for rank 0 of the world's team, whose other ranks are in `follow`."""
    team, name = world.team, world.config.name
    last: Session | None = None  # the one that the other ranks have too

    def order(task: Task, frames: int | None = None) -> None:
        nonlocal last
        known = isinstance(task, Session) and last is not None
        made = Order(name, None, _changes(last, task), frames) if known else Order(name, task, {}, frames)
        last = None  # until the task has been done, on all ranks alike
        team.broadcast_from_rank0(lambda: made)

    def led(task: Task, frames: int | None = None) -> Generator[Result]:
        nonlocal last
        if isinstance(task, Walk):
            session = task.begin
            if isinstance(session, Opening):
                order(session)
                session = last = world.start(session.picture, session.settings)
                yield session
            yield from walk(task, _LedWalk(session, led), world.config)
            return
        if isinstance(task, Opening):
            order(task)
            task = last = world.start(task.picture, task.settings)
            yield task
        order(task, frames)
        result = None
        with closing(perform(world, task, frames)) as results:
            for result in results:
                yield result
        if isinstance(task, Session):  # not before the end, without which the other ranks have no session either
            last = result.session

    def compute(task: Task) -> Generator[Result]:
        """An error that the other ranks do not have too leaves them waiting for ever: then all processes end."""
        try:
            yield from led(task)
        except (ValueError, NotEnoughMemory, GeneratorExit):
            raise
        except BaseException as error:
            team.fail(f"{type(error).__name__}: {error}")

    return compute


def follow(team: Team, world_of: Callable[[str], World]) -> None:
    """What the other ranks do: the work that rank 0 orders, until it leaves. world_of: a model's world, by name."""
    last: Session | None = None
    while True:
        try:
            order: Any = team.broadcast_from_rank0(lambda: None)
        except Abandoned:
            return
        # What ends rank 0's work ends it here too: bad input is bad, and too little memory too little, on all ranks.
        with suppress(Abandoned, ValueError, NotEnoughMemory):
            task = order.task or dataclasses.replace(last, **order.changes)  # type: ignore[type-var]
            last = _do(world_of(order.model), task, order.frames) or last


def _do(world: World, task: Task, frames: int | None) -> Session | None:
    """Does a task as `leading` does; the session that follows from it."""
    if isinstance(task, Opening):
        return world.start(task.picture, task.settings)
    final = None
    for result in perform(world, task, frames):
        final = result
    return final.session if isinstance(task, Session) else None


class _LedWalk:
    """A walk whose chunks all ranks make together."""

    def __init__(self, session: Session, led: Callable[[Task, int], Generator[Result]]):
        self.session = session
        self._led = led

    def iterate_chunk(self, actions: ActionScript, frames: int) -> Generator[Progress | Frames | Chunk]:
        last = actions.segments[-1]
        held = actions + ActionScript([dataclasses.replace(last, frames=1)])  # a chunk sees the first action after it
        with closing(self._led(self.session.with_actions(held), frames)) as results:
            for result in results:
                if isinstance(result, Report):
                    yield result.progress
                if isinstance(result, Chunk):
                    self.session = result.session
                    yield Frames(result.index, result.frames)
                    yield result


def _changes(old: Session, new: Session) -> dict[str, Any]:
    """The fields in which a session is not the very same as another."""
    names = [field.name for field in dataclasses.fields(Session)]
    return {name: getattr(new, name) for name in names if getattr(new, name) is not getattr(old, name)}
