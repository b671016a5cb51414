"""Several processes make one film: the same as one process makes, and none is left behind when one is lost."""

import asyncio
import dataclasses
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from PIL import Image
from servers import free_port

import infworld
from infworld import parallel
from infworld.actions import ActionScript
from infworld.app.compute import Opening, Replay, Report, Walk, follow, leading
from infworld.app.films import FilmStore
from infworld.app.model_pool import SingleModelPool
from infworld.app.runner import Ended, Job, Runner, RunProgress
from infworld.app.steering import Steering, SteeringFile
from infworld.cli import generate
from infworld.cli.console import INTERRUPTED
from infworld.memory_plan import NotEnoughMemory
from infworld.session import Session
from infworld.settings import FilmSettings
from infworld.video import read_mp4
from infworld.world import Chunk, World

pytestmark = pytest.mark.skipif(os.name == "nt", reason="torchrun's signals are POSIX")

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["infworld.cli.generate", "infworld.app.runner"])
SIZES = (3, 4)
PATIENCE = 400  # seconds; the machine may be busy
CLOSE = {"latents": 1e-5, "history": 1e-4, "frames": 1.01 / 255}  # relative error in float32; frames: one level


def start(size: int, target, *given) -> list:
    """Starts `target(*given)` in processes that find themselves as torchrun would have started them."""
    port = free_port()
    processes = [FORK.Process(target=as_rank, args=(rank, size, port, target, given)) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def as_rank(rank: int, size: int, port: int, target, given) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1"} | {name: str(number) for name, number in names.items()})
    target(*given)


def in_a_team(size: int, model: Path, work, given) -> list:
    """What `work` (of a World and `given`) returns in each process of a team."""
    results = FORK.Queue()
    processes = start(size, work_in_a_team, model, work, pickle.dumps(given), results)
    found = dict(results.get(timeout=PATIENCE) for _ in processes)
    for process in processes:
        process.join(timeout=PATIENCE)
    assert [process.exitcode for process in processes] == [0] * size
    return [pickle.loads(found[rank]) for rank in range(size)]


def work_in_a_team(model: Path, work, given: bytes, results) -> None:
    """Tensors go in and out pickled, as torch would share their memory, which ends with its process."""
    with parallel.join_team(torch.device("cpu")) as team:
        result = work(infworld.load(model, team=team), pickle.loads(given))
        results.put((parallel.rank(), pickle.dumps(result)))


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


# -------------------------------------------------------------------------------------------------------- the same film


def film(world: World, given) -> list[tuple[str, torch.Tensor]]:
    """A chunk with guidance, one more without, one after a long history, and the film once more: numbers by kind."""
    picture, long_history = given
    guided = next(world.rollout(picture, "forward 100, left 50", "a meadow", num_frames=161, seed=3, guidance=3.0))
    plain = world.next_chunk(guided.session.replace_settings(guidance=1.0))
    faster = world.next_chunk(long_history.replace_settings(preset="balanced"))
    long = world.next_chunk(long_history)
    found = [("latents", chunk.latents) for chunk in (guided, plain, faster, long)]
    found += [("history", chunk.session.history) for chunk in (plain, long)]
    found += [("history", tail) for _, tail in sorted(plain.session.encoder_state.items())]
    films = [guided, plain, *world.replay(plain.session)]
    return [*found, *(("frames", torch.from_numpy(chunk.frames).float()) for chunk in films)]


@pytest.fixture(scope="module")
def given(world, picture):
    """A picture, and a session whose history is long enough for the compressor's windows."""
    begun = world.start(picture, "right 300", seed=4, guidance=2.0)
    latents = torch.randn(1, 16, 101, 4, 6, generator=torch.Generator().manual_seed(0))
    chunks = tuple(torch.zeros(1, 16, 21, 4, 6, dtype=torch.float16) for _ in range(5))
    return picture, dataclasses.replace(begun, history=latents, chunk_latents=chunks, num_frames=401)


@pytest.fixture(scope="module")
def alone(world, given):
    return film(world, given)


@pytest.mark.parametrize("size", SIZES)
def test_a_team_makes_the_film_of_one_process(small_model, given, alone, size):
    """4: branches apart, halves of each; 3: tokens, heads, rows and windows in unequal parts."""
    for (kind, theirs), *ours in zip(alone, *in_a_team(size, small_model, film, given), strict=True):
        assert all(torch.equal(tensor, ours[0][1]) for _, tensor in ours)  # all ranks go on from the same numbers
        assert error(ours[0][1], theirs) < CLOSE[kind]


@pytest.mark.parametrize(("total", "parts", "expected"), [(12, 5, [3, 3, 2, 2, 2]), (2, 3, [1, 1, 0]), (6, 2, [3, 3])])
def test_shares_are_as_even_as_can_be(total, parts, expected):
    assert parallel.shares(total, parts) == expected


def test_one_process_is_no_team():
    with parallel.join_team(torch.device("cpu")) as team:
        assert team is None


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="3 processes, but 2 GPUs: use --nproc-per-node 2"):
        parallel.device_of_rank("auto")
    assert parallel.device_of_rank("cpu") == "cpu"


# -------------------------------------------------------------------------------------------------------- out of memory


def out_of_memory(world: World, given) -> list[torch.Tensor]:
    """At each of these places a rank runs out of memory, twice; what the team makes of the film in spite of that."""
    picture, places = given
    settings = FilmSettings.for_model(world.config, "forward 100, left 50", "a meadow", seed=3, guidance=3.0)
    for rank, place in places:
        if place == "start":
            with failing(world, place, rank), pytest.raises(NotEnoughMemory, match="too little GPU memory"):
                world.start(picture, settings)
    first = world.next_chunk(world.start(picture, settings))
    for rank, place in [found for found in places if found[1] != "start"] * 2:
        heard = []
        with (
            failing(world, place, rank),
            pytest.raises(NotEnoughMemory, match="what was filmed before is kept"),
        ):
            world.next_chunk(first.session, heard.append)
        assert all(progress.chunk == 1 for progress in heard)
    second = world.next_chunk(first.session)
    return [first.latents, second.latents, second.session.history]


@contextmanager
def failing(world: World, place: str, rank: int):
    """Within it this rank has too little memory at this place, once."""
    owner, name, at = {
        "start": (world, "encode", 1),
        "text": (world, "_encode_texts", 1),
        "sample": (world.transformer, "denoise", 2),
        "decode": (world.vae, "decode", 1),
        "frames": (world, "encode", 1),
    }[place]
    whole, calls = getattr(owner, name), []

    def fails(*args, **kwargs):
        calls.append(name)
        if parallel.rank() == rank and len(calls) == at:
            large = torch.zeros(1000)
            raise torch.OutOfMemoryError(f"out of memory beside {len(large)} numbers")
        return whole(*args, **kwargs)

    setattr(owner, name, fails)
    yield
    setattr(owner, name, whole)


@pytest.mark.parametrize(
    ("size", "places"),
    [(2, [(0, "sample"), (1, "decode"), (0, "text")]), (3, [(1, "start"), (2, "sample"), (2, "frames")])],
    ids=["2", "3"],
)
def test_a_team_works_on_after_running_out_of_memory_on_one_rank(small_model, world, picture, size, places):
    ours, *others = in_a_team(size, small_model, out_of_memory, (picture, places))
    begun = world.start(picture, "forward 100, left 50", "a meadow", seed=3, guidance=3.0)
    first, second = world.extend(begun, 2)
    assert all(torch.equal(a, b) for other in others for a, b in zip(other, ours, strict=True))
    for mine, theirs in zip(ours, (first.latents, second.latents, second.session.history), strict=True):
        assert error(mine, theirs) < CLOSE["history"]


# ----------------------------------------------------------------------------------------------- from the command line


@pytest.fixture
def filming(small_model, picture, tmp_path):
    """Starts generate.py in processes for a long film: filming(size) -> processes, when two chunks have been saved."""
    arguments = ["--image", picture, "--model", small_model, "--frames", 1281, "--guidance", 3, "--steps", 2]
    arguments += ["--out", tmp_path / "film.mp4"]
    processes = []

    def begin(size: int) -> list:
        processes.extend(start(size, generate_quietly, [str(argument) for argument in arguments], tmp_path))
        deadline = time.monotonic() + PATIENCE
        while frames_saved(tmp_path) < 161:
            assert time.monotonic() < deadline and all(process.is_alive() for process in processes), said(tmp_path)
            time.sleep(0.05)
        return processes

    yield begin
    for process in processes:
        process.kill()


def generate_quietly(arguments: list[str], folder: Path) -> None:
    sys.stdout = sys.stderr = (folder / f"said{parallel.rank()}").open("w", buffering=1)
    sys.exit(generate.main(arguments))


def frames_saved(folder: Path) -> int:
    path = folder / "film.session.safetensors"
    return Session.load(path).num_frames if path.exists() else 0


def said(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("said*")))


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_all_and_the_film_goes_on_from_its_session(filming, world, picture, tmp_path, lost):
    processes = filming(2)
    processes[lost].kill()
    for process in processes:
        process.join(timeout=PATIENCE)
    assert processes[1 - lost].exitcode == parallel.LOST
    saved = Session.load(tmp_path / "film.session.safetensors")
    team = "torchrun --nproc-per-node 2 -m infworld generate"
    advice = f"go on with: {team} --resume {tmp_path / 'film.session.safetensors'} --frames 1281"
    assert f"error: rank {lost} was lost" in said(tmp_path) and advice in said(tmp_path)
    whole = world.extend(world.start(picture, seed=0, steps=2, guidance=3.0), 2)
    *_, second = whole
    assert error(saved.chunk_latents[1].float(), second.latents) < 1e-3  # which are kept in float16
    assert world.next_chunk(saved).frames.shape == (80, 32, 48, 3)


def test_ctrl_c_ends_all_after_a_step_and_keeps_film_and_session(filming, tmp_path):
    processes = filming(2)
    for process in processes:
        os.kill(process.pid, signal.SIGINT)
    for process in processes:
        process.join(timeout=PATIENCE)
    assert [process.exitcode for process in processes] == [INTERRUPTED, 0]
    assert len(read_mp4(tmp_path / "film.mp4")) == frames_saved(tmp_path) >= 161
    assert "stopped: " in said(tmp_path) and "go on with: torchrun " in said(tmp_path)


@pytest.mark.parametrize("as_lines", [False, True])
def test_each_process_makes_its_share_of_many_films(small_model, picture, tmp_path, monkeypatch, capsys, as_lines):
    names = ["a", "b", "c"]
    jobs = [{"image": str(picture), "out": str(tmp_path / f"{name}.mp4"), "seed": i} for i, name in enumerate(names)]
    jobs[2]["image"] = "gone.png"
    text = "\n".join(map(json.dumps, jobs)) if as_lines else json.dumps(jobs, indent=1)
    (tmp_path / "jobs").write_text(text)
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = signal.getsignal(signal.SIGTERM)
    codes = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        codes.append(generate.main(["--jobs", str(tmp_path / "jobs"), "--model", str(small_model), "--frames", "81"]))
        assert (tmp_path / "b.mp4").exists() == (rank == "1")
    signal.signal(signal.SIGTERM, before)
    assert codes == [2, 0] and "c.mp4: no picture at" in capsys.readouterr().err
    films = [read_mp4(tmp_path / f"{name}.mp4") for name in "ab"]
    assert [len(film) for film in films] == [81, 81] and not np.array_equal(*films)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{]", "neither a JSON list"),
        ("[3]", "job 1 must be an object"),
        ('{"image": "a.png", "out": "a.mp4", "model": "tiny"}', "job 1 must be an object with actions, chunk_frames"),
        ('[{"image": "a.png"}]', "job 1 needs out"),
        ('[{"image": "a.png", "resume": "a.safetensors", "out": "a.mp4"}]', "job 1 needs out, and image or resume"),
    ],
)
def test_wrong_lists_of_films_are_named(tmp_path, capsys, text, message):
    (tmp_path / "jobs").write_text(text)
    assert generate.main(["--jobs", str(tmp_path / "jobs")]) == 2
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- the page


def page(world: World, picture: np.ndarray) -> list[torch.Tensor] | None:
    """Rank 0: films that are stopped at a step, at the first session, while shown, and one that is not."""
    if not world.team.is_rank0:
        return follow(world.team, lambda name: world)
    compute = leading(world)
    settings = FilmSettings(ActionScript.of("forward 80"), "", "", 5, 3, 2.0, "exact")
    scene = Opening(picture, settings)
    stopped_at_once = compute(scene)
    assert isinstance(next(stopped_at_once), Session)
    stopped_at_once.close()
    stopped = compute(scene)
    assert isinstance(list(zip(range(5), stopped, strict=False))[-1][1], Report)
    stopped.close()
    *_, first = compute(scene)
    *_, second = compute(first.session)  # of which the others are sent nothing but that
    shown = compute(Replay(second.session))
    next(shown)
    shown.close()
    *_, changed = compute(first.session.with_prompt("a desert").with_seed(6))
    with TemporaryDirectory() as folder:
        file = SteeringFile(Path(folder) / "steering.json")
        file.write(Steering(1, move=1, shown=1000, at=time.monotonic()))
        walk = compute(Walk(scene, file.path))
        walked = list(itertools.islice((result for result in walk if isinstance(result, Chunk)), 2))
        walk.close()
        store, runner = FilmStore(folder, 60, 30), Runner(SingleModelPool(world))
        cancelled, whole = (Job(store.new(), world.config.name, 2, settings, picture) for _ in range(2))
        ended = asyncio.run(cancel_the_first(runner, cancelled, whole))
        runner.close()
        assert ended == [Ended(stopped=True), Ended()]
        assert torch.equal(whole.film.session().chunk_latents[1], second.session.chunk_latents[1])
    assert len(walked) == 2 and walked[1].session.num_frames == 17
    return [chunk.latents for chunk in (first, second, changed, walked[0])]


async def cancel_the_first(runner: Runner, *jobs: Job) -> list[Ended]:
    """How the jobs end, of which the first is cancelled at its first step."""
    ended = []
    for run in [runner.submit(job) for job in jobs]:
        async for update in run.updates():
            if isinstance(update, RunProgress) and not ended:
                run.cancel()
        ended.append(update)
    return ended


def test_a_visitors_stop_leaves_the_processes_of_the_page_together(small_model, world):
    picture = np.array(Image.new("RGB", (48, 32), "teal"))
    ours, _ = in_a_team(2, small_model, page, picture)
    begun = world.start(picture, "forward 80", negative_prompt="", seed=5, steps=3, guidance=2.0)
    first, second = world.extend(begun, 2)
    changed = world.next_chunk(first.session.with_prompt("a desert").with_seed(6))
    walked = world.next_chunk(begun, frames=8)
    for mine, chunk in zip(ours, (first, second, changed, walked), strict=True):
        assert error(mine, chunk.latents) < CLOSE["latents"]
