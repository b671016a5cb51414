"""From what a person asks to a job that the runner can do: everything is checked here. Knows no Gradio."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from infworld.app.films import Film, FilmStore
from infworld.app.model_pool import ModelPool
from infworld.app.runner import Job
from infworld.config import ModelConfig
from infworld.pictures import crop_image
from infworld.session import Session, check_session
from infworld.settings import FilmSettings


class Studio:
    """The models and the folder of films. A film goes on with the model that began it, whichever new ones are begun
    with. Bad input is a ValueError."""

    def __init__(self, models: ModelPool, store: FilmStore):
        self.models = models
        self.store = store

    def begin(self, image, num_frames: int, settings: FilmSettings, model: str | None = None) -> Job:
        """A new film of a picture (path, array or PIL)."""
        config = self.models.config(model or self.models.first)
        chunks = config.chunks_for(num_frames)
        picture = np.array(crop_image(image, config.buckets))
        return Job(self.store.new(), config.name, chunks, settings, picture)

    def go_on(self, film: Film, chunks: int, settings: FilmSettings) -> Job:
        """More chunks for a film, with its own seed."""
        session = film.session()
        config = self.models.config(session.model)
        check_length(config, session.num_frames + chunks * config.chunk_frames)
        return Job(film, session.model, chunks, session.with_settings(settings).settings)

    def play(self, image, settings: FilmSettings, model: str | None = None) -> Job:
        """A new film of a picture, to be played."""
        config = self.models.config(model or self.models.first)
        picture = np.array(crop_image(image, config.buckets))
        return Job(self.store.new(), config.name, 0, _live(config, settings), picture, played=True)

    def play_on(self, film: Film, settings: FilmSettings) -> Job:
        """More of a film, to be played."""
        session = film.session()
        config = self.models.config(session.model)
        check_length(config, session.num_frames + min(config.validation_data.live_lengths))
        return Job(film, session.model, 0, session.with_settings(_live(config, settings)).settings, played=True)

    def redo(self, film: Film, settings: FilmSettings) -> Job:
        """The last chunk again, with the seed of `settings`."""
        return Job(film, film.previous().model, 1, settings, redo=True)

    def resume(self, path: str | Path) -> tuple[Job, Session]:
        """The film of a session file, which is to be shown. Raises ValueError if its model is not available."""
        session = Session.load(path)
        config = self.models.config(session.model)
        check_session(session, config)
        check_length(config, session.num_frames)
        film = self.store.new()
        film.begin(session)
        return Job(film, session.model, 0), session


def _live(config: ModelConfig, settings: FilmSettings) -> FilmSettings:
    """Settings of a walk that is played: with no more steps than the model takes for that."""
    most = config.validation_data.live_steps or settings.steps
    return dataclasses.replace(settings, steps=min(settings.steps, most))


def check_length(config: ModelConfig, frames: int) -> None:
    """Raises ValueError for a film that is too long. Its chunks may be of any length."""
    if frames > config.max_frames:
        raise ValueError(f"a film has at most {config.max_frames} frames, not {frames}")
