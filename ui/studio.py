"""What the page does, without the page: checks wishes, makes films chunk by chunk. Knows no Gradio.

A film belongs to the model that began it, and goes on with that one, whichever new films are begun with.

A Job says what a run has to do and is small; a Film is a folder. Between two calls nothing is kept here.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from infworld.actions import ActionScript
from infworld.models import peak_memory
from infworld.presets import EXACT, find_preset
from infworld.rollout import MAX_SEED, Chunk, Session, check_session
from infworld.video import crop_image
from ui.compute import Compute, Replay, Report, Scene
from ui.films import Film, FilmStore
from ui.models import Models
from ui.status import Making

log = logging.getLogger(__name__)

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
    preset: str = EXACT.name

    def __post_init__(self):
        if max(len(self.prompt), len(self.negative_prompt)) > MAX_PROMPT:
            raise ValueError(f"a prompt may have at most {MAX_PROMPT} characters")
        if not isinstance(self.seed, int) or not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"the seed must be a whole number from 0 to {MAX_SEED}, not {self.seed}")
        if not isinstance(self.steps, int) or not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"the number of steps must be 1 to {MAX_STEPS}, not {self.steps}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be a number, not {self.guidance}")
        find_preset(self.preset)

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
        return dataclasses.replace(session, steps=self.steps, guidance=self.guidance, preset=self.preset)


@dataclass(frozen=True)
class Job:
    """What a run does with a film: begin it with `picture` (uint8, H W 3), make its last chunk again (`redo`), or go
    on; `chunks` in all. Without wishes it makes nothing new, but shows the film of the session that is there. `model`
    is the film's."""

    model: str
    chunks: int
    wishes: Wishes | None = None
    picture: np.ndarray | None = None
    redo: bool = False


@dataclass(frozen=True)
class Loading:
    """A run waits for its model, which takes up to a minute."""

    model: str


class Studio:
    """The models and the folder of films."""

    def __init__(self, models: Models, store: FilmStore):
        self.models = models
        self.store = store

    def begin(self, image, num_frames: int, wishes: Wishes, model: str | None = None) -> tuple[Film, Job]:
        """A new film of a picture (path, array or PIL). ValueError for a useless picture, length or model."""
        model = model or self.models.first
        config = self.models.config(model)
        chunks = config.chunks_for(num_frames)
        picture = np.array(crop_image(image, config.buckets))
        return self.store.new(), Job(model, chunks, wishes, picture)

    def go_on(self, film: Film, chunks: int, wishes: Wishes) -> Job:
        """More chunks for a film. ValueError if they are too many or the film is gone."""
        session = film.session()
        config = self.models.config(session.model)
        config.chunks_for(session.num_frames + chunks * config.chunk_frames)
        return Job(session.model, chunks, wishes)

    def redo(self, film: Film, wishes: Wishes) -> Job:
        """The last chunk again, with the seed of `wishes`. ValueError if the film has none or is gone."""
        return Job(film.previous().model, 1, wishes, redo=True)

    def resume(self, path: str | Path) -> tuple[Film, Session]:
        """The film of a session file. ValueError for one of a model that is not here or beyond the page's limits."""
        session = Session.load(path)
        config = self.models.config(session.model)
        check_session(session, config)
        Wishes.of(session)
        if session.chunk_latents:
            config.chunks_for(session.num_frames)
        film = self.store.new()
        film.begin(session)
        return film, session

    def run(self, film: Film, job: Job) -> Iterator[Loading | Making | Chunk]:
        """Does a job, one GPU call per chunk. What is finished is in the film's folder before it is yielded.

        Only one run at a time may be on.
        """
        if not self.models.is_loaded(job.model):
            yield Loading(job.model)
        compute = self.models.compute(job.model)
        began = time.monotonic()
        if job.picture is None:
            yield from self._show(film, compute)
        task = self._first_task(film, job)
        frames = 0
        for number in range(1, job.chunks + 1):
            for result in compute(task):
                if isinstance(result, Session):
                    film.begin(result)
                elif isinstance(result, Report):
                    seconds = time.monotonic() - began
                    yield Making(job.model, number, job.chunks, frames, seconds, task.seed, result)
                else:
                    film.add(result)
                    frames += self.models.config(job.model).chunk_frames
                    task = result.session
                    yield result
        if frames:
            seconds, memory = time.monotonic() - began, peak_memory(self.models.device)
            log.info("%s: %d frames in %.1f s, peak memory %s", job.model, frames, seconds, memory)

    def _first_task(self, film: Film, job: Job) -> Scene | Session | None:
        if job.wishes is None:
            return None
        if job.picture is not None:
            return job.wishes.begin(job.picture)
        if job.redo:
            return job.wishes.for_rest_of(film.previous()).with_seed(job.wishes.seed)
        return job.wishes.for_rest_of(film.session())

    def _show(self, film: Film, compute: Compute) -> Iterator[Chunk]:
        """Decodes the chunks that the film's session has and its folder has no frames of."""
        session, there = film.session(), len(film.pieces())
        if there < len(session.chunk_latents):
            for chunk in compute(Replay(session)):
                if chunk.index >= there:
                    film.add_frames(chunk)
                    yield chunk
