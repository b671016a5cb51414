"""Which model runs: those on this machine, what is downloaded, and the default. Above `hub`."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from infworld import hub
from infworld.config import MODELS, ModelConfig, load_config
from infworld.devices import pick_device
from infworld.lora import Lora, LoraChoice

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


def with_loras(config: ModelConfig, texts: Iterable[str]) -> ModelConfig:
    """The config with more LoRAs, as `lora_files` finds them. Raises the same errors."""
    return dataclasses.replace(config, loras=(*config.loras, *lora_files(texts)))


def lora_files(texts: Iterable[str]) -> list[str]:
    """LoRAs with whole paths, of each "FILE" or "USER/NAME" of the Hub, with ":weight" or not; downloads what is not
    here.

    Raises FileNotFoundError or ValueError for a file that is missing, damaged or no LoRA, HubError for a failed
    download.
    """
    choices = [LoraChoice.parse(text).found_by(_lora_file) for text in texts]
    for choice in choices:
        Lora.load(choice.source)
    return list(map(str, choices))


def _lora_file(source: str) -> Path:
    """Where a LoRA is, by its path or its repository on the Hub."""
    path = Path(source).expanduser().absolute()
    return hub.fetch_lora(source) if hub.is_repository(source) and not path.exists() else path


def available() -> dict[str, ModelConfig]:
    """The known models whose files are on this machine, by name."""
    found = {name: hub.find(load_config(name)) for name in MODELS}
    return {name: config for name, config in found.items() if config}
