"""Who makes the films: a thread for each device, which alone touches the models there, and one queue of runs.

A request submits a job and reads the run's updates. It never waits for a thread, and no thread waits for it: to cancel
a run is to set a flag, which its thread sees after the step it is in. A run is over when its thread has left it, and
only then does that thread begin the next one.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import io
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Generator
from contextlib import closing, suppress
from contextvars import copy_context
from dataclasses import dataclass
from ipaddress import ip_address

import numpy as np
from einops import rearrange
from PIL import Image

from infworld.app.compute import Compute, Live, Opening, Replay, Report, Task, Walk
from infworld.app.films import Film, PieceWriter, Recorder
from infworld.app.model_pool import ModelPool
from infworld.app.steering import Steering
from infworld.devices import peak_memory, release_memory
from infworld.session import Session
from infworld.settings import FilmSettings
from infworld.world import Frames

log = logging.getLogger(__name__)

MAX_WAITING = 64  # runs
STRIPS = 4  # of a walk that is played, which are kept for a page that is slow to take them
TURN = 120.0  # seconds that a walk may be played while somebody waits
NOTICE = 20.0  # seconds that are left at least when somebody comes to wait
ASLEEP, PAUSED = 10.0, 300.0  # seconds after which one who plays is gone: without a word, and pausing
SHOWN_FRAMES = 80  # of a piece of a film that is decoded from its session
COLUMNS = 4  # of frames in a strip
JPEG_QUALITY = 90  # of frames on their way to a page; the film itself is kept better
MAX_PER_SESSION = 8  # runs of one program
MAX_PER_ADDRESS = MAX_WAITING // 2  # runs of everybody who comes from one address, unless it is this machine


@dataclass(frozen=True, eq=False)
class Job:
    """What to do with a film: begin it with `picture` (uint8, H W 3), make its last chunk again (`redo`), or go on.

    chunks: how many to make. Without settings none are made: the film of its session is decoded and shown. model: the
    film's. played: as many chunks are made as a person walks, steered through the film's `steering_path`.
    """

    film: Film
    model: str
    chunks: int
    settings: FilmSettings | None = None
    picture: np.ndarray | None = None
    redo: bool = False
    played: bool = False


@dataclass(frozen=True)
class Visitor:
    """Whose run it is: Gradio's session and the address it comes from. most: runs that the session may have at once."""

    session: str
    address: str
    most: int = MAX_PER_SESSION

    @property
    def is_local(self) -> bool:
        with suppress(ValueError):
            return ip_address(self.address).is_loopback
        return False


# ------------------------------------------------------------------------------------------------------------- updates


@dataclass(frozen=True)
class Waiting:
    """The run waits for `place` others; `seconds` is an estimate for how long, None where nothing is known."""

    place: int
    seconds: float | None


@dataclass(frozen=True)
class Loading:
    """The run waits for its model, which takes up to a minute."""

    model: str


@dataclass(frozen=True)
class RunProgress:
    """A step is done: the model, the chunk it is at (from 1) of the run's `chunks`, frames made and seconds since the
    run began, the seed, and the report of the present chunk."""

    model: str
    chunk: int
    chunks: int
    frames: int
    seconds: float
    seed: int
    report: Report

    @property
    def remaining(self) -> float | None:
        """Seconds left in the run, from the chunks done and the present one's own estimate."""
        progress = self.report.progress
        if progress.remaining is None and self.chunk == 1:
            return None
        done = self.seconds - progress.seconds
        per_chunk = done / (self.chunk - 1) if self.chunk > 1 else progress.seconds + (progress.remaining or 0.0)
        rest = per_chunk - progress.seconds if progress.remaining is None else progress.remaining
        return max(0.0, rest) + per_chunk * (self.chunks - self.chunk)

    @property
    def share(self) -> float:
        """Part of the run that is done, 0 to 1."""
        progress = self.report.progress
        return (self.chunk - 1 + progress.step / (progress.steps + 1)) / self.chunks


@dataclass(frozen=True)
class NewChunk:
    """The frames of the film's chunk of this index are in its folder, and the session after it."""

    index: int


@dataclass(frozen=True)
class Played:
    """A walk that is played: the strip of this number is the newest of `Run.strips`. seconds_left: of this visitor's
    turn, None as long as nobody waits."""

    number: int
    seconds_left: float | None


@dataclass(frozen=True)
class Strip:
    """Frames of a chunk of a walk that is played, as one JPEG: row by row, `COLUMNS` beside each other.

    size: width and height of a frame. lasts: seconds that they have to last. steered: the number of the steering that
    they were made with; actions: their [move, view, frames].
    """

    number: int
    jpeg: bytes
    size: tuple[int, int]
    frames: int
    lasts: float
    steered: int
    actions: list[list[int]]


@dataclass(frozen=True)
class Ended:
    """The worker has left the run: with all chunks, because it was cancelled (`stopped`), or because of an error.

    why: a sentence for whoever was playing, where it was not their wish.
    """

    stopped: bool = False
    error: Exception | None = None
    why: str = ""


Update = Waiting | Loading | RunProgress | NewChunk | Played | Ended


# --------------------------------------------------------------------------------------------------------------- runner


class Run:
    """A job in the runner's queue, or in the making. Made by `Runner.submit`."""

    def __init__(self, job: Job, visitor: Visitor | None, runner: Runner):
        self.job = job
        self.visitor = visitor
        self.submitted = time.monotonic()
        self.steered = 0  # the number of the newest steering of a walk that is played, and when that came
        self.heard = self.submitted
        self.strips: deque[Strip] = deque(maxlen=STRIPS)
        self._runner = runner
        self._context = copy_context()  # of the request, from which ZeroGPU reads whose quota it is
        self.began = math.inf  # when the worker took it up
        self._updates: list[Update] = []
        self._listeners: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._cancelled = threading.Event()

    @property
    def is_over(self) -> bool:
        """Whether the worker has left it, or will never begin it."""
        return bool(self._updates) and isinstance(self._updates[-1], Ended)

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Asks the worker to leave the run after the step it is in; returns at once. One that waits is over at once."""
        self._cancelled.set()
        self._runner._drop(self)

    def leave(self, linger: float) -> None:
        """Cancels the run in `linger` seconds, if nobody reads its updates then; with 0 at once. Called in an event
        loop."""

        def cancel() -> None:
            if not self._listeners:
                self.cancel()

        if not linger:
            self.cancel()
        elif not self.is_over:
            asyncio.get_running_loop().call_later(linger, cancel)

    async def updates(self, pause: float = 1.0, linger: float = 0.0) -> AsyncGenerator[Update]:
        """What happens, from the run's beginning to its `Ended`; where nothing does, every `pause` seconds where it
        stands. Closing the iterator before that cancels the run, unless another one is open `linger` seconds later.
        """
        listener = asyncio.get_running_loop(), asyncio.Event()
        self._listeners.append(listener)
        seen, standing = 0, None
        try:
            while True:
                listener[1].clear()
                if seen == len(self._updates):
                    yield standing or self._runner._waiting_of(self)
                while seen < len(self._updates):
                    update = self._updates[seen]
                    seen += 1
                    if not isinstance(update, NewChunk):
                        standing = update
                    yield update
                    if isinstance(update, Ended):
                        return
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(listener[1].wait(), pause)
        finally:
            self._listeners.remove(listener)
            self.leave(linger)

    def _tell(self, update: Update) -> None:
        self._updates.append(update)
        for loop, news in list(self._listeners):
            with suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(news.set)


class Runner:
    """The threads that work, one for each pool of models, and the runs that wait for them. `close` ends them."""

    def __init__(self, *pools: ModelPool, max_waiting: int = MAX_WAITING):
        self.max_waiting = max_waiting
        self._pools = pools
        self._queue: deque[Run] = deque()
        self._current: dict[ModelPool, Run] = {}  # where there is one
        self._chunk_seconds: dict[str, float] = {}  # that the last chunk took, by model
        self._closed = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, args=[models], name=f"runner {number}", daemon=True)
            for number, models in enumerate(pools)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job, visitor: Visitor | None = None) -> Run:
        """Puts a job at the queue's end. Raises ValueError if the queue is full, the film has a run already, or the
        visitor too many."""
        with self._changed:
            if self.run_of(job.film):
                raise ValueError("this film is being made already: wait for it, or stop it first")
            if len(self._queue) >= self.max_waiting:
                raise ValueError(f"{len(self._queue)} films are waiting already, which is the most: try again later")
            if visitor:
                self._check_share(visitor)
            run = Run(job, visitor, self)
            self._queue.append(run)
            self._changed.notify_all()
        return run

    def run_of(self, film: Film) -> Run | None:
        """The run that is making this film, or waits to."""
        with self._changed:
            return next((run for run in self._runs() if run.job.film == film), None)

    def films(self) -> set[Film]:
        """The films that are being made, or wait to be."""
        with self._changed:
            return {run.job.film for run in self._runs()}

    def close(self) -> None:
        """Cancels everything, and waits for the threads to end. Not to be called by a request."""
        with self._changed:
            self._closed = True
            runs = self._runs()
            self._changed.notify_all()
        for run in runs:
            run.cancel()
        for thread in self._threads:
            thread.join()

    def _check_share(self, visitor: Visitor) -> None:
        """Raises ValueError for a visitor who has as many runs as one may have."""
        others = [run.visitor for run in self._runs() if run.visitor]
        if sum(other.session == visitor.session for other in others) >= visitor.most:
            films = "a film" if visitor.most == 1 else f"{visitor.most} films"
            raise ValueError(f"you have {films} in the making already: wait for it, or stop it first")
        if sum(other.address == visitor.address for other in others) >= MAX_PER_ADDRESS and not visitor.is_local:
            raise ValueError(f"{MAX_PER_ADDRESS} films of your address are waiting already: try again later")

    def _runs(self) -> list[Run]:
        return [*self._current.values(), *self._queue]

    def _drop(self, run: Run) -> None:
        """Takes a run out that has not begun."""
        with self._changed:
            if run in self._queue:
                self._queue.remove(run)
                run._tell(Ended(stopped=True))

    def _waiting_of(self, run: Run) -> Waiting:
        with self._changed:
            if run not in self._queue:
                return Waiting(0, 0.0)
            before = [*self._queue][: self._queue.index(run)]
            idle = len(self._pools) - len(self._current)
            place = max(0, len(before) + 1 - idle)
            free = [0.0] * idle + [self._seconds_left(other) for other in self._current.values()]  # until a thread is
            times = [self._seconds_left(other) for other in before]
        heapq.heapify(free)
        for seconds in times:
            heapq.heapreplace(free, free[0] + seconds)
        return Waiting(place, free[0] if free[0] < math.inf else None)

    def _turn_left(self, run: Run) -> float | None:
        """Seconds that a walk may still be played; None as long as nobody waits."""
        with self._changed:
            if not self._queue:
                return None
            now = time.monotonic()
            return max(0.0, run.began + TURN - now, self._queue[0].submitted + NOTICE - now)

    def _seconds_left(self, run: Run) -> float:
        """Infinitely many where nothing is known."""
        if run.job.played:
            left = self._turn_left(run) if run in self._current.values() else TURN
            return TURN if left is None else left
        last = run._updates[-1] if run._updates else None
        if isinstance(last, RunProgress) and last.remaining is not None:
            return last.remaining
        return self._chunk_seconds.get(run.job.model, math.inf) * max(1, run.job.chunks)

    # ----------------------------------------------------------------------------------------------- in the threads

    def _work(self, models: ModelPool) -> None:
        models.use_device()
        while run := self._next(models):
            run._context.run(self._do, run, models)

    def _next(self, models: ModelPool) -> Run | None:
        """The first run, as soon as it is for these models; None at the end."""
        with self._changed:
            while not self._closed:
                if self._queue and self._is_for(models, self._queue[0]):
                    run = self._current[models] = self._queue.popleft()
                    self._changed.notify_all()  # there is another first one
                    return run
                self._changed.wait()
        return None

    def _is_for(self, models: ModelPool, run: Run) -> bool:
        """Whether the run's model is loaded here, or on no other device that is idle."""
        idle = [pool for pool in self._pools if pool not in self._current]
        return models.is_loaded(run.job.model) or not any(pool.is_loaded(run.job.model) for pool in idle)

    def _do(self, run: Run, models: ModelPool) -> None:
        try:
            ended = self._steps(run, models)
        except Exception as error:
            log.exception("a run ended early")
            ended = Ended(error=error)
        gc.collect()
        release_memory()
        with self._changed:  # whoever hears of the end may submit the film's next job
            del self._current[models]
        run._tell(ended)

    def _steps(self, run: Run, models: ModelPool) -> Ended:
        """Works until the job is done or the run cancelled."""
        if run.is_cancelled:
            return Ended(stopped=True)
        run.began = time.monotonic()
        with closing(self._updates_of(run, models)) as updates:
            for update in updates:
                if isinstance(update, Ended):
                    return update
                run._tell(update)
                if run.is_cancelled and not isinstance(update, Played):
                    return Ended(stopped=True)
        seconds, memory = time.monotonic() - run.began, peak_memory(models.device)
        log.info("%s: %s chunks in %.1f s, peak memory %s", run.job.model, run.job.chunks, seconds, memory)
        return Ended()

    def _updates_of(self, run: Run, models: ModelPool) -> Generator[Update]:
        """Does a job. What is finished is in the film's folder before it is told."""
        job = run.job
        if not models.is_loaded(job.model):
            yield Loading(job.model)
        compute = models.compute(job.model)
        if job.picture is None:
            job.film.recover()
            yield from self._show(job.film, compute)
        yield from self._play(run, compute) if job.played else self._make(job, compute)

    def _make(self, job: Job, compute: Compute) -> Generator[Update]:
        """The job's chunks, one GPU call each."""
        task, seed, began, frames = _first_task(job), job.settings and job.settings.seed, time.monotonic(), 0
        for number in range(1, job.chunks + 1):
            chunk_began = time.monotonic()
            with closing(compute(task)) as results:
                for result in results:
                    if isinstance(result, Session):
                        job.film.begin(result, job.picture)
                    elif isinstance(result, Report):
                        seconds = time.monotonic() - began
                        yield RunProgress(job.model, number, job.chunks, frames, seconds, seed, result)
                    else:
                        job.film.add(result)
                        frames += len(result.frames) - (result.index == 0)  # which begins with the picture
                        task = result.session
                        self._chunk_seconds[job.model] = time.monotonic() - chunk_began
                        yield NewChunk(result.index)

    def _play(self, run: Run, compute: Compute) -> Generator[Update]:
        """Chunk after chunk as it is steered, in GPU calls of a minute, until the person leaves or has to."""
        job, film = run.job, run.job.film
        settings = job.settings
        begin = film.session().with_settings(settings) if job.picture is None else Opening(job.picture, settings)
        live, number, made, told = None, 0, 0, time.monotonic()
        with Recorder(film) as recorder:
            while True:
                walk, is_full = Walk(begin, film.steering_path, made), True
                with closing(compute(walk)) as results:
                    for result in results:
                        is_full = False
                        if isinstance(result, Session):
                            film.begin(result, job.picture)
                        elif isinstance(result, Live):
                            live = result if result.actions is not None else live
                            why = self._why_over(run, result.steering, told)
                            if why or run.is_cancelled:
                                yield Ended(stopped=True, why=why)
                        elif isinstance(result, Frames):
                            number, made, told = number + 1, made + len(result.frames), time.monotonic()
                            run.strips.append(_strip(number, result.frames, live))
                            yield Played(number, self._turn_left(run))
                        else:
                            begin = result.session
                            recorder.add(result)
                if is_full:
                    yield Ended(stopped=True, why="The film is as long as it can be. Begin another one.")

    def _why_over(self, run: Run, steering: Steering, told: float) -> str:
        """Why a walk has to end now; "" where it may go on. told: when the page was last told of frames."""
        quiet = time.monotonic() - max(steering.at, told)
        left = self._turn_left(run)
        if quiet > (PAUSED if steering.paused else ASLEEP):
            return "Nothing was heard of your page for a while, so the walk was ended."
        if left == 0 or (left is not None and steering.paused and quiet > NOTICE):
            return "Somebody else waits, and your turn is over. Press Walk on to wait for the next one."
        return ""

    def _show(self, film: Film, compute: Compute) -> Generator[Update]:
        """Decodes the chunks that the film's session has and its folder has no frames of."""
        session, there = film.session(), film.num_chunks
        if there < len(session.chunk_latents):
            with closing(compute(Replay(session))) as chunks, PieceWriter(film, SHOWN_FRAMES) as pieces:
                for chunk in chunks:
                    if chunk.index >= there and pieces.add(chunk):
                        yield NewChunk(chunk.index)


def _strip(number: int, frames: np.ndarray, live: Live) -> Strip:
    """What a page is sent of new frames, uint8 T H W 3."""
    height, width = frames.shape[1:3]
    padded = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % COLUMNS, axis=0)])
    sheet = rearrange(padded, "(r c) h w rgb -> (r h) (c w) rgb", c=COLUMNS)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(sheet)).save(file, "JPEG", quality=JPEG_QUALITY)
    actions = [[part.move, part.view, part.frames] for part in live.actions.segments]
    return Strip(number, file.getvalue(), (width, height), len(frames), live.lasts, live.steering.number, actions)


def _first_task(job: Job) -> Task | None:
    if job.settings is None:
        return None
    if job.picture is not None:
        return Opening(job.picture, job.settings)
    if job.redo:
        return job.film.previous().with_settings(job.settings).with_seed(job.settings.seed)
    return job.film.session().with_settings(job.settings)
