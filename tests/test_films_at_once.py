"""A page on several devices: a film on each at the same time, from one queue, each as it would be alone."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import threading
import time
from contextlib import aclosing

import numpy as np
import pytest
import torch
from page_client import PageClient

from infworld.actions import ActionScript
from infworld.app import server
from infworld.app.films import FilmStore
from infworld.app.model_pool import ModelPool, SingleModelPool
from infworld.app.runner import Ended, Loading, NewChunk, Run, Runner, Update, Waiting
from infworld.app.studio import Studio
from infworld.config import load_config
from infworld.settings import FilmSettings
from infworld.video import read_mp4

SETTINGS = FilmSettings(ActionScript.parse("forward 80, right 80"), "a hill", "", 3, 2, 1.0, "exact")


class Device:
    """A device on which every chunk waits, after its first step, until `go` is set."""

    def __init__(self, world):
        self.world, self.go, self.films = copy.copy(world), threading.Event(), 0
        iterate_chunk = world.iterate_chunk

        def held(session):
            assert not self.films, "two films at once"
            self.films += 1
            try:
                for result in iterate_chunk(session):
                    yield result
                    assert self.go.wait(60)
            finally:
                self.films -= 1

        self.world.iterate_chunk = held


@pytest.fixture
def devices(world):
    devices = [Device(world), Device(world)]
    yield devices
    for device in devices:
        device.go.set()


@pytest.fixture
def runner(devices):
    runner = Runner(*(SingleModelPool(device.world) for device in devices))
    yield runner
    for device in devices:
        device.go.set()
    runner.close()


@pytest.fixture
def studio(world, tmp_path) -> Studio:
    return Studio(SingleModelPool(world), FilmStore(tmp_path / "films", lifetime=60, fps=30))


def until(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ended(run: Run) -> Ended:
    async def last() -> Update:
        return [update async for update in run.updates()][-1]

    return asyncio.run(last())


def standing(runner: Runner, run: Run) -> Waiting:
    return runner._waiting_of(run)


def test_each_device_makes_a_film_and_all_are_as_if_made_alone(runner, studio, devices, picture, world):
    scripts = [ActionScript.parse(script) for script in ("forward 80, right 80", "left 160", "back 80, up 80")]
    settings = [FilmSettings(script, "a hill", "", seed, 2, 1.0, "exact") for seed, script in enumerate(scripts)]
    runs = [runner.submit(studio.begin(picture, 161, each)) for each in settings]
    until(lambda: all(device.films for device in devices))
    assert not runs[2]._updates and standing(runner, runs[2]).place == 1
    for device in devices:
        device.go.set()
    assert [ended(run) for run in runs] == [Ended()] * 3
    for run, each in zip(runs, settings, strict=True):
        *_, alone = world.rollout(picture, each.actions, each.prompt, num_frames=161, seed=each.seed)
        assert np.array_equal(run.job.film.session().history, alone.session.history)


def test_the_wait_is_for_the_device_that_is_free_first(runner, studio, devices, picture):
    runner._chunk_seconds["small"] = 10.0
    runs = [runner.submit(studio.begin(picture, 1 + 80 * chunks, SETTINGS)) for chunks in (4, 2)]
    until(lambda: all(device.films for device in devices))
    for run in runs:
        run._updates.clear()  # whose estimates are of these fast chunks
    runs += [runner.submit(studio.begin(picture, 1 + 80 * chunks, SETTINGS)) for chunks in (3, 1, 1)]
    waits = [standing(runner, run) for run in runs]
    # One device is busy for 40 s; the other for 20 s, and then for 30 with the third film.
    assert waits == [Waiting(0, 0), Waiting(0, 0), Waiting(1, 20), Waiting(2, 40), Waiting(3, 50)]
    del runner._chunk_seconds["small"]
    assert standing(runner, runs[3]) == Waiting(2, None)


def test_a_film_that_is_stopped_or_fails_leaves_the_others_alone(runner, studio, devices, picture):
    for device in devices:
        device.go.set()
    gone = studio.begin(picture, 81, SETTINGS)
    assert ended(runner.submit(gone)) == Ended()
    for device in devices:
        device.go.clear()
    runs = [runner.submit(studio.begin(picture, 161, SETTINGS)) for _ in range(2)]
    until(lambda: all(device.films for device in devices))
    broken = runner.submit(studio.go_on(gone.film, 1, SETTINGS))
    gone.film.remove()
    following = runner.submit(studio.begin(picture, 81, SETTINGS))
    runs[0].cancel()
    for device in devices:
        device.go.set()
    assert ended(runs[0]) == Ended(stopped=True) and ended(runs[1]) == ended(following) == Ended()
    assert "expired" in str(ended(broken).error) and runs[1].job.film.num_frames == 161


def test_a_film_is_made_where_its_model_is_loaded(small_model, tmp_path, picture):
    config = load_config(small_model)
    configs = {name: dataclasses.replace(config, name=name) for name in ("small", "other")}
    pools = [ModelPool(configs, "cpu"), ModelPool(configs, "cpu")]
    studio, runner = Studio(pools[0], FilmStore(tmp_path / "films", 60, 30)), Runner(*pools)

    def make(model: str) -> list[Update]:
        async def updates(run: Run) -> list[Update]:
            async with aclosing(run.updates()) as told:
                return [update async for update in told]

        return asyncio.run(updates(runner.submit(studio.begin(picture, 81, SETTINGS, model))))

    try:
        assert Loading("other") in make("other")  # on one device: the other one keeps the first model
        for model in ("small", "other", "small", "other"):
            told = make(model)
            assert told[-1] == Ended() and Loading(model) not in told and any(isinstance(t, NewChunk) for t in told)
    finally:
        runner.close()


def test_two_visitors_of_a_page_are_served_at_once(serve_models, devices, tmp_path, picture):
    address = serve_models([SingleModelPool(device.world) for device in devices], tmp_path / "films")
    clients = [PageClient(address) for _ in range(3)]
    events = [client.start("generate", picture=client.upload(picture), frames=81) for client in clients[:2]]
    until(lambda: all(device.films for device in devices))
    events.append(clients[2].start("generate", picture=clients[2].upload(picture), frames=81))
    clients[2].wait_for(events[2], "1 film is made first")
    for device in devices:
        device.go.set()
    for client, event in zip(clients, events, strict=True):
        assert client.wait(event)["success"] and "81 frames" in client.said(event)
        client.close()
    films = list((tmp_path / "films").glob("*/film-*.mp4"))
    assert len(films) == 3 and all(len(read_mp4(film)) == 81 for film in films)


# ------------------------------------------------------------------------------------------------------------- the flag


@pytest.mark.parametrize(
    ("arguments", "variable", "devices"),
    [
        ([], None, ["cpu"]),
        (["--device", "cpu,cpu"], None, ["cpu", "cpu"]),
        ([], "cpu,cpu,cpu", ["cpu", "cpu", "cpu"]),
        (["--device", "cpu"], "cpu,cpu", ["cpu"]),
    ],
)
def test_the_devices_are_those_asked_for(small_model, monkeypatch, arguments, variable, devices):
    served = []
    monkeypatch.setattr("sys.argv", ["app.py", "--model", str(small_model), *arguments])
    monkeypatch.setattr(server, "serve", lambda pools, **launching: served.extend(pools))
    if variable:
        monkeypatch.setenv("INFWORLD_DEVICE", variable)
    server.main()
    assert [str(pool.device) for pool in served] == devices
    assert len({id(pool.world("small").transformer) for pool in served}) == len(devices)


def test_gpus_are_all_of_the_host(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert server.device_names("gpus") == ["cuda:0", "cuda:1", "cuda:2"]


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpus", "torch sees no GPU"), ("cpu,tpu", "tpu"), ("cuda:0,cpu", "cuda:0"), ("cpu,", "''")],
)
def test_devices_that_are_not_there_are_named(small_model, monkeypatch, capsys, device, message):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.setattr("sys.argv", ["app.py", "--model", str(small_model), "--device", device])
    with pytest.raises(SystemExit, match="2"):
        server.main()
    assert message in capsys.readouterr().err
