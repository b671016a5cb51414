"""Several processes make one film: the same as one process makes, and none is left behind when one is lost."""

import dataclasses
import multiprocessing
import os
import pickle
import socket
from pathlib import Path

import pytest
import torch

import infworld
from infworld import parallel
from infworld.rollout import World

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["infworld.rollout", "infworld.parallel"])
SIZES = (2, 3, 4)
CLOSE = {"latents": 1e-5, "history": 1e-4, "frames": 1.01 / 255}  # relative error in float32; frames: one level


def rank_main(rank: int, size: int, port: int, model: Path, work, given: bytes, results) -> None:
    """One process of a team, as torchrun would start it."""
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(number) for name, number in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with parallel.joined(torch.device("cpu")) as team:
        result = work(infworld.load(model, team=team), pickle.loads(given))
    results.put((rank, pickle.dumps(result)))  # as torch would share its tensors' memory, which ends with the process


def in_a_team(size: int, model: Path, work, given) -> list:
    """What `work` (of a World and `given`) returns in each process of a team."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = FORK.Queue()
    processes = [
        FORK.Process(target=rank_main, args=(rank, size, port, model, work, pickle.dumps(given), results))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=30)
    assert [process.exitcode for process in processes] == [0] * size
    return [pickle.loads(found[rank]) for rank in range(size)]


def numbers(chunks) -> list[tuple[str, torch.Tensor]]:
    """All that is in chunks and in the last one's session, and what kind of numbers they are."""
    session = chunks[-1].session
    found = [("latents", chunk.latents) for chunk in chunks]
    found += [("frames", torch.from_numpy(chunk.frames).float()) for chunk in chunks]
    return [
        *found,
        ("history", session.history),
        *(("history", tail) for _, tail in sorted(session.encoder_state.items())),
    ]


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


# ------------------------------------------------------------------------------------------------------ the same film


def film(world: World, given) -> list[list[tuple[str, torch.Tensor]]]:
    """Two chunks with guidance, one without, one after a long history, and the film once more."""
    picture, long_history = given
    guided = list(world.rollout(picture, "forward 100, left 50", "a meadow", num_frames=161, seed=3, guidance=3.0))
    plain = [world.next_chunk(dataclasses.replace(guided[-1].session, guidance=1.0))]
    long = [world.next_chunk(long_history)]
    again = [("frames", torch.from_numpy(chunk.frames).float()) for chunk in world.replay(guided[-1].session)]
    return [numbers(guided), numbers(plain), numbers(long), again]


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
    for ranks in zip(alone, *in_a_team(size, small_model, film, given), strict=True):
        for (kind, theirs), *ours in zip(*ranks, strict=True):
            assert all(torch.equal(tensor, ours[0][1]) for _, tensor in ours)  # all go on from the same numbers
            assert error(ours[0][1], theirs) < CLOSE[kind]
