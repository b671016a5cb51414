"""Fine-tuning in two processes: their steps are those of one, whole models side by side or split ones."""

import dataclasses
import socket

import pytest
import torch
import torch.multiprocessing as mp
from test_finetune import FAST, make, small  # noqa: F401 (a fixture)
from torch.distributed.tensor import DTensor

from infworld.training.run import leave_together

STEPS = 3
RUNS = {"ddp": 0, "fsdp": 0, "fsdp of a LoRA": 2}  # the rank of each one's LoRA


def settings(lora_rank: int):
    return dataclasses.replace(FAST, batch=4, rank=lora_rank, parts=("self-attention",) if lora_rank else FAST.parts)


def train(rank: int, port: int, small) -> None:  # noqa: F811
    """What each of the two processes does; rank 0 writes down what came of it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name, lora_rank in RUNS.items():
        way = name.split()[0]
        training = make(small, settings(lora_rank), way)
        assert all(isinstance(parameter, DTensor) == (way == "fsdp") for parameter in training.trained.values())
        losses = [training.step() for _ in range(STEPS)]
        found = {"losses": losses, "state": training.state(), "gap": training.measure()["gap"]}
        if rank == 0:
            torch.save(found, small[0].source.parent / f"{name}.pt")
    leave_together(2)


@pytest.fixture(scope="module")
def trained(small):  # noqa: F811
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(train, (port, small), nprocs=2)
    return {name: torch.load(small[0].source.parent / f"{name}.pt", weights_only=True) for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(small, trained, name):  # noqa: F811
    found, alone = trained[name], make(small, settings(RUNS[name]))
    assert found["losses"] == pytest.approx([alone.step() for _ in range(STEPS)], rel=1e-4)
    assert found["gap"] == pytest.approx(alone.measure()["gap"], rel=1e-3)
    for parameter, expected in alone.trained.items():
        torch.testing.assert_close(found["state"]["trained"][parameter], expected.detach(), atol=2e-4, rtol=1e-3)
    resumed = make(small, settings(RUNS[name]))  # what two have begun one goes on with
    resumed.load_state(found["state"])
    assert resumed.step() == pytest.approx(alone.step(), rel=1e-3)
