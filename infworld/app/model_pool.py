"""The models that the page offers, on one device. At most one is loaded, as a device makes one film at a time."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

import infworld
from infworld.app.compute import ON_ZERO_GPU, Compute, leading, on_gpu
from infworld.config import ModelConfig
from infworld.devices import pick_device
from infworld.parallel import Team
from infworld.world import World

log = logging.getLogger(__name__)


class ModelPool:
    """Configs by name, and the world of the one that is loaded; loading another one frees it first.

    The first one is the page's own: what a person meets, and a program that names none. It is loaded at once, so that
    what is wrong with it is said at the start. Only those are offered whose chunks and films have the lengths of the
    first, which the page is laid out for; on ZeroGPU the first alone. team: the processes that film together, if there
    are several. Raises as `infworld.load` does.
    """

    def __init__(self, configs: Mapping[str, ModelConfig], device: str = "auto", team: Team | None = None):
        self.first = next(iter(configs))
        lengths = configs[self.first].validation_data
        self._configs = {
            name: config
            for name, config in configs.items()
            if name == self.first or (config.validation_data == lengths and not ON_ZERO_GPU)
        }
        self._device = device
        self._team = team
        self._loaded: tuple[World, Compute] | None = None
        if self.device.type == "cpu" and team is None:
            # In a thread that ends: as long as a process has more OpenMP threads than cores, they sleep between any two
            # loops, and the models take half as long again. So only the runner's thread may have a pool of them.
            with ThreadPoolExecutor(1) as loader:
                loader.submit(self.compute, self.first).result()
        else:
            self.compute(self.first)

    @property
    def names(self) -> list[str]:
        return list(self._configs)

    @property
    def device(self) -> torch.device:
        """What the models run on."""
        return pick_device(self._device)

    def use_device(self) -> None:
        """Makes the device the one that the calling thread computes on where none is named."""
        if self.device.type == "cuda" and not ON_ZERO_GPU:
            torch.cuda.set_device(self.device)

    def config(self, name: str) -> ModelConfig:
        """ValueError for a model that is not offered here."""
        if name not in self._configs:
            raise ValueError(f"the model {name!r} is not here: there is {' and '.join(self.names)}")
        return self._configs[name]

    def is_loaded(self, name: str) -> bool:
        return self._loaded is not None and self._loaded[0].config.name == name

    def compute(self, name: str) -> Compute:
        """The way to this model, which is loaded if it is not. Only for the one run that is on."""
        return self._load(name)[1]

    def world(self, name: str) -> World:
        """The model itself, loaded as by `compute`; for the other processes of a team."""
        return self._load(name)[0]

    def _load(self, name: str) -> tuple[World, Compute]:
        config = self.config(name)
        if not self.is_loaded(name):
            self._loaded = None
            gc.collect()
            if not ON_ZERO_GPU:
                torch.cuda.empty_cache()
            placement = "gpu" if ON_ZERO_GPU else "auto"
            world = infworld.load(config, self._device, text_placement=placement, team=self._team)
            self._loaded = world, _compute_of(world)
        return self._loaded  # type: ignore[return-value]


class SingleModelPool(ModelPool):
    """A world that is there already, as the only model."""

    def __init__(self, world: World):
        self.first = world.config.name
        self._configs, self._device = {self.first: world.config}, str(world.device)
        self._loaded = world, _compute_of(world)


def _compute_of(world: World) -> Compute:
    return leading(world) if world.team else on_gpu(world)
