"""Which model runs: those on this machine, what is downloaded, and the default. Above `hub`."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from tqdm import tqdm

from infworld import hub
from infworld.config import MODELS, ModelConfig, load_config
from infworld.devices import pick_device

log = logging.getLogger(__name__)

RELEASED, SMALL = "infinite-world", "tiny"
# GPU memory in bytes from which the released model is the default: cards sold as 24 GB.
FITTING = 22 * 2**30
FITTING_CAPABILITY = (8, 0)  # from here on GPUs compute in bfloat16


def default_model(device: str = "auto") -> str:
    """INFWORLD_MODEL; else the released model where its weights are here and a GPU that it fits on; else the small one.

    Raises ValueError for an unavailable device.
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

    Raises FileNotFoundError or ValueError for an invalid config, HubError for a failed download.
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
