"""Which model runs: what is on this machine, what is downloaded, what is taken when nobody chooses. Above `hub`."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from infworld import hub
from infworld.config import MODELS, ModelConfig, load_config
from infworld.rollout import pick_device

log = logging.getLogger(__name__)

RELEASED, SMALL = "infinite-world", "tiny"
# Bytes of a GPU that the released model fits on without being asked for: the cards that are sold as 24 GB.
FITTING = 22 * 2**30
FITTING_CAPABILITY = (8, 0)  # from here on GPUs compute in bfloat16


def default_model(device: str = "auto") -> str:
    """INFWORLD_MODEL; else the released model where its weights are here and a GPU that it fits on; else the small one.

    Raises ValueError for a device that is not there.
    """
    if chosen := os.environ.get("INFWORLD_MODEL"):
        return chosen
    return RELEASED if fits(pick_device(device)) and hub.find(load_config(RELEASED)) else SMALL


def fits(device: torch.device) -> bool:
    """Whether the released model runs well there: a GPU with bfloat16 and 24 GB."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FITTING_CAPABILITY:
        return False
    return torch.cuda.get_device_properties(device).total_memory >= FITTING


def prepare(name: str | Path) -> ModelConfig:
    """The config of a model, with all its files on this machine: found, or downloaded with a bar in the console.

    Raises FileNotFoundError or ValueError for a config that cannot be, HubError for a download that cannot be.
    """
    config = load_config(name)
    if found := hub.find(config):
        return found
    with tqdm(total=0, unit="B", unit_scale=True, disable=None) as bar:

        def progress(transfer: hub.Transfer) -> None:
            bar.total = transfer.total
            bar.set_description(transfer.file, refresh=False)
            bar.update(transfer.done - bar.n)

        return hub.fetch(config, progress)


def available() -> dict[str, ModelConfig]:
    """The known models whose files are on this machine, by name."""
    found = {name: hub.find(load_config(name)) for name in MODELS}
    return {name: config for name, config in found.items() if config}


def device_name(device: torch.device) -> str:
    """What a person calls it: "NVIDIA H100 80GB HBM3" or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def limit_memory(device: torch.device, gigabytes: float | None) -> None:
    """Lets this process have at most so many GB (10^9 bytes) of a GPU, by which it then plans; None: all that is free.

    ValueError for less than nothing, and for a CPU.
    """
    if gigabytes is None:
        return
    if device.type != "cuda" or not gigabytes > 0:
        raise ValueError(f"memory can be limited on a GPU, to more than 0 GB; not to {gigabytes:g} GB on {device.type}")
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total), device)


def peak_memory(device: torch.device) -> str:
    """The most memory that this process has held so far, in words. CPU memory counts files mapped from the disk."""
    gpu = f"GPU {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB, " if device.type == "cuda" else ""
    return f"{gpu}CPU {_peak_resident() / 1e9:.1f} GB"


def _peak_resident() -> int:
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # only where there is Unix

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
