"""Fine-tuning on prepared videos: the paper's stages, or a LoRA, on any number of GPUs (docs/own-videos.md).

A sample is a chunk of a clip with what came before it as history; the loss is that of all training (`flow`). Every
batch is decided by seed and step alone, and all of the state is kept, so a run that was stopped goes on as if it had
not been. Whether the memory is read shows in the wrong-memory gap, measured on chunks that are held out.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from infworld.dit import InfiniteWorldTransformer
from infworld.training.clips import Batch, ClipSampler, Place
from infworld.training.flow import condition, memory_gap, velocity_error
from infworld.training.parts import PAPER, add_lora, check_parts, recompute, train_parts
from infworld.training.run import autocast, finish, peak_gib
from infworld.training.sharing import (
    accumulating,
    load_optimizer_state,
    local,
    mean_of_all,
    optimizer_state,
    share,
    split_like,
    whole,
)

log = logging.getLogger(__name__)

STAGES = {1: 4, 2: 16}  # chunks of history at most (the paper's)
GAP_HISTORY = 2  # chunks, where the memory is measured
GRADIENT_NORM = 1.0
ADAM_BYTES = 8  # of two averages in float32, per parameter


@dataclass(frozen=True)
class Settings:
    """What decides a run's result. rank: of the LoRA; 0 trains the parts themselves. batch: samples of a step, of all
    GPUs together; at_once: that one GPU takes at a time. warmup: steps over which the learning rate grows."""

    stage: int = 1
    parts: tuple[str, ...] = PAPER
    rank: int = 0
    lr: float = 1e-5
    batch: int = 16
    at_once: int = 1
    warmup: int = 20
    ema: float = 0.99
    seed: int = 0

    def __post_init__(self):
        check_parts(self.parts)
        if self.stage not in STAGES:
            raise ValueError(f"the stage is 1 (histories of 1 to 4 chunks) or 2 (1 to 16), not {self.stage}")
        for name in ("batch", "at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if not 0 < self.lr < 1 or not 0 <= self.ema < 1:
            raise ValueError(f"lr ({self.lr}) and ema ({self.ema}) must lie between 0 and 1")


class Learner(nn.Module):
    """The transformer behind one forward pass, as the wrappers for several GPUs need it."""

    def __init__(self, transformer: InfiniteWorldTransformer):
        super().__init__()
        self.transformer = transformer

    def forward(self, noisy: Tensor, timestep: Tensor, batch: Batch, wrong_memory: bool = False) -> Tensor:
        """Velocity of `noisy` (B, C, 21, h, w) at `timestep` (B,) in 0..1000, given the batch's conditions."""
        texts = batch.text, batch.mask
        given = condition(self.transformer, batch.history, batch.move, batch.view, *texts, wrong_memory=wrong_memory)
        return self.transformer.denoise(noisy, timestep, given.stream, given.actions, given.context)


def check_settings(state: Mapping[str, Any], settings: Any) -> None:
    """Raises ValueError if a run's state is of other settings than these, a dataclass."""
    for key, value in dataclasses.asdict(settings).items():
        if (begun := state["settings"].get(key)) != value:
            raise ValueError(
                f"the run was begun with {key} {begun} and not {value}: go on with that, or begin another one with "
                "another --out"
            )


@dataclass(frozen=True)
class Rehearsal:
    """What a step with that many chunks of history takes: seconds, and GiB of each GPU at most (0 on a CPU)."""

    chunks: int
    seconds: float
    gib: float

    def __str__(self) -> str:
        memory = f", {self.gib:.1f} GiB of each GPU" if self.gib else ""
        return f"{self.chunks} chunks of history: {self.seconds:.1f} s a step{memory}"


class Finetuning:
    """A model in training: one step after the other, its averaged weights, and all that a later run needs to go on.

    transformer: on its device, whole. way: of `sharing.WAYS`, where several processes train together; all of them
    call all methods. Raises ValueError for a batch that they cannot share.
    """

    def __init__(
        self,
        transformer: InfiniteWorldTransformer,
        sampler: ClipSampler,
        settings: Settings,
        *,
        reversed_velocity: bool = True,
        way: str = "ddp",
    ):
        self.settings, self.sampler, self.step_number = settings, sampler, 0
        self.device = transformer.patch_embedding.weight.device
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.sign = 1 if reversed_velocity else -1
        if settings.batch % (self.ranks * settings.at_once):
            raise ValueError(
                f"a batch of {settings.batch} cannot be shared by {self.ranks} GPUs with {settings.at_once} samples at "
                f"a time: use a multiple of {self.ranks * settings.at_once}"
            )
        if settings.rank:
            transformer.requires_grad_(False)
            torch.manual_seed(settings.seed)  # the matrices A are random
            add_lora(transformer, settings.parts, settings.rank)
        else:
            train_parts(transformer, settings.parts)
        recompute(transformer)
        learner = Learner(transformer)
        self.learner = share(learner, transformer, way)
        self.trained = {
            name.removeprefix("transformer."): parameter
            for name, parameter in learner.named_parameters()
            if parameter.requires_grad
        }
        self.average = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        self.optimizer = torch.optim.AdamW(self.trained.values(), settings.lr)

    def step(self) -> float:
        """One step of the optimizer; returns its loss, the mean over all processes.

        A step whose gradients are not finite changes nothing.
        """
        places = self.sampler.places(self.step_number, self.settings.batch)
        loss = mean_of_all(self.gradients(places))
        norm = nn.utils.clip_grad_norm_(self.trained.values(), GRADIENT_NORM)
        warmup = min(1.0, (self.step_number + 1) / max(1, self.settings.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * warmup
        if whole(norm).isfinite():
            self.optimizer.step()
        else:
            log.warning("step %d has gradients that are not finite and is left out", self.step_number)
        self.optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        self._update_average()
        return loss

    def gradients(self, places: Sequence[Place]) -> float:
        """Adds the gradients of these samples, of which every process takes its share; returns its own mean loss."""
        share, at_once = len(places) // self.ranks, self.settings.at_once
        total = 0.0
        for begun in range(0, share, at_once):
            first = self.rank * share + begun
            batch = self.sampler.batch(places[first : first + at_once], self.step_number, first).to(self.device)
            with accumulating(self.learner, more=begun + at_once < share), autocast(self.device):
                errors = velocity_error(self._velocity(batch), batch.target, batch.level, batch.noise)
                (errors.mean() * at_once / share).backward()
            total += errors.sum().item() / share
        return total

    def rehearse(self, chunks: int) -> Rehearsal:
        """Seconds and GPU memory of a step with `chunks` chunks of history; nothing is changed by it.

        Raises torch.OutOfMemoryError where it does not fit.
        """
        at_once = self.settings.at_once
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            for _ in range(2):  # the first is slow
                finish(self.device)
                began = time.monotonic()
                self.gradients(self.sampler.example(chunks, at_once * self.ranks))
                finish(self.device)
                seconds = time.monotonic() - began
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        kept = 0 if self.optimizer.state else ADAM_BYTES * sum(local(p).numel() for p in self.trained.values())
        gib = peak_gib(self.device) + kept / 2**30 if self.device.type == "cuda" else 0.0
        return Rehearsal(chunks, seconds * self.settings.batch / (at_once * self.ranks), gib)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The wrong-memory gap of the averaged weights on chunks that are held out."""
        places = self.sampler.measured(GAP_HISTORY)
        batch = self.sampler.batch(places, -1).to(self.device)
        with self.averaged(), autocast(self.device):
            return memory_gap(lambda wrong: self._velocity(batch, wrong), batch.target, batch.noise)

    def _velocity(self, batch: Batch, wrong_memory: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda noisy, timestep: self.sign * self.learner(noisy, timestep, batch, wrong_memory)

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.settings.ema, self.step_number / (10 + self.step_number))
        for average, parameter in zip(self.average.values(), self.trained.values(), strict=True):
            average.lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with its averaged weights, and its own again afterwards."""
        own = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        try:
            for name, parameter in self.trained.items():
                parameter.data.copy_(self.average[name])
            yield
        finally:
            for name, parameter in self.trained.items():
                parameter.data.copy_(own[name])

    def averages(self) -> dict[str, Tensor]:
        """The averaged weights by name, on the CPU."""
        return {name: whole(tensor) for name, tensor in self.average.items()}

    def state(self) -> dict[str, Any]:
        """All that `load_state` needs, whatever the number of processes then and now."""
        return {
            "step": self.step_number,
            "settings": dataclasses.asdict(self.settings),
            "trained": {name: whole(parameter) for name, parameter in self.trained.items()},
            "average": self.averages(),
            "optimizer": optimizer_state(self.optimizer, self.trained),
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from a state. Raises ValueError for one of other settings."""
        check_settings(state, self.settings)
        self.step_number = state["step"]
        for name, parameter in self.trained.items():
            parameter.copy_(split_like(state["trained"][name], parameter))
            self.average[name].copy_(split_like(state["average"][name], parameter))
        load_optimizer_state(self.optimizer, self.trained, state["optimizer"])
