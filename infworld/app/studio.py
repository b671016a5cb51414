"""What the page does, without the page: checks settings, makes films chunk by chunk. Knows no Gradio.

A film belongs to the model that began it, and goes on with that one, whichever new films are begun with.

A Job says what a run has to do and is small; a Film is a folder. Between two calls nothing is kept here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from infworld.app.compute import Compute, Replay, Report, Scene
from infworld.app.films import Film, FilmStore
from infworld.app.model_pool import ModelPool
from infworld.app.status import RunProgress
from infworld.devices import peak_memory
from infworld.pictures import crop_image
from infworld.session import Session, check_session
from infworld.settings import FilmSettings
from infworld.world import Chunk

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What a run does with a film: begin it with `picture` (uint8, H W 3), make its last chunk again (`redo`), or go
    on; `chunks` in all. Without settings it makes nothing new, but shows the film of the session that is there. `model`
    is the film's."""

    model: str
    chunks: int
    settings: FilmSettings | None = None
    picture: np.ndarray | None = None
    redo: bool = False


@dataclass(frozen=True)
class Loading:
    """A run waits for its model, which takes up to a minute."""

    model: str


class Studio:
    """The models and the folder of films."""

    def __init__(self, models: ModelPool, store: FilmStore):
        self.models = models
        self.store = store

    def begin(self, image, num_frames: int, settings: FilmSettings, model: str | None = None) -> tuple[Film, Job]:
        """A new film of a picture (path, array or PIL). ValueError for a useless picture, length or model."""
        model = model or self.models.first
        config = self.models.config(model)
        chunks = config.chunks_for(num_frames)
        picture = np.array(crop_image(image, config.buckets))
        return self.store.new(), Job(model, chunks, settings, picture)

    def go_on(self, film: Film, chunks: int, settings: FilmSettings) -> Job:
        """More chunks for a film. ValueError if they are too many or the film is gone."""
        session = film.session()
        config = self.models.config(session.model)
        config.chunks_for(session.num_frames + chunks * config.chunk_frames)
        return Job(session.model, chunks, settings)

    def redo(self, film: Film, settings: FilmSettings) -> Job:
        """The last chunk again, with the seed of `settings`. ValueError if the film has none or is gone."""
        return Job(film.previous().model, 1, settings, redo=True)

    def resume(self, path: str | Path) -> tuple[Film, Session]:
        """The film of a session file. ValueError for one of a model that is not here or beyond the page's limits."""
        session = Session.load(path)
        config = self.models.config(session.model)
        check_session(session, config)
        if session.chunk_latents:
            config.chunks_for(session.num_frames)
        film = self.store.new()
        film.begin(session)
        return film, session

    def run(self, film: Film, job: Job) -> Iterator[Loading | RunProgress | Chunk]:
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
                    yield RunProgress(job.model, number, job.chunks, frames, seconds, task.settings.seed, result)
                else:
                    film.add(result)
                    frames += self.models.config(job.model).chunk_frames
                    task = result.session
                    yield result
        if frames:
            seconds, memory = time.monotonic() - began, peak_memory(self.models.device)
            log.info("%s: %d frames in %.1f s, peak memory %s", job.model, frames, seconds, memory)

    def _first_task(self, film: Film, job: Job) -> Scene | Session | None:
        if job.settings is None:
            return None
        if job.picture is not None:
            return Scene(job.settings, job.picture)
        if job.redo:
            return film.previous().with_settings(job.settings).with_seed(job.settings.seed)
        return film.session().with_settings(job.settings)

    def _show(self, film: Film, compute: Compute) -> Iterator[Chunk]:
        """Decodes the chunks that the film's session has and its folder has no frames of."""
        session, there = film.session(), len(film.pieces())
        if there < len(session.chunk_latents):
            for chunk in compute(Replay(session)):
                if chunk.index >= there:
                    film.add_frames(chunk)
                    yield chunk
