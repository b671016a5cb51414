"""The page's working parts without a browser: films, jobs, the border to a GPU process, and what a server lets out."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import dataclasses
import io
import multiprocessing
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
import weakref
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import yaml
from gpu_border import other_process
from imageio_ffmpeg import count_frames_and_secs
from PIL import Image

import infworld
from infworld import models
from infworld.actions import ActionScript
from infworld.app import compute, model_pool, server, status
from infworld.app import page as app
from infworld.app.compute import Opening, Replay, Report, gpu_seconds
from infworld.app.films import Film, FilmStore
from infworld.app.gallery import find_examples
from infworld.app.memory_check import coverage_strip, covered_frames, memory_check, verdict
from infworld.app.model_pool import ModelPool, SingleModelPool
from infworld.app.player import film_value
from infworld.app.runner import Ended, Job, Loading, NewChunk, Runner, RunProgress, Update, Waiting
from infworld.app.studio import Studio
from infworld.app.sweeper import Sweeper
from infworld.camera import revisits, walk
from infworld.config import load_config
from infworld.memory_plan import NotEnoughMemory
from infworld.presets import PRESETS, find_preset
from infworld.progress import Progress
from infworld.session import Session
from infworld.settings import MAX_PROMPT, MAX_STEPS, FilmSettings
from infworld.video import read_mp4
from infworld.world import Chunk, World

PATIENCE = 120  # seconds; the machine may be busy
SETTINGS = FilmSettings(ActionScript.parse("forward 80, right 80"), "a hill", "", 3, 2, 1.0, "exact")


@pytest.fixture
def store(tmp_path) -> FilmStore:
    return FilmStore(tmp_path / "films", lifetime=60, fps=30)


@pytest.fixture
def studio(world, store) -> Studio:
    return Studio(SingleModelPool(world), store)


@pytest.fixture
def runner(studio):
    runner = Runner(studio.models)
    yield runner
    runner.close()


async def listen(run) -> list[Update]:
    return [update async for update in run.updates()]


def make(runner: Runner, job: Job) -> list[Update]:
    """Does a job; what is told. Raises what it ends with."""
    updates = asyncio.run(listen(runner.submit(job)))
    assert isinstance(updates[-1], Ended) and not any(isinstance(update, Ended) for update in updates[:-1])
    if updates[-1].error:
        raise updates[-1].error
    news = [update for update, last in zip(updates, [None, *updates], strict=False) if update is not last]
    return [update for update in news[:-1] if not isinstance(update, Waiting)]


def new_film(runner: Runner, studio: Studio, picture, frames: int = 161, settings: FilmSettings = SETTINGS) -> Film:
    job = studio.begin(picture, frames, settings)
    make(runner, job)
    return job.film


def stop_when(runner: Runner, job: Job, condition) -> Ended:
    """Does a job until an update is so, and closes its updates then; how it ended."""

    async def watch(run) -> None:
        async with contextlib.aclosing(run.updates()) as updates:
            async for update in updates:
                if condition(update):
                    return

    run = runner.submit(job)
    asyncio.run(watch(run))
    return asyncio.run(listen(run))[-1]


# --------------------------------------------------------------------------------------------------------------- jobs


def test_a_run_makes_what_the_world_makes(runner, studio, picture, world):
    film = new_film(runner, studio, picture)
    expected = list(world.rollout(picture, SETTINGS.actions, SETTINGS.prompt, num_frames=161, seed=3))
    assert film.num_frames == 161
    assert np.array_equal(film.session().history, expected[-1].session.history)
    joined = read_mp4(film.finish()["film"])
    assert len(joined) == 161
    frames = np.concatenate([chunk.frames for chunk in expected])
    assert np.corrcoef(joined[..., 1].ravel(), frames[..., 1].ravel())[0, 1] > 0.9


def test_a_run_tells_each_step_and_each_piece(runner, studio, picture):
    news = make(runner, studio.begin(picture, 161, SETTINGS))
    assert [item.index for item in news if isinstance(item, NewChunk)] == [0, 1]
    making = [item for item in news if isinstance(item, RunProgress)]
    steps = [(item.chunk, item.report.progress.step) for item in making if item.report.progress.stage == "sample"]
    assert steps == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(item.report.memory > 2**20 and item.report.device == "CPU" for item in making)
    assert [item.frames for item in making if item.chunk == 2][0] == 80


def test_going_on_is_the_same_as_a_longer_film(runner, studio, picture):
    script = ActionScript.parse("forward 80, right 80, up 40, back 40")
    settings = dataclasses.replace(SETTINGS, actions=script)
    long = new_film(runner, studio, picture, 241, settings)
    short = new_film(runner, studio, picture, 81, settings)
    make(runner, studio.go_on(short, 2, settings))
    assert short.num_frames == long.num_frames == 241
    assert np.array_equal(short.session().history, long.session().history)


def test_going_on_takes_new_settings_but_keeps_what_was_done(runner, studio, picture):
    film = new_film(runner, studio, picture, 81)
    script = ActionScript.parse("left 100, down 60")
    settings = dataclasses.replace(SETTINGS, actions=script, prompt="night", steps=1, seed=9)
    make(runner, studio.go_on(film, 1, settings))
    settings = film.session().settings
    assert settings.actions.text() == "forward 80, left 20, down 60"
    assert (settings.prompt, settings.steps, settings.seed) == ("night", 1, 3)


def test_redo_changes_the_last_chunk_only(runner, studio, picture):
    film = new_film(runner, studio, picture, 161)
    before, pieces = film.session(), film.pieces()
    make(runner, studio.redo(film, dataclasses.replace(SETTINGS, seed=99)))
    after = film.session()
    assert film.num_frames == before.num_frames == after.num_frames == 161 and after.settings.seed == 99
    assert film.pieces()[0] == pieces[0] and film.pieces()[1] != pieces[1]
    assert np.array_equal(before.history[:, :, :21], after.history[:, :, :21])
    assert not np.array_equal(before.history[:, :, 21:], after.history[:, :, 21:])
    make(runner, studio.redo(film, SETTINGS))  # any number of times
    make(runner, studio.go_on(film, 1, SETTINGS))
    assert film.num_frames == 241


def test_a_stopped_run_keeps_its_chunks_and_goes_on(runner, studio, picture):
    job = studio.begin(picture, 401, SETTINGS)
    film, threads = job.film, threading.active_count()
    ended = stop_when(runner, job, lambda news: isinstance(news, RunProgress) and news.chunk == 3)
    assert ended == Ended(stopped=True) and threading.active_count() == threads
    assert film.num_frames == film.session().num_frames == 161
    make(runner, studio.go_on(film, 3, SETTINGS))
    assert np.array_equal(film.session().history, new_film(runner, studio, picture, 401).session().history)


def test_a_film_stopped_in_its_first_chunk_can_go_on(runner, studio, picture):
    job = studio.begin(picture, 81, SETTINGS)
    assert stop_when(runner, job, lambda news: isinstance(news, RunProgress)).stopped
    assert job.film.num_frames == 0
    make(runner, studio.go_on(job.film, 1, SETTINGS))
    assert job.film.num_frames == 81


def test_a_stop_in_the_last_stage_keeps_and_counts_the_chunk(runner, studio, picture, monkeypatch, world):
    encode, job = world.vae.encode, studio.begin(picture, 401, SETTINGS)

    def stopping(video, state, **kwargs):
        if state is not None:
            runner.run_of(job.film).cancel()
        return encode(video, state, **kwargs)

    monkeypatch.setattr(world.vae, "encode", stopping)
    updates = asyncio.run(listen(runner.submit(job)))  # also where it stands, again and again
    assert [update for update in updates if isinstance(update, (NewChunk, Ended))] == [NewChunk(0), Ended(stopped=True)]
    assert job.film.num_frames == job.film.session().num_frames == 81


def test_an_error_in_the_middle_keeps_the_film(runner, studio, picture, monkeypatch, world):
    iterate_chunk, calls = world.iterate_chunk, []

    def breaks(session):
        calls.append(session)
        if len(calls) == 3:
            raise RuntimeError("GPU task aborted")
        return iterate_chunk(session)

    monkeypatch.setattr(world, "iterate_chunk", breaks)
    job = studio.begin(picture, 241, SETTINGS)
    with pytest.raises(RuntimeError, match="aborted"):
        make(runner, job)
    assert job.film.num_frames == job.film.session().num_frames == 161


def test_a_session_file_brings_the_film_back(runner, studio, picture, tmp_path):
    film = new_film(runner, studio, picture, 161)
    copy = tmp_path / "download.safetensors"
    copy.write_bytes(film.finish()["session"].read_bytes())
    film.remove()
    job, session = studio.resume(copy)
    make(runner, job)
    again = job.film
    assert again.num_frames == session.num_frames == 161 and not again.can_redo
    make(runner, studio.go_on(again, 1, session.settings))
    assert np.array_equal(again.session().history, new_film(runner, studio, picture, 241).session().history)


def test_a_resumed_film_that_was_stopped_is_shown_in_full_when_it_goes_on(runner, studio, picture):
    job, session = studio.resume(new_film(runner, studio, picture, 241).session_path)
    stop_when(runner, job, lambda news: isinstance(news, NewChunk))
    assert job.film.num_frames < 241
    make(runner, studio.go_on(job.film, 1, session.settings))
    assert [piece.index for piece in job.film.pieces()] == [0, 1, 2, 3]


def test_a_film_of_shorter_chunks_is_resumed_and_goes_on(runner, studio, picture, world, tmp_path):
    (short,) = world.extend(world.start(picture, SETTINGS), 1, frames=40)
    short.session.save(tmp_path / "short.safetensors")
    job, session = studio.resume(tmp_path / "short.safetensors")
    make(runner, job)
    news = make(runner, studio.go_on(job.film, 2, session.settings))
    assert [piece.frames for piece in job.film.pieces()] == [41, 80, 80] and job.film.num_frames == 201
    assert [item.frames for item in news if isinstance(item, RunProgress)][-1] == 80


@pytest.mark.parametrize(
    "when", ["before its frames", "after its frames", "made again", "made again, after its frames"]
)
def test_a_chunk_that_was_computed_when_the_server_was_killed_is_used(runner, studio, picture, world, when):
    again = "again" in when
    film, whole = new_film(runner, studio, picture, 161 if again else 81), new_film(runner, studio, picture, 241)
    chunk = world.next_chunk(film.previous().with_seed(7) if again else film.session())
    film._keep(chunk.session, film._next)
    if "after" in when:
        film.add_frames(chunk)
    make(runner, studio.go_on(film, 1, SETTINGS))
    assert [piece.index for piece in film.pieces()] == [0, 1, 2] and film.num_frames == 241
    assert np.array_equal(film.session().history[:, :, :41], chunk.session.history) and not film._next.exists()
    frames = read_mp4(film.finish()["film"])[81:161]
    assert np.corrcoef(frames[..., 1].ravel(), chunk.frames[..., 1].ravel())[0, 1] > 0.9
    assert again or np.array_equal(film.session().history, whole.session().history)


def test_finished_chunks_can_be_downloaded_while_the_next_is_made(page, picture):
    updates = shown(page, page.begin, None, str(picture), 241, "small", *PAGE_SETTINGS)
    links = [update[page.downloads] for update in updates[1:-1] if page.downloads in update]
    assert len(links) == 3 and all("session.safetensors" in link and ".mp4" in link for link in links)


# ----------------------------------------------------------------------------------------------------------- the queue


@pytest.fixture
def held(world, monkeypatch):
    """The second step of every chunk waits until the event is set; at most one chunk may be computed at a time."""
    go, iterate_chunk, busy = threading.Event(), world.iterate_chunk, threading.Lock()

    def slow(session):
        assert busy.acquire(blocking=False), "two films at once"
        try:
            for number, result in enumerate(iterate_chunk(session)):
                if number == 1:
                    assert go.wait(PATIENCE)
                yield result
        finally:
            busy.release()

    monkeypatch.setattr(world, "iterate_chunk", slow)
    yield go
    go.set()


def until(condition, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_runs_wait_for_each_other_and_know_their_place(runner, studio, picture, held):
    jobs = [studio.begin(picture, 81, SETTINGS) for _ in range(3)]
    runs = [runner.submit(job) for job in jobs]
    assert asyncio.run(first_update(runs[2])) == Waiting(2, None)
    assert asyncio.run(first_update(runs[1])) == Waiting(1, None)
    held.set()
    for run in runs:
        until(lambda run=run: run.is_over)
    assert [job.film.num_frames for job in jobs] == [81, 0, 0]  # whoever read only the first update closed the others


async def first_update(run) -> Update:
    async with contextlib.aclosing(run.updates()) as updates:
        return await anext(updates)


def test_after_a_film_the_wait_is_estimated(runner, studio, picture, held):
    held.set()
    new_film(runner, studio, picture, 81)
    held.clear()
    runner.submit(studio.begin(picture, 161, SETTINGS))
    place = asyncio.run(first_update(runner.submit(studio.begin(picture, 81, SETTINGS))))
    assert place.place == 1 and 0 < place.seconds < 60


def test_a_cancelled_run_that_waits_is_over_at_once_and_leaves_nothing(runner, studio, picture, held):
    first = runner.submit(studio.begin(picture, 81, SETTINGS))
    job = studio.begin(picture, 81, SETTINGS)
    run = runner.submit(job)
    run.cancel()
    assert run.is_over and not first.is_over and not job.film.folder.exists()


def test_the_next_run_begins_when_the_cancelled_one_has_ended(runner, studio, picture, held):
    run = runner.submit(studio.begin(picture, 81, SETTINGS))
    until(lambda: run._updates)
    run.cancel()
    assert not run.is_over  # it is in its step
    following = runner.submit(studio.begin(picture, 81, SETTINGS))
    time.sleep(0.2)
    assert not following._updates and not run.is_over
    held.set()
    assert asyncio.run(listen(following))[-1] == Ended() and asyncio.run(listen(run))[-1] == Ended(stopped=True)


def test_the_queue_has_an_end_and_a_film_one_run(studio, picture, held):
    runner = Runner(studio.models, max_waiting=2)
    jobs = [studio.begin(picture, 81, SETTINGS) for _ in range(4)]
    runs = [runner.submit(jobs[0])]
    until(lambda: runs[0]._updates)
    runs += [runner.submit(job) for job in jobs[1:3]]
    with pytest.raises(ValueError, match="2 films are waiting already"):
        runner.submit(jobs[3])
    with pytest.raises(ValueError, match="being made already"):
        runner.submit(studio.go_on(jobs[0].film, 1, SETTINGS))
    held.set()
    runner.close()
    assert all(run.is_over for run in runs)


# --------------------------------------------------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"prompt": None}, "prompt"),
        ({"seed": 2**63}, "seed"),
        ({"steps": 0}, "steps"),
        ({"steps": MAX_STEPS + 1}, "steps"),
        ({"guidance": float("nan")}, "guidance"),
        ({"preset": "turbo"}, "preset"),
        ({"prompt": "x" * (MAX_PROMPT + 1)}, "characters"),
    ],
)
def test_settings_that_no_page_sends_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **change)


def test_bad_beginnings_leave_no_folder(studio, picture, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for image, frames in ((tmp_path / "text.png", 81), (picture, 0), (picture, 100), (picture, 10**9)):
        with pytest.raises(ValueError):
            studio.begin(image, frames, SETTINGS)
    assert os.listdir(studio.store.root) == []


def test_bad_session_files_leave_no_folder(runner, studio, picture, tmp_path):
    session = new_film(runner, studio, picture, 81).session()
    (tmp_path / "text.safetensors").write_text("no session")
    dataclasses.replace(session, model="other").save(tmp_path / "other.safetensors")
    wrong = copy.copy(session.settings)
    object.__setattr__(wrong, "steps", 10**6)
    dataclasses.replace(session, settings=wrong).save(tmp_path / "steps.safetensors")
    dataclasses.replace(session, num_frames=10**6 + 1).save(tmp_path / "frames.safetensors")
    films = os.listdir(studio.store.root)
    for name, message in (("text", "text"), ("other", "other"), ("steps", "steps"), ("frames", "damaged")):
        with pytest.raises(ValueError, match=message):
            studio.resume(tmp_path / f"{name}.safetensors")
    assert os.listdir(studio.store.root) == films


def test_what_is_gone_is_said(runner, studio, picture):
    film = studio.begin(picture, 81, SETTINGS).film
    with pytest.raises(ValueError, match="no last chunk"):
        studio.redo(film, SETTINGS)
    with pytest.raises(ValueError, match="has expired"):
        studio.go_on(film, 1, SETTINGS)
    with pytest.raises(ValueError, match="at most"):
        studio.go_on(new_film(runner, studio, picture, 81), 1000, SETTINGS)


# -------------------------------------------------------------------------------------------------------------- films


def begun(store: FilmStore) -> Film:
    film = store.new()
    film.folder.mkdir()
    return film


def test_films_go_when_they_have_expired(store):
    old, new = begun(store), begun(store)
    (old.folder / "actions.json").write_text("[]")
    (store.root / "something else").mkdir()
    for path in (old.folder, old.folder / "actions.json"):
        os.utime(path, (time.time() - 61,) * 2)
    assert store.sweep() == 1
    assert not old.folder.exists() and new.folder.exists() and (store.root / "something else").exists()


def test_a_film_has_no_folder_before_it_begins(runner, studio, picture):
    job = studio.begin(picture, 81, SETTINGS)
    assert os.listdir(studio.store.root) == []
    make(runner, job)
    assert job.film.num_frames == 81


def test_the_sweeper_sweeps_by_itself(tmp_path):
    store = FilmStore(tmp_path / "films", lifetime=0.5, fps=30)
    film = begun(store)
    sweeper = Sweeper(store, tmp_path / "uploads", 60)
    sweeper.start()
    until(lambda: not film.folder.exists(), 10)
    sweeper.stop()


def test_films_have_names_that_cannot_be_guessed(tmp_path):
    store = FilmStore(tmp_path, lifetime=60, fps=30)
    names = {store.new().folder.name for _ in range(20)}
    assert len(names) == 20 and all(len(name) >= 29 for name in names)


def test_films_have_the_frame_rate_of_their_model(world, picture, tmp_path):
    rollout = dataclasses.replace(world.config.validation_data, fps=12)
    slow = copy.copy(world)
    slow.config = dataclasses.replace(world.config, validation_data=rollout)
    models = SingleModelPool(slow)
    studio, runner = Studio(models, FilmStore(tmp_path / "films", 60, fps=12)), Runner(models)
    film = new_film(runner, studio, picture, 161)
    runner.close()
    for path in (film.finish()["film"], film.pieces()[1].path):
        frames, seconds = count_frames_and_secs(str(path))
        assert seconds == pytest.approx(frames / 12, abs=0.01)
    assert film_value(film)["fps"] == 12
    page = app.Page(studio, runner)
    page.blocks()
    assert "161 frames: 13.4 seconds" in page.settle(film, Ended())[page.status]


def test_single_frames_are_those_of_the_film(runner, studio, picture):
    film = new_film(runner, studio, picture, 161)
    whole = read_mp4(film.finish()["film"])
    frames = film.frames([0, 80, 81, 160])
    assert sorted(frames) == [0, 80, 81, 160]
    assert all(np.array_equal(frame, whole[index]) for index, frame in frames.items())


# ---------------------------------------------------------------------------------------------- the border to the GPU


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ZeroGPU forks")
def test_a_film_is_the_same_across_a_process_border(world, picture, tmp_path, monkeypatch, studio, runner):
    asked = []

    def gpu(duration):
        def decorate(function):
            call = other_process(function)

            def wrapped(task):
                asked.append(duration(task))
                return call(task)

            return wrapped

        return decorate

    monkeypatch.setattr(compute.spaces, "GPU", gpu)
    models = SingleModelPool(world)
    apart, there = Studio(models, FilmStore(tmp_path / "apart", lifetime=60, fps=30)), Runner(models)
    film = new_film(there, apart, picture, 161)
    assert np.array_equal(film.session().history, new_film(runner, studio, picture, 161).session().history)
    again, _ = apart.resume(film.session_path)
    make(there, again)
    there.close()
    assert again.film.num_frames == 161
    assert len(asked) == 3 and all(isinstance(seconds, int) and seconds > 0 for seconds in asked)  # one call a chunk


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ZeroGPU forks")
def test_a_gpu_call_sees_the_request_it_is_for_and_stops_after_its_step(
    world, picture, tmp_path, monkeypatch, serve_models
):
    """Whose quota a call takes is read from the request's context, though another thread makes the call."""
    from gradio.context import LocalContext
    from gradio_client import Client, handle_file

    callers, steps = [], multiprocessing.Value("i", 0)
    iterate_chunk = world.iterate_chunk

    def counted(session):
        for result in iterate_chunk(session):
            steps.value += 1
            time.sleep(0.3)
            yield result

    def gpu(duration):
        def decorate(function):
            call = other_process(function)

            def wrapped(task):
                callers.append(LocalContext.request.get().session_hash)
                yield from call(task)

            return wrapped

        return decorate

    monkeypatch.setattr(compute.spaces, "GPU", gpu)
    monkeypatch.setattr(world, "iterate_chunk", counted)
    address = serve_models(SingleModelPool(world), tmp_path / "films")
    clients = [Client(address, verbose=False) for _ in range(2)]
    jobs = [client.submit(handle_file(picture), "", 81, 0, "", api_name="/film") for client in clients]
    assert [len(read_mp4(job.result())) for job in jobs] == [81, 81]
    assert sorted(callers) == sorted(client.session_hash for client in clients)
    before = steps.value
    job = clients[0].submit(handle_file(picture), "", 4001, 0, "", api_name="/film")
    until(lambda: steps.value > before)
    job.cancel()
    time.sleep(1)
    stopped = steps.value
    time.sleep(1)
    assert steps.value == stopped < before + 8


def test_tasks_and_results_can_be_pickled(world, picture):
    run = compute.on_gpu(world)(Opening(np.zeros((32, 48, 3), np.uint8), SETTINGS))
    for result in run:
        assert isinstance(pickle.loads(pickle.dumps(result)), (Session, Report, Chunk))


def test_gpu_time_grows_with_steps_guidance_and_chunks(world, picture, monkeypatch):
    session = world.start(picture)
    monkeypatch.setattr(compute, "MIN_SECONDS", 0)
    monkeypatch.setattr(compute, "MAX_SECONDS", 1e12)
    monkeypatch.setattr(compute, "STEP_SECONDS", 1e9)  # so that a small model's seconds are not all rounded up to 1
    monkeypatch.setattr(compute, "FRAMES_SECONDS", 1e9)
    kinds = [dataclasses.replace(SETTINGS, steps=2), dataclasses.replace(SETTINGS, steps=20)]
    kinds.append(dataclasses.replace(SETTINGS, steps=20, guidance=5.0))
    few, many, guided = (gpu_seconds(session.with_settings(settings), world) for settings in kinds)
    assert 0 < few < many < guided
    longer = dataclasses.replace(session, chunk_latents=(None,) * 8)
    assert gpu_seconds(Replay(session), world) < gpu_seconds(Replay(longer), world)
    assert gpu_seconds(Opening(session.picture[0], SETTINGS), world) == few


# ------------------------------------------------------------------------------------------------------ words, examples


def progress(step, remaining=None, seconds=0.0):
    return Progress(1, 1, "sample", step, 8, 1, 81, seconds, remaining)


def test_time_left_counts_the_chunks_to_come():
    first = RunProgress("small", 1, 4, 0, 6.0, 0, Report(progress(4, remaining=4.0, seconds=6.0), "CPU", 2**30))
    assert first.remaining == pytest.approx(4 + 3 * 10)
    third = RunProgress("small", 3, 4, 160, 22.0, 0, Report(progress(1, remaining=8.0, seconds=2.0), "CPU", 2**30))
    assert third.remaining == pytest.approx(8 + 10)
    assert RunProgress("small", 1, 4, 0, 1.0, 0, Report(progress(0), "CPU", 0)).remaining is None
    assert 0 < first.share < 0.25 < third.share < 0.75


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (7260, "2 h 1 min")]
)
def test_durations_in_words(seconds, words):
    assert status.duration(seconds) == words


def test_what_a_person_wrote_is_not_read_as_html():
    assert "<b>" not in status.message("<b>", "<b>") + status.ended("<b>", 3, 30)


def test_examples_are_pictures_with_actions(tmp_path, picture):
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.png").write_bytes(picture.read_bytes())
    (tmp_path / "one.json").write_text(ActionScript.parse("forward 3").to_json())
    (tmp_path / "two.json").write_text(ActionScript.parse("right 5").to_json())
    (tmp_path / "two.txt").write_text("a lake\n")
    (tmp_path / "10-a-photograph.jpg").write_bytes(picture.read_bytes())
    (tmp_path / "10-a-photograph.json").write_text(ActionScript.parse("left 5").to_json())
    (tmp_path / "9-a-lake.png").write_bytes(picture.read_bytes())
    (tmp_path / "9-a-lake.json").write_text(ActionScript.parse("left 5").to_json())
    one, two, *numbered = find_examples(tmp_path)
    assert [example.title for example in numbered] == ["A lake", "A photograph"]
    assert (one.picture.name, one.actions.text(), one.prompt) == ("one.png", "forward 3", "")
    assert (two.actions.text(), two.prompt) == ("right 5", "a lake")


# ------------------------------------------------------------------------------------------------------------ handlers


@pytest.fixture
def page(studio, runner):
    """The page with all its parts, without a server."""
    page = app.Page(studio, runner)
    page.blocks()
    return page


def shown(page, begin, *values) -> list:
    """What a filming event of the page yields."""

    async def collect():
        return [update async for update in page.filming(begin)(*values)]

    return asyncio.run(collect())


PAGE_SETTINGS = [{"segments": [[0, 4, 160]]}, "night", "fog", 5, False, 2, 1.0, "exact"]


def test_a_quota_error_leaves_the_film_and_continue(page, runner, studio, picture, monkeypatch, world):
    """On ZeroGPU a call may be refused or cut off: the film so far plays, and can be continued later."""
    iterate_chunk, calls = world.iterate_chunk, []

    def refused(session):
        calls.append(session)
        if len(calls) > 2:
            raise app.gr.Error("You have exceeded your free GPU quota", title="ZeroGPU quota exceeded")
        return iterate_chunk(session)

    monkeypatch.setattr(world, "iterate_chunk", refused)
    first, *_, settled = shown(page, page.begin, None, str(picture), 401, "small", *PAGE_SETTINGS)
    film = first[page.film]
    assert "161 frames" in settled[page.status] and "exceeded your free GPU quota" in settled[page.status]
    assert settled[page.more]["interactive"] and settled[page.generate]["interactive"]
    assert len(read_mp4(settled[page.player]["complete"])) == 161
    assert settled[page.play]["over"] and "exceeded" in settled[page.play]["says"]
    monkeypatch.undo()
    make(runner, studio.go_on(film, 1, SETTINGS))
    assert film.num_frames == 241


def test_too_little_memory_is_said_and_the_page_goes_on(page, picture, monkeypatch, world):
    def full(session):
        raise NotEnoughMemory("there is too little GPU memory for a chunk")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(world, "iterate_chunk", full)
        *_, settled = shown(page, page.begin, None, str(picture), 81, "small", *PAGE_SETTINGS)
    assert "There is too little GPU memory" in settled[page.status]
    *_, settled = shown(page, page.begin, None, str(picture), 81, "small", *PAGE_SETTINGS)
    assert "81 frames" in settled[page.status]


def test_before_the_first_chunk_only_generate_is_offered(page, studio, picture):
    film = studio.begin(picture, 81, SETTINGS).film  # stopped while it waited for its turn
    settled = page.settle(film, Ended(stopped=True))
    assert not settled[page.more]["interactive"] and not settled[page.redo]["interactive"]
    assert page.player not in settled and "no film yet" in settled[page.status]


def test_a_closed_event_cancels_its_run_wherever_it_is(page, runner, picture, held, monkeypatch):
    """Gradio closes the generator of a page that is gone: after its first update, or a later one."""
    monkeypatch.setattr("infworld.app.page.LINGER", 0)

    async def close_after(number: int):
        updates = page.filming(page.begin)(None, str(picture), 81, "small", *PAGE_SETTINGS)
        for _ in range(number):
            last = await anext(updates)
        film = last.get(page.film)
        await updates.aclose()  # which does not wait for the step
        return film

    film = asyncio.run(close_after(1))
    asyncio.run(close_after(3))
    held.set()
    until(lambda: runner.run_of(film) is None and not runner._queue and not runner._current)
    assert film.num_frames == 0


def test_negative_prompt_and_guidance_are_for_models_that_use_them(world, studio, runner, monkeypatch):
    def visible(scale):
        sampler = dataclasses.replace(world.config.val_scheduler_cfg, text_cfg_scale=scale)
        config = dataclasses.replace(world.config, val_scheduler_cfg=sampler, negative_prompt="fog")
        monkeypatch.setattr(studio.models, "config", lambda name: config)
        page = app.Page(studio, runner)
        page.blocks()
        return page.negative_prompt.visible, page.guidance.visible

    assert visible(1.0) == (False, False)
    assert visible(5.0) == (True, True)


def test_uploads_may_be_as_large_as_a_session(runner, studio, picture, world):
    film = new_film(runner, studio, picture, 161)
    size = film.session_path.stat().st_size - 2 * 2**10
    assert server.UPLOAD_ROOM + size < server.upload_limit(world.config) < server.UPLOAD_ROOM * 2


def test_a_missing_model_is_named_at_the_start(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["app.py", "--model", "gone.yaml"])
    with pytest.raises(SystemExit, match="2"):
        server.main()
    assert "gone.yaml" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- more than one model


@pytest.fixture(scope="module")
def two_configs(small_model, tmp_path_factory) -> dict:
    """The small model, and one that differs in name, picture, guidance, steps and preset."""
    other = yaml.safe_load(small_model.read_text()) | {"name": "other", "buckets": [[64, 64]], "negative_prompt": "fog"}
    other["val_scheduler_cfg"] = {"shift": 3.0, "num_sampling_steps": 3, "text_cfg_scale": 4.0, "preset": "fast"}
    for part, key in (("vae_cfg", "vae_pth"), ("text_encoder_cfg", "checkpoint_path")):
        other[part] = other[part] | {key: str(small_model.parent / other[part][key])}
    other["checkpoint_path"] = str(small_model.parent / other["checkpoint_path"])
    path = tmp_path_factory.mktemp("other") / "other.yaml"
    path.write_text(yaml.safe_dump(other))
    return {"small": load_config(small_model), "other": load_config(path)}


@pytest.fixture
def loaded(monkeypatch) -> list:
    """Names of the models in the order they are loaded; each must be gone when the next one comes."""
    names, alive, load = [], [], infworld.load

    def counted(config, device, **placement):
        assert all(world() is None for world in alive), "two models at once"
        world = load(config, device)
        names.append(config.name)
        alive.append(weakref.ref(world))
        return world

    monkeypatch.setattr(model_pool.infworld, "load", counted)
    return names


@pytest.fixture
def two(two_configs, tmp_path, loaded) -> Studio:
    return Studio(ModelPool(two_configs, "cpu"), FilmStore(tmp_path / "films", lifetime=60, fps=30))


@pytest.fixture
def two_runner(two):
    runner = Runner(two.models)
    yield runner
    runner.close()


@pytest.fixture
def two_page(two, two_runner):
    page = app.Page(two, two_runner)
    page.blocks()
    return page


def test_the_first_model_is_loaded_at_once_and_the_other_when_it_is_needed_alone(two, two_runner, picture, loaded):
    assert two.models.names == ["small", "other"] and loaded == ["small"]
    job = two.begin(picture, 81, SETTINGS, "other")
    news = make(two_runner, job)
    assert news[0] == Loading("other") and loaded == ["small", "other"]
    assert job.film.session().model == "other" and job.film.session().history.shape[-2:] == (8, 8)
    assert {item.model for item in news if isinstance(item, RunProgress)} == {"other"}
    job = two.begin(picture, 81, SETTINGS)
    assert make(two_runner, job)[0] == Loading("small") and job.film.session().model == "small"
    make(two_runner, two.redo(job.film, SETTINGS))
    assert loaded == ["small", "other", "small"]


def test_another_model_is_loaded_after_the_film_that_is_being_made(two, two_runner, picture, loaded, monkeypatch):
    """Loading is work of the one thread, even where the film before it has been cancelled."""
    go, iterate_chunk = threading.Event(), World.iterate_chunk

    def slow(world, session):
        for result in iterate_chunk(world, session):
            assert go.wait(PATIENCE)
            yield result

    monkeypatch.setattr(World, "iterate_chunk", slow)
    run = two_runner.submit(two.begin(picture, 81, SETTINGS))
    until(lambda: run.job.film.session_path.exists())
    run.cancel()
    following = two_runner.submit(two.begin(picture, 81, SETTINGS, "other"))
    time.sleep(0.3)
    assert loaded == ["small"] and not following._updates
    go.set()
    assert asyncio.run(listen(following))[-1] == Ended() and run.job.film.num_frames == 0


def test_a_film_goes_on_with_the_model_that_began_it(two, two_runner, two_page, picture):
    settings = dataclasses.replace(SETTINGS, steps=3, guidance=4.0, negative_prompt="fog")
    page, film = two_page, new_film(two_runner, two, picture, 81)
    chosen = [{"segments": [[0, 4, 160]]}, "night", "fog", 5, False, 3, 4.0, "fast"]  # as set for the other model
    make(two_runner, page.go_on(film, 1, "other", *chosen).job)
    session = film.session()
    assert (session.model, session.num_frames, session.settings.prompt) == ("small", 161, "night")
    assert (session.settings.steps, session.settings.guidance, session.settings.negative_prompt) == (2, 1.0, "")
    assert session.settings.preset == "exact"
    again = page.make_again(film, "small", *chosen).job
    assert (again.model, again.settings.steps, again.settings.guidance) == ("small", 3, 4.0)  # chosen for this one
    assert again.settings.preset == "fast"
    played_on = page.play_on(film, "other", *chosen[1:])
    assert (played_on.model, played_on.settings.steps) == ("small", 2)
    assert page.begin(None, picture, 81, "other", *chosen).job.model == "other"
    assert app.for_film(settings, session, "small") == settings


def test_choosing_a_model_brings_its_own_settings_and_says_what_runs(two, two_page, picture):
    page = two_page
    assert page.model.visible and "small" in page.running.value and "CPU" in page.running.value
    chosen = page.choose_model("other")
    assert "other" in chosen[page.running] and "CPU" in chosen[page.running] and chosen[page.steps] == 3
    assert (page.preset.value, chosen[page.preset]["value"]) == ("exact", "fast")
    assert chosen[page.guidance] == {"value": 4.0, "visible": True, "__type__": "update"}
    assert chosen[page.negative_prompt]["value"] == "fog" and chosen[page.negative_prompt]["visible"]
    assert not page.choose_model("small")[page.guidance]["visible"]
    shown = {name: page.choose(picture, None, name)[page.play]["frame"] for name in two.models.names}
    pictures = {name: Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))) for name, data in shown.items()}
    assert {name: found.size for name, found in pictures.items()} == {"small": (48, 32), "other": (64, 64)}
    with pytest.raises(app.gr.Error, match="'huge' is not here: there is small and other"):
        page.choose_model("huge")


def test_a_choice_of_speed_brings_its_steps_and_says_what_it_saves(two_page):
    page = two_page
    labels = [label for label, _ in app.speeds(load_config("infinite-world"))]
    assert labels == ["Exact", "Balanced, 2.0x as fast", "Fast, 5.0x as fast"]
    for preset in PRESETS:
        assert page.choose_speed(preset, "small") == {page.steps: 2}
    with pytest.raises(app.gr.Error, match="Unknown preset 'turbo'"):
        page.choose_speed("turbo", "small")


def test_a_single_model_is_no_choice_and_is_named(page):
    assert not page.model.visible and "small" in page.running.value


def test_a_session_brings_its_model_back(two, two_runner, two_page, picture):
    page, job = (
        two_page,
        two.begin(picture, 81, dataclasses.replace(SETTINGS, guidance=2.0, preset="balanced"), "other"),
    )
    make(two_runner, job)
    resumed = page.resume(None, job.film.session_path)
    assert resumed.job.model == "other" and resumed.job.settings is None
    resumed = resumed.update
    assert resumed[page.preset]["value"] == "balanced" == job.film.session().settings.preset
    assert resumed[page.model] == "other" and resumed[page.seed] == 3
    assert resumed[page.guidance]["value"] == 2.0 and resumed[page.guidance]["visible"] and resumed[page.steps] == 2


def test_a_model_that_cannot_be_loaded_ends_the_run_and_not_the_page(two_page, picture, monkeypatch, loaded):
    def broken(config, device, **placement):
        raise ValueError("world.safetensors is truncated")

    page = two_page
    with monkeypatch.context() as patch:
        patch.setattr(model_pool.infworld, "load", broken)
        *_, settled = shown(page, page.begin, None, str(picture), 81, "other", *PAGE_SETTINGS)
    assert "World.safetensors is truncated" in settled[page.status]
    *_, settled = shown(page, page.begin, None, str(picture), 81, "small", *PAGE_SETTINGS)
    assert "81 frames" in settled[page.status]


def test_only_models_of_the_same_lengths_are_offered_together(two_configs, loaded):
    rollout = dataclasses.replace(two_configs["other"].validation_data, num_frames=41)
    shorter = dataclasses.replace(two_configs["other"], validation_data=rollout)
    assert ModelPool({"small": two_configs["small"], "other": shorter}, "cpu").names == ["small"]


def test_zero_gpu_has_one_model_with_its_text_encoder_on_the_gpu(two_configs, world, monkeypatch):
    asked = []
    monkeypatch.setattr(model_pool, "ON_ZERO_GPU", True)
    monkeypatch.setattr(model_pool.infworld, "load", lambda *args, **kwargs: asked.append(kwargs) or world)
    assert ModelPool(two_configs, "cpu").names == ["small"]
    assert asked == [{"text_placement": "gpu", "team": None}]


def test_programs_may_name_a_model(serve_models, two_configs, picture, tmp_path):
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    client = Client(serve_models(ModelPool(two_configs, "cpu"), tmp_path / "films"), verbose=False)

    def film(model):
        return read_mp4(client.predict(handle_file(picture), "", 81, 0, "", model, api_name="/film"))

    assert film("other").shape == (81, 64, 64, 3) and film("").shape == film("small").shape == (81, 32, 48, 3)
    with pytest.raises(AppError, match="(?i)the model 'huge' is not here"):
        film("huge")


@pytest.mark.parametrize(
    ("argument", "variable", "best", "expected"),
    [
        (None, None, "tiny", ["tiny", "infinite-world"]),
        (None, None, "infinite-world", ["infinite-world", "tiny"]),
        (None, "tiny", "infinite-world", ["tiny", "infinite-world"]),
        ("tiny", "infinite-world", "infinite-world", ["tiny", "infinite-world"]),
        ("other.yaml", None, "tiny", ["other", "infinite-world", "tiny"]),
    ],
)
def test_the_model_is_the_one_asked_for_else_the_best(
    two_configs, world, monkeypatch, argument, variable, best, expected
):
    known = {name: dataclasses.replace(two_configs["small"], name=name) for name in ("infinite-world", "tiny")}
    served = []
    monkeypatch.setattr("sys.argv", ["app.py", *(["--model", argument] if argument else [])])
    monkeypatch.setattr(models, "fits", lambda device: best == "infinite-world")
    monkeypatch.setattr(models.hub, "find", lambda config: known[config.name])
    monkeypatch.setattr(server, "prepare", lambda name: known.get(name) or two_configs["other"])
    monkeypatch.setattr(model_pool.infworld, "load", lambda config, *args, **kwargs: world)
    monkeypatch.setattr(server, "serve", lambda pools, **launching: served.extend(pools[0].names))
    if variable:
        monkeypatch.setenv("INFWORLD_MODEL", variable)
    server.main()
    assert served == expected


# ------------------------------------------------------------------------------------------------------ as on a Space


class DeviceService(BaseHTTPRequestHandler):
    """What a ZeroGPU Space asks for devices; it lends none."""

    def do_POST(self):
        self.server.asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


def page_of(environment: dict[str, str], log: Path) -> str:
    """The page of `python app.py` in this environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "app.py", "--port", str(port)]
    environment = os.environ | {"SPACE_ID": "person/space", "GRADIO_ANALYTICS_ENABLED": "0"} | environment
    with (
        log.open("wb") as output,
        subprocess.Popen(command, cwd=app.PROJECT_ROOT, env=environment, stderr=output) as process,
    ):
        try:
            for _ in range(240):
                time.sleep(0.5)
                assert process.poll() is None, log.read_text()
                with contextlib.suppress(httpx.TransportError):
                    return httpx.get(f"http://127.0.0.1:{port}/", timeout=30).text
            raise AssertionError(log.read_text())
        finally:
            process.kill()


def test_the_page_starts_on_a_cpu_space(tmp_path):
    text = page_of({"CUDA_VISIBLE_DEVICES": ""}, tmp_path / "log")
    assert re.search(r"Runs .{1,20}tiny.{1,60}CPU", text)


@pytest.mark.skipif(torch.version.cuda is None, reason="ZeroGPU needs a build of torch for CUDA")
def test_the_page_starts_on_zero_gpu_with_all_weights_packed_for_the_gpu(tmp_path, random_model):
    """`spaces` makes believe that there is a GPU, and at the launch packs what is on it, to lend it to each call."""
    with ThreadingHTTPServer(("127.0.0.1", 0), DeviceService) as service:
        service.asked = []
        threading.Thread(target=service.serve_forever, daemon=True).start()
        environment = {
            "SPACES_ZERO_GPU": "true",
            "SPACES_ZERO_DEVICE_API_URL": f"http://127.0.0.1:{service.server_port}",
            "ZEROGPU_OFFLOAD_DIR": str(tmp_path / "packed"),
            "INFWORLD_MODEL": str(random_model),
        }
        text = page_of(environment, tmp_path / "log")
        service.shutdown()
    assert re.search(r"Runs .{1,20}small-umt5-random.{1,60}NVIDIA", text)
    assert service.asked == ["/startup-report"]
    folder = random_model.parent / "models"
    weights = sum(path.stat().st_size for path in folder.glob("*.pth"))  # float32 and bfloat16, as they are used
    packed = sum(path.stat().st_size for path in (tmp_path / "packed").rglob("*") if path.is_file())
    assert packed > 0.9 * weights


# ---------------------------------------------------------------------------------------------------------- the server


def test_the_page_is_there(address):
    assert "Infinite-World" in httpx.get(address).text


def test_only_films_can_be_read(address, films, tmp_path):
    (films / "film-x").mkdir()
    (films / "film-x" / "a.txt").write_text("film")
    (tmp_path / "secret.txt").write_text("secret")

    def get(path):
        return httpx.get(f"{address}gradio_api/file={path}")

    assert get(films / "film-x" / "a.txt").text == "film"
    for path in ("/etc/passwd", tmp_path / "secret.txt", app.__file__, films / ".." / tmp_path.name / "secret.txt"):
        assert get(path).status_code in (403, 404), path
    assert get(films).status_code in (403, 404)  # no listing


# ------------------------------------------------------------------------------------------------- doors for programs


@pytest.fixture(scope="module")
def client(address):
    from gradio_client import Client

    return Client(address, verbose=False)


def test_a_program_gets_a_film(client, picture, world):
    from gradio_client import handle_file

    job = client.submit(handle_file(picture), "forward 80, right 80", 161, 5, "a hill", api_name="/film")
    film = read_mp4(job.result())
    expected = world.rollout(picture, "forward 80, right 80", "a hill", num_frames=161, seed=5)
    frames = np.concatenate([chunk.frames for chunk in expected])
    assert film.shape == frames.shape
    assert np.corrcoef(film[..., 1].ravel(), frames[..., 1].ravel())[0, 1] > 0.9


def test_actions_from_a_program_may_be_json(client, picture):
    from gradio_client import handle_file

    script = ActionScript.parse("left 12").to_json()
    assert len(read_mp4(client.predict(handle_file(picture), script, 81, 0, "", api_name="/film"))) == 81


def test_a_preset_from_a_program_brings_its_steps(client, picture, world, monkeypatch):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    started, start = [], World.start
    monkeypatch.setattr(World, "start", lambda world, image, asked: started.append(asked) or start(world, image, asked))
    client.predict(handle_file(picture), "", 81, 0, "", "", "fast", api_name="/film")
    assert started[0].preset == "fast"
    assert started[0].steps == find_preset("fast").sampler_steps(world.config.val_scheduler_cfg)
    with pytest.raises(AppError, match="(?i)hasty"):
        client.predict(handle_file(picture), "", 81, 0, "", "", "hasty", api_name="/film")


@pytest.mark.parametrize(
    ("actions", "frames", "seed", "message"),
    [
        ("fly 80", 81, 0, "unknown action 'fly'"),
        ("actions.json", 81, 0, "cannot read 'actions.json'"),
        ('{"move": 3}', 81, 0, "must be a list"),
        ('[{"move": "fly", "view": "no-op"}]', 81, 0, "unknown move 'fly'"),
        ("", 0, 0, "at least 81"),
        ("", 100, 0, "81 or 161"),
        ("", -81, 0, "at least 81"),
        ("", 10**7, 0, "at most"),
        ("", 81, -1, "seed"),
    ],
)
def test_programs_are_told_what_is_wrong(client, picture, actions, frames, seed, message):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match=f"(?i){message}"):
        client.predict(handle_file(picture), actions, frames, seed, "", api_name="/film")


def test_a_wrong_picture_from_a_program_is_named(client, tmp_path):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    (tmp_path / "notes.png").write_text("no picture")
    with pytest.raises(AppError, match=r"notes\.png.*not a picture"):
        client.predict(handle_file(tmp_path / "notes.png"), "", 81, 0, "", api_name="/film")


def test_nothing_else_is_shown_to_programs(client):
    endpoints = client.view_api(return_format="dict", print_info=False)
    assert list(endpoints["named_endpoints"]) == ["/film"] and not endpoints["unnamed_endpoints"]


def test_a_picture_on_the_server_cannot_be_named(address, picture):
    file = {"path": str(picture), "meta": {"_type": "gradio.FileData"}}
    asked = httpx.post(f"{address}gradio_api/call/film", json={"data": [file, "", 81, 0, "", "", "exact"]})
    answer = httpx.get(f"{address}gradio_api/call/film/{asked.json()['event_id']}", timeout=60).text
    assert "event: error" in answer and "event: complete" not in answer


def test_the_same_door_is_an_mcp_tool(address, picture):
    pytest.importorskip("mcp")
    import asyncio

    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def use():
        async with (
            streamablehttp_client(f"{address}gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            (tool,) = (await session.list_tools()).tools
            data = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
            arguments = {"image": data, "actions": "right 80", "frames": 81}
            return tool, await session.call_tool(tool.name, arguments)

    tool, result = asyncio.run(use())
    assert "Films a walk" in tool.description and set(tool.inputSchema["properties"]) >= {"image", "actions", "frames"}
    assert not result.isError and ".mp4" in result.content[0].text


# ------------------------------------------------------------------------------------------------------ walk and memory


def test_a_walk_goes_where_the_actions_say():
    def end(text):
        return walk(ActionScript.parse(text), 1 + len(ActionScript.parse(text)))[-1]

    assert end("forward 50") == pytest.approx([0, 2, 0, 0])
    assert end("strafe right 50") == pytest.approx([2, 0, 0, 0])
    assert end("right 80, forward 50") == pytest.approx([2, 0, 90, 0])
    assert end("left 80, back 50") == pytest.approx([2, 0, -90, 0])
    assert end("forward+strafe left 50")[:2] == pytest.approx([-(2**0.5), 2**0.5])
    assert end("up 100")[3] == 22.5
    assert end("forward 80, right 80, forward 80, right 80, forward 80, right 80, forward 80")[:2] == pytest.approx(
        [0, 0]
    )


def test_the_way_back_undoes_the_way_there():
    poses = walk(ActionScript.parse("forward+left 70, up+strafe right 20, down+strafe left 20, back+right 70"), 181)
    assert poses[180] == pytest.approx(poses[0], abs=1e-9)
    assert np.allclose(poses, poses[::-1])


@pytest.mark.parametrize(
    ("text", "some"), [("right 80, left 80", True), ("right 320", True), ("forward 160", False), ("wait 160", False),
                       ("right 20, left 20", False), ("forward 80, back 80", True)],
)  # fmt: skip
def test_revisits_are_views_that_were_left(text, some):
    script = ActionScript.parse(text)
    poses = walk(script, 1 + len(script))
    found = revisits(poses)
    assert bool(found) == some and len(found) <= 6
    for first, away, again in found:
        assert first < away < again
        turn = abs((poses[first, 2] - poses[again, 2] + 180) % 360 - 180)
        assert turn < 6 and np.hypot(*(poses[first] - poses[again])[:2]) < 0.2


@pytest.mark.parametrize("latents", [1, 21, 80, 81, 121, 321, 1001])
def test_coverage_is_what_the_compressor_reads(latents):
    from infworld.memory import WINDOW, window_starts

    *windows, last = covered_frames(latents)
    frames = 4 * (latents - 1) + 1
    assert len(windows) == len(window_starts(latents)) and last == (max(0, frames - 4), frames - 1)
    for (first, end), start in zip(windows, window_starts(latents), strict=True):
        assert 0 <= first <= end < frames and first <= 4 * start
        assert latents <= 80 or end == 4 * (start + WINDOW - 1)
    assert "left out" not in coverage_strip(61) and "left out" in coverage_strip(1001)


@pytest.mark.parametrize(
    ("decibels", "chance", "share", "word"),
    [(24.0, 12.0, 1.0, "the same view"), (20.0, 12.0, 0.8, "the same view"), (17.0, 12.0, 0.5, "partly the same"),
     (12.5, 12.0, 0.05, "not recognised"), (9.0, 12.0, 0.0, "not recognised"), (40.0, 30.0, 0.0, "cannot be told")],
)  # fmt: skip
def test_a_likeness_is_said_in_words_between_chance_and_good(decibels, chance, share, word):
    got, said = verdict(decibels, chance)
    assert got == pytest.approx(share) and said.startswith(word)


def test_the_memory_check_shows_first_look_and_return(runner, studio, picture):
    settings = dataclasses.replace(SETTINGS, actions=ActionScript.parse("right 80, left 80"))
    shown = memory_check(new_film(runner, studio, picture, 161, settings))
    assert shown.count("<img") == 12 and "frame 160" in shown and "PSNR" in shown and "is chance" in shown
    assert "never comes back" in memory_check(new_film(runner, studio, picture, 81))
