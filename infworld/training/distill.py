"""Distillation to a few steps: a LoRA with which a model films with 4 steps a chunk, its guidance folded in.

Two stages, as published for causal video models (Causal Forcing, Self Forcing, DMD2). *Consistency* (`few_steps`): on
real latents, a step of the student has to lead to where the guided teacher's small steps lead, by way of the student's
own average. *Distribution matching*: the student films on its own, chunk by
chunk through the VAE, and one random step of the last chunk follows the difference between the teacher's score and that
of a critic, which learns the student's films. Teacher and student see the same memory; the compressor stays as it is.

Teacher, student, its average and the critic are one transformer with three LoRAs, so that it fits where fine-tuning
does.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from infworld.config import ModelConfig, SamplerConfig
from infworld.dit import InfiniteWorldTransformer
from infworld.sampler import MAX_TIMESTEP, Velocity, guide, sample, schedule
from infworld.text import TextEmbedding
from infworld.training.clips import Batch, ClipSampler, Place
from infworld.training.few_steps import Velocities, few_steps_loss
from infworld.training.finetune import GAP_HISTORY, GRADIENT_NORM, check_settings
from infworld.training.flow import condition, memory_gap, velocity_error
from infworld.training.parts import add_lora, recompute
from infworld.training.run import autocast
from infworld.training.sharing import average_gradients, load_optimizer_state, mean_of_all, optimizer_state
from infworld.vae import VideoVAE

PARTS = ("self-attention", "cross-attention", "feed-forward")
ROLES = ("student", "average", "critic")
CRITIC_STEPS = 5  # for each of the student's
CRITIC_LR = 0.2  # times the student's
LEVELS = (0.02, 0.98)  # of noise, at which distributions are matched


@dataclass(frozen=True)
class Settings:
    """What decides a run's result. few: sampler steps of the student. consistency, matching: steps of the two stages.
    rolled: own chunks before the one that learns, at most."""

    few: int = 4
    guidance: float = 1.0
    rank: int = 64
    consistency: int = 3000
    matching: int = 1000
    lr: float = 1e-4
    matching_lr: float = 2e-5
    batch: int = 16
    rolled: int = 3
    ema: float = 0.99
    seed: int = 0

    def __post_init__(self):
        for name in ("few", "rank", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if self.consistency < 0 or self.matching < 0 or self.rolled < 0:
            raise ValueError("the steps of a stage and the chunks rolled out must be 0 or more")
        if not 0 < self.lr < 1 or not 0 < self.matching_lr < 1 or not 0 <= self.ema < 1:
            raise ValueError(f"lr ({self.lr}), matching_lr ({self.matching_lr}) and ema ({self.ema}) are from 0 to 1")

    @property
    def steps(self) -> int:
        return self.consistency + self.matching


def few_step_sampler(sampler: SamplerConfig, few: int) -> SamplerConfig:
    """The sampler of the distilled model: nothing but the steps that it learns."""
    plain = {"text_cfg_scale": 1.0, "preset": "exact", "end_at_zero": True, "settled": 0.0, "memory_guidance": 0.0}
    return dataclasses.replace(sampler, num_sampling_steps=few, **plain)


class Distillation:
    """A teacher and what it teaches; one step after the other.

    transformer, vae: on their device, whole. With several processes all of them call all methods. Raises ValueError for
    a batch that they cannot share.
    """

    def __init__(
        self,
        transformer: InfiniteWorldTransformer,
        vae: VideoVAE,
        sampler: ClipSampler,
        config: ModelConfig,
        settings: Settings,
    ):
        self.transformer, self.vae, self.sampler, self.config, self.settings = (
            transformer,
            vae,
            sampler,
            config,
            settings,
        )
        self.device, self.step_number = transformer.patch_embedding.weight.device, 0
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if settings.batch % self.ranks:
            raise ValueError(f"a batch of {settings.batch} cannot be shared by {self.ranks} GPUs: use a multiple")
        scheduler = config.val_scheduler_cfg
        self.sign = 1 if scheduler.use_reversed_velocity else -1
        self.few = schedule(few_step_sampler(scheduler, settings.few), settings.few)
        transformer.requires_grad_(False)
        torch.manual_seed(settings.seed)  # the matrices A are random
        for role in ROLES:
            add_lora(transformer, PARTS, settings.rank, role)
        recompute(transformer)
        self._layers = [module for module in transformer.modules() if hasattr(module, "lora_A")]
        self.parameters: dict[str, dict[str, nn.Parameter]] = {
            role: {name: p for name, p in transformer.named_parameters() if f".{role}." in name} for role in ROLES
        }
        self._average(1.0)
        self.optimizers = {
            role: torch.optim.AdamW(self.parameters[role].values(), settings.lr, betas=(0.9, 0.999), weight_decay=0.0)
            for role in ("student", "critic")
        }

    def step(self) -> dict[str, float]:
        """One step; returns its losses: `loss` of the student, and `critic` while distributions are matched."""
        settings = self.settings
        places = self.sampler.places(self.step_number, settings.batch)
        share = settings.batch // self.ranks
        own = range(self.rank * share, (self.rank + 1) * share)
        if self.step_number < settings.consistency:
            found = {"loss": sum(self._consistency(places[i], i) for i in own) / share}
            self._learn("student", settings.lr, share)
        else:
            films = [self._film(places[i], i) for i in own]
            found = {"critic": sum(self._watch(film) for film in films) / share}
            self._learn("critic", CRITIC_LR * settings.matching_lr, share)
            if (self.step_number - settings.consistency) % CRITIC_STEPS == 0:
                found["loss"] = sum(self._match(film) for film in films) / share
                self._learn("student", settings.matching_lr, share)
        self.step_number += 1
        return {name: mean_of_all(value) for name, value in found.items()}

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The wrong-memory gap of the averaged student on chunks that are held out."""
        batch = self.sampler.batch(self.sampler.measured(GAP_HISTORY), -1).to(self.device)

        def velocity(wrong: bool) -> Velocity:
            return self._velocity("average", batch, wrong_memory=wrong)

        with autocast(self.device):
            return memory_gap(velocity, batch.target, batch.noise)

    # ---------------------------------------------------------------------------------------------------- the stages

    def _consistency(self, place: Place, index: int) -> float:
        """Adds one sample's gradients to the student; returns its loss."""
        batch = self.sampler.batch([place], self.step_number, index).to(self.device)
        seed = random.Random(f"{self.settings.seed} {self.step_number} {index} points").getrandbits(62)

        def velocities(velocity: Velocity) -> Velocities:
            return lambda noisy, level: velocity(noisy, MAX_TIMESTEP * level.flatten()).float()

        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []), autocast(self.device):
            torch.manual_seed(seed)
            with torch.no_grad():
                fixed, teacher = velocities(self._velocity("average", batch)), velocities(self._teacher(batch))
            student = velocities(self._velocity("student", batch))
            loss = few_steps_loss(
                student, fixed, teacher, batch.target, self.config.val_scheduler_cfg, self.settings.few
            )
            with self._acting("student"):
                loss.backward()
        return loss.item()

    def _film(self, place: Place, index: int) -> Film:
        """The student's own film up to a chunk, and how that chunk is begun: the noise and the step that learns."""
        rng = random.Random(f"{self.settings.seed} {self.step_number} {index} film")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        rolled = min(place.chunks, self.settings.rolled)
        end = place.start + place.chunks
        batch = self.sampler.batch([Place(place.clip, end - rolled, 0)], self.step_number, index).to(self.device)

        def noise() -> Tensor:
            return torch.randn(batch.target.shape, generator=generator).to(self.device)

        with torch.no_grad():
            history, state = self._encode(self._decode(batch.history), None)
            for chunk in range(end - rolled, end + 1):
                move, view = self._actions(place, chunk)
                batch = dataclasses.replace(batch, history=history, move=move, view=view)
                if chunk < end:
                    with autocast(self.device):
                        latents = sample(self._velocity("student", batch), noise(), self.few)
                    added, state = self._encode(self._decode(latents)[:, :, 1:], state)
                    history = torch.cat([history, added], dim=2)
            z, last = noise(), rng.randrange(self.settings.few)
            with autocast(self.device):
                velocity = self._velocity("student", batch)
                for i in range(last):
                    t, s = (self.few[i : i + 2] / MAX_TIMESTEP).tolist()
                    z = z - (t - s) * velocity(z, _at(t, z))
                t = self.few[last].item() / MAX_TIMESTEP
                clean = z - t * velocity(z, _at(t, z))
        level = torch.empty(1).uniform_(*LEVELS, generator=generator)
        shift = self.config.val_scheduler_cfg.shift
        level = (shift * level / (1 + (shift - 1) * level)).to(self.device)
        return Film(batch, z, t, clean.float(), level, noise())

    def _watch(self, film: Film) -> float:
        """Adds a film's gradients to the critic, which learns what the student makes; returns its loss."""
        with autocast(self.device), self._acting("critic"):
            loss = velocity_error(self._velocity("critic", film.batch), film.clean, film.level, film.noise).mean()
            loss.backward()
        return loss.item()

    def _match(self, film: Film) -> float:
        """Adds a film's gradients to the student: away from where the critic, towards where the teacher would go."""
        level = film.level.view(-1, 1, 1, 1, 1)
        z, timestep = (1 - level) * film.clean + level * film.noise, MAX_TIMESTEP * film.level
        with autocast(self.device):
            with torch.no_grad():
                real = z - level * self._teacher(film.batch)(z, timestep)
                made = z - level * self._velocity("critic", film.batch)(z, timestep)
                aim = film.clean - (made - real) / (film.clean - real).abs().mean().clamp(min=1e-6)
            with self._acting("student"):
                velocity = self._velocity("student", film.batch)(film.z, _at(film.t, film.z))
                loss = 0.5 * F.mse_loss((film.z - film.t * velocity).float(), aim)
                loss.backward()
        return loss.item()

    # ------------------------------------------------------------------------------------------------------ the roles

    def _velocity(
        self, role: str | None, batch: Batch, text: TextEmbedding | None = None, wrong_memory: bool = False
    ) -> Velocity:
        """A role's velocity of the batch's chunks; None is the teacher without guidance. text: another one for all."""
        hidden, mask = (batch.text, batch.mask) if text is None else (text.hidden, text.mask)
        with self._acting(role):
            actions = batch.history, batch.move, batch.view
            given = condition(self.transformer, *actions, hidden, mask, frozen=True, wrong_memory=wrong_memory)

        def velocity(z: Tensor, timestep: Tensor) -> Tensor:
            with self._acting(role):
                timestep = timestep.to(self.device).expand(len(z))
                return self.sign * self.transformer.denoise(z, timestep, given.stream, given.actions, given.context)

        return velocity

    def _teacher(self, batch: Batch) -> Velocity:
        """The teacher's velocity with its guidance."""
        positive = self._velocity(None, batch)
        if self.settings.guidance == 1:
            return positive
        negative = self._velocity(None, batch, self.sampler.texts[self.config.negative_prompt].to(self.device))
        return lambda z, timestep: guide(positive(z, timestep), negative(z, timestep), self.settings.guidance)

    @contextmanager
    def _acting(self, role: str | None) -> Iterator[None]:
        """Within it the transformer is that role's. Gradients have to be taken within it too, as blocks are computed
        once more for them."""
        before = [(layer.disable_adapters, list(layer.active_adapters)) for layer in self._layers]
        for layer in self._layers:
            layer.enable_adapters(role is not None)
            if role is not None:
                layer.set_adapter(role)
        try:
            yield
        finally:
            for layer, (disabled, active) in zip(self._layers, before, strict=True):
                layer.set_adapter(active)
                layer.enable_adapters(not disabled)

    def _learn(self, role: str, lr: float, samples: int) -> None:
        """A step of a role's optimizer with the mean of its samples' gradients; one that is not finite does nothing."""
        optimizer, parameters = self.optimizers[role], list(self.parameters[role].values())
        for parameter in parameters:
            parameter.grad = None if parameter.grad is None else parameter.grad / samples
        average_gradients(parameters)
        if nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM).isfinite():
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if role == "student":
            self._average(1 - self.settings.ema)

    @torch.no_grad()
    def _average(self, weight: float) -> None:
        for average, own in zip(self.parameters["average"].values(), self.parameters["student"].values(), strict=True):
            average.lerp_(own, weight)

    # ------------------------------------------------------------------------------------------------------- and more

    def _actions(self, place: Place, chunk: int) -> tuple[Tensor, Tensor]:
        frames = place.clip.chunk_frames
        move, view = place.clip.actions[:, chunk * frames : (chunk + 1) * frames + 1].to(self.device)
        return move[None], view[None]

    def _decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents.to(self.vae.conv1.weight.dtype))

    def _encode(self, video: Tensor, state: dict[str, Tensor] | None) -> tuple[Tensor, dict[str, Tensor]]:
        latents, state = self.vae.encode(video.to(self.vae.conv1.weight.dtype), state)
        return latents.float(), state

    def state(self) -> dict[str, Any]:
        """All that `load_state` needs; `average` is the LoRA for use."""
        trained = {role: {name: p.detach().cpu() for name, p in self.parameters[role].items()} for role in ROLES}
        optimizers = {
            role: optimizer_state(optimizer, self.parameters[role]) for role, optimizer in self.optimizers.items()
        }
        settings = dataclasses.asdict(self.settings)
        return {"step": self.step_number, "settings": settings, "optimizers": optimizers, **trained}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state. Raises ValueError for one of other settings."""
        check_settings(state, self.settings)
        self.step_number = state["step"]
        for role in ROLES:
            for name, parameter in self.parameters[role].items():
                parameter.copy_(state[role][name])
        for role, optimizer in self.optimizers.items():
            load_optimizer_state(optimizer, self.parameters[role], state["optimizers"][role])


@dataclass(frozen=True)
class Film:
    """A chunk that the student makes after its own film: z at noise level t of 0..1 is what the step that learns begins
    with, and `clean` what it makes of it; level (1,) and noise are those that it is judged at."""

    batch: Batch
    z: Tensor
    t: float
    clean: Tensor
    level: Tensor
    noise: Tensor


def _at(t: float, z: Tensor) -> Tensor:
    """The timestep (B,) of a noise level."""
    return torch.full((len(z),), MAX_TIMESTEP * t, device=z.device)
