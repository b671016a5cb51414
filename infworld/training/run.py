"""What both training programs run on: devices and ranks, precision, a log with curves."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from infworld.devices import pick_device
from infworld.parallel.control import end_process_group


def set_up_devices() -> tuple[int, int, torch.device]:
    """This process's rank, the number of ranks, its device; joins the process group under torchrun.

    Lets a GPU round matrix products to TF32 and choose convolutions by trial. That is for training only: what measures
    a model or films with it must not depend on who ran before.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device("auto")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    if ranks > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return rank, ranks, device


def leave_together(ranks: int) -> None:
    """Ends the process group once all ranks are here."""
    if ranks > 1:
        dist.barrier()
        end_process_group()


def from_rank_0(ranks: int, *values: float) -> tuple[float, ...]:
    """Rank 0's values on every rank. They go from CPU to CPU, so that no rank waits for its GPU."""
    if ranks == 1:
        return values
    shared = torch.tensor(values, dtype=torch.float64)
    dist.broadcast(shared, 0)
    return tuple(shared.tolist())


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """Layers in `compute_dtype` while their weights stay float32."""
    return torch.autocast(device.type, compute_dtype(device), enabled=device.type == "cuda")


def finish(device: torch.device) -> None:
    """Waits for what the GPU still has to do, so that a clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_gib(device: torch.device) -> float:
    """The most that tensors have taken of this process's GPU so far."""
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0


class Log:
    """JSON lines to the terminal and to `folder`/train.jsonl, and curves as `folder`/train.png; for rank 0 alone."""

    def __init__(self, folder: Path, began: float):
        """began: `time.monotonic()` of minute 0."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.began = folder, began
        self.reports: list[dict] = []

    def add(self, event: str, **values) -> None:
        """One line: the event, the minutes so far and the values, with 5 digits. Events "report" make the curves."""
        entry = {"event": event, "minutes": (time.monotonic() - self.began) / 60, **values}
        entry = {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in entry.items()}
        if event == "report":
            self.reports.append(entry)
        print(json.dumps(entry), flush=True)
        with (self.folder / "train.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def plot(self, along: str, *panels: Sequence[str], scale: str = "linear") -> None:
        """The curves: a panel for each group of reported values, over the value `along`; `scale` as matplotlib names
        it."""
        from matplotlib.figure import Figure  # only training needs it

        figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
        for axes, names in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for name in names:
                axes.plot([entry[along] for entry in self.reports], [entry[name] for entry in self.reports], label=name)
            axes.set(xlabel=along, yscale=scale)
            axes.legend()
        figure.savefig(self.folder / "train.png", dpi=120)
