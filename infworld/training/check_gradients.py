"""Compares the gradients of training steps, as a run would compute them, with plain float32 ones of the same samples.

    folder=checkpoints/tiny
    infworld train check-gradients --vae $folder/vae.safetensors --resume $folder/world.safetensors --compile

Kernels with wrong gradients exist, and a run does not survive them: worth its minute before a long run on another card
or another torch. Exits with 1 where a parameter's gradient is off by more than half of its size.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from infworld.config import load_config
from infworld.loading import load_vae
from infworld.training.data import WalkPool
from infworld.training.optim import EMA
from infworld.training.parts import recompute
from infworld.training.run import autocast, compute_dtype, set_up_devices
from infworld.training.train_world import MIXED, NOISES, Trainee, flow_loss, make_optimizers, pick_cut, resume

WRONG = 0.5  # of a gradient's size; rounding in bfloat16 stays below a tenth
SMALLEST = 1e-3  # of the size of all gradients together: what is smaller is compared with that


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config", default="tiny", help="model name or YAML")
    add("--vae", required=True, type=Path, help="trained VAE, .safetensors")
    add("--resume", type=Path, help="weights to check with, as for a run; without, those that a run begins with")
    add("--chunks", type=int, default=16, help="length of the walks; histories of 1 to chunks - 1 are checked in turn")
    add("--steps", type=int, default=15)
    add("--batch", type=int, default=32, help="noisy chunks per step")
    add("--compile", action="store_true", help="compile the blocks, as a run does with the same option")
    return parser.parse_args(arguments)


def check(args: argparse.Namespace) -> int:
    _, _, device = set_up_devices()
    torch.manual_seed(0)
    config = load_config(args.config)
    vae = load_vae(config, device, compute_dtype(device), args.vae)
    plain = Trainee(config).to(device)
    if args.resume:
        resume(args.resume, plain, make_optimizers(plain, 0.0), EMA(plain, 0.0))
    model = copy.deepcopy(plain)
    recompute(plain.transformer)  # attention in float32 without its own kernels takes tens of GB
    if args.compile:
        model.transformer.compile_blocks()
    walks = max(4, min(16, args.batch))
    pool = WalkPool(vae, model.text, config, size=walks, chunks=args.chunks, mixture=MIXED, first_seed=0, device=device)
    pool.renew(walks)
    shift, worst = config.val_scheduler_cfg.shift, 0.0
    for step in range(args.steps):
        chunks = 1 + step % (args.chunks - 1) if args.chunks > 1 else 0
        cut, frozen = pick_cut(config, random.Random(step)), step % 2 == 0
        batch = pool.batch(chunks, max(1, args.batch // NOISES), cut)

        def loss(model: nn.Module, batch=batch, frozen=frozen) -> Tensor:
            return flow_loss(model, copy.copy(batch), shift, frozen)

        with autocast(device):
            found = gradients(model, loss, step)
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(device.type, enabled=False):
            precision = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            expected = gradients(plain, loss, step)
            torch.set_float32_matmul_precision(precision)
        off, name = most_deviating(found, expected)
        worst = max(worst, off)
        length = cut.new if cut else pool.new_latents
        print(
            f"step {step}: {chunks} chunks of history and {length} new latents: {name} is off by {off:.3f}", flush=True
        )
    print(f"{'WRONG' if worst > WRONG else 'fine'}: the worst gradient is off by {worst:.3f} of its size")
    return int(worst > WRONG)


def gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor], seed: int) -> dict[str, Tensor]:
    """The gradient of every parameter that the loss depends on, with the noise of a seed."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    loss(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def most_deviating(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest deviation of a gradient, of its own size or of `SMALLEST` of all, and whose it is; infinite where one
    is missing or not finite."""
    least = SMALLEST * torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    off = dict.fromkeys(found.keys() ^ expected.keys(), torch.inf)
    for name in found.keys() & expected.keys():
        deviation = float((found[name] - expected[name]).norm() / expected[name].norm().clamp(min=least))
        off[name] = deviation if deviation == deviation else torch.inf
    name = max(off, key=lambda name: off[name])
    return off[name], name


def main(arguments: list[str] | None = None) -> int:
    return check(parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
