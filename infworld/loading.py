"""From a model's name to a World on a device: files, dtypes, what stays on the GPU."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor

from infworld import hub, kernels
from infworld.checkpoint import RELEASED_EXTRAS, check_file, load_strict, read_tensors
from infworld.config import MODELS, ModelConfig, load_config
from infworld.devices import pick_device, pick_dtype, pick_threads, pick_vae_dtype
from infworld.dit import InfiniteWorldTransformer
from infworld.lora import LoraChoice, merge
from infworld.memory_plan import FASTEST, GB, MemoryEstimate, MemoryPlan, choose
from infworld.models import prepare
from infworld.text import free_memory, open_text_encoder
from infworld.vae import VideoVAE, build_vae
from infworld.world import World

if TYPE_CHECKING:
    from infworld.parallel import Team

log = logging.getLogger(__name__)


def load(
    name: str | Path | ModelConfig = "tiny",
    device: str = "auto",
    *,
    text_placement: str = "auto",
    team: Team | None = None,
) -> World:
    """Loads a model: "tiny", "infinite-world" (downloaded if missing), the path of a config YAML, or the config itself.

    device: "auto" (the GPU if there is one), "cuda", "cuda:1", "cpu". text_placement: where a large text encoder runs
    and whether it stays loaded: "auto", "gpu" or "cpu", see `UMT5OnDemand`. team: of `parallel.join_team`, to
    film together with other processes; its device is used. LoRAs that the config names (`models.with_loras`) are
    merged. What stays on a GPU is planned by its free memory (see `memory_plan`), except with text_placement "gpu",
    which keeps everything there. Raises FileNotFoundError or ValueError for missing, truncated or wrong weights, naming
    the file.
    """
    began = time.monotonic()
    if not isinstance(name, ModelConfig):
        name = prepare(name) if name in MODELS else load_config(name)
    config = hub.find(name) or name
    device = pick_device(device) if team is None else team.device
    dtype = pick_dtype(device, getattr(torch, config.amp_dtype))
    path = check_file(config.path(config.checkpoint_path))
    check_file(config.path(config.vae_cfg.vae_pth))  # what is missing is said before anything large is read
    text_encoder = None  # except on the device that encodes for all
    if team is None or team.is_rank0:  # before the transformer: the plan counts what it takes
        text_encoder = open_text_encoder(config, device, dtype, text_placement)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(pick_threads(torch.get_num_threads()))
    plan = make_plan(config, device, dtype, team) if device.type == "cuda" and text_placement != "gpu" else FASTEST
    transformer = load_strict(
        lambda: InfiniteWorldTransformer(config.model_cfg),
        read_transformer(config),
        where=path,
        device=device,
        dtype=dtype,
    )
    # Where all is packed for a GPU to come, none is here for a trial.
    if device.type == "cuda" and text_placement != "gpu":
        kernels.use_fastest(transformer, config)
    vae = load_vae(config, device, pick_vae_dtype(dtype))
    log.info("%s from %s on %s (%s) in %.1f s", config.name, path, device, dtype, time.monotonic() - began)
    return World(config, transformer, vae, text_encoder, team, plan)


def load_vae(config: ModelConfig, device: torch.device, dtype: torch.dtype, path: Path | None = None) -> VideoVAE:
    """The VAE of a config alone; path: of another file than the config's. Raises the errors of `load`."""
    path = path or config.path(config.vae_cfg.vae_pth)
    return load_strict(lambda: build_vae(config.vae_cfg), read_tensors(path), where=path, device=device, dtype=dtype)


def read_transformer(config: ModelConfig) -> dict[str, Tensor]:
    """The transformer's tensors by name, with the config's LoRAs merged. Raises the errors of `load`."""
    tensors = read_tensors(config.path(config.checkpoint_path))
    for extra in RELEASED_EXTRAS:
        tensors.pop(extra, None)
    return merge(tensors, loras_of(config), config.name)


def loras_of(config: ModelConfig) -> list[LoraChoice]:
    """The config's LoRAs, with whole paths."""
    return [choice.found_by(config.path) for choice in map(LoraChoice.parse, config.loras)]


def make_plan(config: ModelConfig, device: torch.device, dtype: torch.dtype, team: Team | None = None) -> MemoryPlan:
    """What of a model, before it is loaded, will stay on a GPU, by the memory that is free for this process."""
    with torch.device("meta"):
        transformer, vae = InfiniteWorldTransformer(config.model_cfg).to(dtype), build_vae(config.vae_cfg)
    needs = MemoryEstimate.of(config, transformer, vae.to(pick_vae_dtype(dtype)))
    free = free_memory(device)
    plan = choose(needs, free, psutil.virtual_memory().available, team is not None)
    log.info("%.1f GB of GPU memory: %s; %.1f GB at most", free / GB, plan, needs.gpu(plan) / GB)
    return plan
