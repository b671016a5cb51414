"""The loss of every training of the transformer: flow matching, and what a chunk's velocity depends on besides noise.

Nothing here knows where batches come from: `train_world`, `finetune` and `distill` share it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infworld.dit import InfiniteWorldTransformer, MemoryStream, TextContext
from infworld.sampler import MAX_TIMESTEP, Velocity

PURE_NOISE = 0.4  # share of samples at timestep 1000


@dataclass(frozen=True)
class Conditions:
    """What the velocities of B chunks depend on besides the noise: memory, actions (B, T, dim) and text."""

    stream: MemoryStream
    actions: Tensor
    context: TextContext

    def repeated(self, times: int) -> Conditions:
        """Each chunk's conditions `times` over, side by side: they share their way through compressor and memory."""

        def each(x: Tensor) -> Tensor:
            return x if times == 1 else x.repeat_interleave(times, dim=0)

        stream = MemoryStream(tuple(map(each, self.stream.tokens)), self.stream.latents)
        context = TextContext(tuple((each(keys), each(values)) for keys, values in self.context.keys_values))
        return Conditions(stream, each(self.actions), context)


def condition(
    model: InfiniteWorldTransformer,
    history: Tensor,
    move: Tensor,
    view: Tensor,
    text: Tensor,
    mask: Tensor,
    *,
    frozen: bool = False,
    wrong_memory: bool = False,
) -> Conditions:
    """Conditions of chunks with histories (B, C, n, h, w), actions (B, 4 T - 3), text (B, L, caption_channels) and its
    mask (B, L).

    frozen: the compressor gets no gradient. wrong_memory: every chunk gets the compressed memory of its neighbour in
    the batch, and its own last latent.
    """
    context = model.embed_text(text, mask)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        compressed = model.latent_encoder.compress(history.to(model.dtype))
    if wrong_memory:
        compressed = compressed.roll(1, dims=0)
    memory = torch.cat([compressed, history[:, :, -1:].to(compressed.dtype)], dim=2)
    return Conditions(model.encode_memory(memory, context), model.action_encoder(move, view), context)


def loss(velocity: Velocity, target: Tensor, shift: float, noises: int = 1) -> Tensor:
    """Mean squared error of the velocity (noise minus data) at timesteps drawn as the sampler's schedule has them, and
    for a share of PURE_NOISE of the samples at pure noise.

    velocity: of noisy chunks (n B, C, T, h, w) at timesteps (n B,) in 0..1000. target: (B, C, T, h, w) clean latents,
    each of which is met with n = `noises` noises, side by side.
    """
    target = target.repeat_interleave(noises, dim=0)
    levels = draw_levels(len(target), shift, device=target.device)
    return velocity_error(velocity, target, levels, torch.randn_like(target)).mean()


def draw_levels(count: int, shift: float, **random: Any) -> Tensor:
    """Noise levels (count,) in 0..1 to train at, a share of PURE_NOISE of them 1. random: generator, device."""
    u = torch.rand(count, **random)
    return torch.where(torch.rand(count, **random) < PURE_NOISE, 1.0, shift * u / (1 + (shift - 1) * u))


def velocity_error(velocity: Velocity, target: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the velocity per sample (B,), at noise levels t (B,) in 0..1."""
    level = t.view(-1, 1, 1, 1, 1)
    found = velocity((1 - level) * target + level * noise, MAX_TIMESTEP * t)
    return F.mse_loss(found.float(), noise - target, reduction="none").flatten(1).mean(1)


@torch.no_grad()
def memory_gap(velocity: Callable[[bool], Velocity], target: Tensor, noise: Tensor) -> dict[str, float]:
    """At pure noise, over the last quarter of chunks (B, C, T, h, w): the error with the right memory, with another
    walk's, and their ratio, the wrong-memory gap (1 = the memory is not used).

    velocity: with the wrong memory or not.
    """
    timestep = torch.full((len(target),), MAX_TIMESTEP, device=target.device)
    part = slice(3 * target.shape[2] // 4, None)
    right, wrong = (
        F.mse_loss(velocity(swap)(noise, timestep).float()[:, :, part], (noise - target)[:, :, part]).item()
        for swap in (False, True)
    )
    return {"error_right": right, "error_wrong": wrong, "gap": wrong / right}
