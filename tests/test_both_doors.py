"""The same film from both doors: the page's endpoint and the command line, from the same settings."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from gradio_client import Client, handle_file
from peak import Peak
from PIL import Image

import infworld
from infworld.app.films import FilmStore
from infworld.app.model_pool import ModelPool
from infworld.app.runner import Runner
from infworld.app.studio import Studio
from infworld.cli import generate
from infworld.config import load_config
from infworld.session import Session
from infworld.settings import FilmSettings

WISH = {"actions": "forward 80, right 80", "prompt": "a hill", "seed": 3, "preset": "fast"}


def by_command_line(config: Path, picture: Path, folder: Path) -> Path:
    options = [word for name, value in WISH.items() for word in (f"--{name}", str(value))]
    files = ["--out", str(folder / "film.mp4"), "--session", str(folder / "film.safetensors")]
    assert generate.main(["--model", str(config), "--device", "cpu", "--image", str(picture), *options, *files]) == 0
    return folder / "film.mp4"


@pytest.mark.parametrize(("model", "mode"), [("small_model", "P"), ("small_model", "RGBA"), ("random_model", "RGB")])
def test_a_film_is_the_same_bit_for_bit(request, serve_models, picture, tmp_path, model, mode):
    config = request.getfixturevalue(model)
    with Image.open(picture) as image:
        image.convert(mode).save(tmp_path / "picture.png")
    picture, world = tmp_path / "picture.png", load_config(config)
    films = tmp_path / "films"
    client = Client(serve_models(ModelPool({world.name: world}, "cpu"), films), verbose=False)
    wish = {**WISH, "image": handle_file(picture), "frames": 161, "model": ""}
    from_page = Path(client.predict(**wish, api_name="/film"))
    from_terminal = by_command_line(config, picture, tmp_path)
    assert from_page.read_bytes() == from_terminal.read_bytes()
    (session,) = (Session.load(path) for path in films.glob("*/session.safetensors"))
    other = Session.load(tmp_path / "film.safetensors")
    assert torch.equal(session.history, other.history) and session.settings == other.settings


def test_the_page_takes_no_more_memory_than_the_command_line(random_model, picture, tmp_path, monkeypatch):
    config, peaks = load_config(random_model), []

    def counted(runner, *given):
        with Peak("cpu") as peak:
            steps(runner, *given)
        peaks.append(peak.most)

    steps = Runner._do
    monkeypatch.setattr(Runner, "_do", counted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "page"))  # where no text is known yet
    pool = ModelPool({config.name: config}, "cpu")
    studio, runner = Studio(pool, FilmStore(tmp_path / "films", 600, 30)), Runner(pool)
    settings = FilmSettings.for_model(config, WISH["actions"], "a hill", seed=3, preset="fast")
    run = runner.submit(studio.begin(picture, 161, settings))
    while not run.is_over:
        time.sleep(0.1)
    runner.close()
    world = infworld.load(config, "cpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "alone"))
    with Peak("cpu") as alone:
        for _ in world.extend(world.start(picture, settings), 2):
            pass
    assert run.job.film.num_frames == 161 and peaks[0] <= 1.05 * alone.most
