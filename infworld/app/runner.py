"""Who makes the films: one thread, which alone touches the models, and the queue of what it has to do.

A request submits a job and reads the run's updates. It never waits for the thread, and the thread never waits for it:
to cancel a run is to set a flag, which the thread sees after the step it is in. A run is over when the thread has left
it, and only then does the next one begin.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Generator
from contextlib import closing, suppress
from contextvars import copy_context
from dataclasses import dataclass
from ipaddress import ip_address

import numpy as np

from infworld.app.compute import Opening, Replay, Report, Task
from infworld.app.films import Film
from infworld.app.model_pool import ModelPool
from infworld.devices import peak_memory, release_memory
from infworld.session import Session
from infworld.settings import FilmSettings

log = logging.getLogger(__name__)

MAX_WAITING = 64  # runs
MAX_PER_SESSION = 8  # runs of one program
MAX_PER_ADDRESS = MAX_WAITING // 2  # runs of everybody who comes from one address, unless it is this machine


@dataclass(frozen=True, eq=False)
class Job:
    """What to do with a film: begin it with `picture` (uint8, H W 3), make its last chunk again (`redo`), or go on.

    chunks: how many to make. Without settings none are made: the film of its session is decoded and shown. model: the
    film's.
    """

    film: Film
    model: str
    chunks: int
    settings: FilmSettings | None = None
    picture: np.ndarray | None = None
    redo: bool = False


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
class Ended:
    """The worker has left the run: with all chunks, because it was cancelled (`stopped`), or because of an error."""

    stopped: bool = False
    error: Exception | None = None


Update = Waiting | Loading | RunProgress | NewChunk | Ended


# --------------------------------------------------------------------------------------------------------------- runner


class Run:
    """A job in the runner's queue, or in the making. Made by `Runner.submit`."""

    def __init__(self, job: Job, visitor: Visitor | None, runner: Runner):
        self.job = job
        self.visitor = visitor
        self._runner = runner
        self._context = copy_context()  # of the request, from which ZeroGPU reads whose quota it is
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
    """The one thread that works, and the runs that wait for it. `close` ends it."""

    def __init__(self, models: ModelPool, max_waiting: int = MAX_WAITING):
        self.models = models
        self.max_waiting = max_waiting
        self._queue: deque[Run] = deque()
        self._current: Run | None = None
        self._chunk_seconds: dict[str, float] = {}  # that the last chunk took, by model
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="runner", daemon=True)
        self._thread.start()

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
        """Cancels everything, and waits for the thread to end. Not to be called by a request."""
        with self._changed:
            self._closed = True
            runs = self._runs()
            self._changed.notify_all()
        for run in runs:
            run.cancel()
        self._thread.join()

    def _check_share(self, visitor: Visitor) -> None:
        """Raises ValueError for a visitor who has as many runs as one may have."""
        others = [run.visitor for run in self._runs() if run.visitor]
        if sum(other.session == visitor.session for other in others) >= visitor.most:
            films = "a film" if visitor.most == 1 else f"{visitor.most} films"
            raise ValueError(f"you have {films} in the making already: wait for it, or stop it first")
        if sum(other.address == visitor.address for other in others) >= MAX_PER_ADDRESS and not visitor.is_local:
            raise ValueError(f"{MAX_PER_ADDRESS} films of your address are waiting already: try again later")

    def _runs(self) -> list[Run]:
        return [*filter(None, [self._current]), *self._queue]

    def _drop(self, run: Run) -> None:
        """Takes a run out that has not begun."""
        with self._changed:
            if run in self._queue:
                self._queue.remove(run)
                run._tell(Ended(stopped=True))

    def _waiting_of(self, run: Run) -> Waiting:
        with self._changed:
            runs = self._runs()
            before = runs[: runs.index(run)] if run in runs else []
            times = [self._seconds_left(other) for other in before]
        return Waiting(len(before), None if None in times else sum(times))

    def _seconds_left(self, run: Run) -> float | None:
        last = run._updates[-1] if run._updates else None
        if isinstance(last, RunProgress) and last.remaining is not None:
            return last.remaining
        per_chunk = self._chunk_seconds.get(run.job.model)
        return None if per_chunk is None else per_chunk * run.job.chunks

    # --------------------------------------------------------------------------------------------- in the one thread

    def _work(self) -> None:
        while run := self._next():
            run._context.run(self._do, run)

    def _next(self) -> Run | None:
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            self._current = self._queue.popleft()
            return self._current

    def _do(self, run: Run) -> None:
        try:
            stopped = self._steps(run)
        except Exception as error:
            log.exception("a run ended early")
            ended = Ended(error=error)
        else:
            ended = Ended(stopped=stopped)
        gc.collect()
        release_memory()
        with self._changed:  # whoever hears of the end may submit the film's next job
            self._current = None
        run._tell(ended)

    def _steps(self, run: Run) -> bool:
        """Works until the job is done or the run cancelled; returns whether it was cancelled."""
        if run.is_cancelled:
            return True
        began = time.monotonic()
        with closing(self._updates_of(run.job)) as updates:
            for update in updates:
                run._tell(update)
                if run.is_cancelled:
                    return True
        seconds, memory = time.monotonic() - began, peak_memory(self.models.device)
        log.info("%s: %d chunks in %.1f s, peak memory %s", run.job.model, run.job.chunks, seconds, memory)
        return False

    def _updates_of(self, job: Job) -> Generator[Update]:
        """Does a job, one GPU call per chunk. What is finished is in the film's folder before it is told."""
        if not self.models.is_loaded(job.model):
            yield Loading(job.model)
        compute = self.models.compute(job.model)
        if job.picture is None:
            job.film.recover()
            yield from self._show(job.film, compute)
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

    def _show(self, film: Film, compute) -> Generator[Update]:
        """Decodes the chunks that the film's session has and its folder has no frames of."""
        session, there = film.session(), len(film.pieces())
        if there < len(session.chunk_latents):
            with closing(compute(Replay(session))) as chunks:
                for chunk in chunks:
                    if chunk.index >= there:
                        film.add_frames(chunk)
                        yield NewChunk(chunk.index)


def _first_task(job: Job) -> Task | None:
    if job.settings is None:
        return None
    if job.picture is not None:
        return Opening(job.picture, job.settings)
    if job.redo:
        return job.film.previous().with_settings(job.settings).with_seed(job.settings.seed)
    return job.film.session().with_settings(job.settings)
