"""What the page does, without the page: checks wishes, makes films chunk by chunk. Knows no Gradio.

A Job says what a run has to do and is small; a Film is a folder. Between two calls nothing is kept here.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from infworld.actions import ActionScript
from infworld.rollout import MAX_SEED, Chunk, Session, World
from infworld.video import crop_image
from ui.compute import Replay, Report, Scene, on_gpu
from ui.films import Film, FilmStore
from ui.status import Making

MAX_PROMPT = 1000  # characters
MAX_STEPS = 100


@dataclass(frozen=True)
class Wishes:
    """How the frames to come shall be made. `actions` are the whole film's, from its first frame on.

    Raises ValueError for what no page would send.
    """

    actions: ActionScript
    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance: float

    def __post_init__(self):
        if max(len(self.prompt), len(self.negative_prompt)) > MAX_PROMPT:
            raise ValueError(f"a prompt may have at most {MAX_PROMPT} characters")
        if not isinstance(self.seed, int) or not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"the seed must be a whole number from 0 to {MAX_SEED}, not {self.seed}")
        if not isinstance(self.steps, int) or not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"the number of steps must be 1 to {MAX_STEPS}, not {self.steps}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be a number, not {self.guidance}")

    @staticmethod
    def of(session: Session) -> Wishes:
        """What a session was asked for."""
        return Wishes(**{field.name: getattr(session, field.name) for field in dataclasses.fields(Wishes)})

    def begin(self, picture: np.ndarray) -> Scene:
        return Scene(picture, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    def for_rest_of(self, session: Session) -> Session:
        """The session with these wishes for the frames to come; what was done stays. The seed is not touched."""
        rest = ActionScript.from_pairs(self.actions.pairs(session.num_frames - 1))
        session = session.with_actions(rest).with_prompt(self.prompt, self.negative_prompt)
        return dataclasses.replace(session, steps=self.steps, guidance=self.guidance)


@dataclass(frozen=True)
class Job:
    """What a run does with a film: begin it with `picture` (uint8, H W 3), make its last chunk again (`redo`), or go
    on; `chunks` in all. Without wishes it makes nothing new, but shows the film of the session that is there."""

    chunks: int
    wishes: Wishes | None = None
    picture: np.ndarray | None = None
    redo: bool = False


class Studio:
    """A model and the folder of films."""

    def __init__(self, world: World, store: FilmStore):
        self.world = world
        self.config = world.config
        self.store = store
        self._compute = on_gpu(world)

    def begin(self, image, num_frames: int, wishes: Wishes) -> tuple[Film, Job]:
        """A new film of a picture (path, array or PIL). ValueError for a useless picture or length."""
        chunks = self.config.chunks_for(num_frames)
        picture = np.array(crop_image(image, self.config.buckets))
        return self.store.new(), Job(chunks, wishes, picture)

    def go_on(self, film: Film, chunks: int, wishes: Wishes) -> Job:
        """More chunks for a film. ValueError if they are too many or the film is gone."""
        self.config.chunks_for(film.session().num_frames + chunks * self.config.chunk_frames)
        return Job(chunks, wishes)

    def redo(self, film: Film, wishes: Wishes) -> Job:
        """The last chunk again, with the seed of `wishes`. ValueError if the film has none or is gone."""
        film.previous()
        return Job(1, wishes, redo=True)

    def resume(self, path: str | Path) -> tuple[Film, Session]:
        """The film of a session file. ValueError for one that is not this model's or is beyond the page's limits."""
        session = Session.load(path)
        self.world.check_session(session)
        Wishes.of(session)
        if session.chunk_latents:
            self.config.chunks_for(session.num_frames)
        film = self.store.new()
        film.begin(session)
        return film, session

    def run(self, film: Film, job: Job) -> Iterator[Making | Chunk]:
        """Does a job, one GPU call per chunk. What is finished is in the film's folder before it is yielded."""
        began = time.monotonic()
        if job.picture is None:
            yield from self._show(film)
        task = self._first_task(film, job)
        frames = 0
        for number in range(1, job.chunks + 1):
            for result in self._compute(task):
                if isinstance(result, Session):
                    film.begin(result)
                elif isinstance(result, Report):
                    seconds = time.monotonic() - began
                    yield Making(number, job.chunks, frames, seconds, task.seed, result)
                else:
                    film.add(result)
                    frames += self.config.chunk_frames
                    task = result.session
                    yield result

    def _first_task(self, film: Film, job: Job) -> Scene | Session | None:
        if job.wishes is None:
            return None
        if job.picture is not None:
            return job.wishes.begin(job.picture)
        if job.redo:
            return job.wishes.for_rest_of(film.previous()).with_seed(job.wishes.seed)
        return job.wishes.for_rest_of(film.session())

    def _show(self, film: Film) -> Iterator[Chunk]:
        """Decodes the chunks that the film's session has and its folder has no frames of."""
        session, there = film.session(), len(film.pieces())
        if there < len(session.chunk_latents):
            for chunk in self._compute(Replay(session)):
                if chunk.index >= there:
                    film.add_frames(chunk)
                    yield chunk
