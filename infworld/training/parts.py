"""What of a transformer is trained: whole parts of it, as the paper does, or low-rank changes (LoRA) of its layers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infworld.dit import InfiniteWorldTransformer

PARTS = {
    "self-attention": r"blocks\.\d+\.self_attn\.",
    "cross-attention": r"blocks\.\d+\.cross_attn\.",
    "feed-forward": r"blocks\.\d+\.ffn\.",
    "compressor": r"latent_encoder\.",
    "actions": r"action_encoder\.",
}
PAPER = ("compressor", "actions", "self-attention")  # what the paper's fine-tuning trains
LORA_PARTS = ("self-attention",)


def check_parts(parts: Iterable[str]) -> tuple[str, ...]:
    """The parts. Raises ValueError for an unknown one."""
    parts = tuple(parts)
    if not parts or (unknown := [part for part in parts if part not in PARTS]):
        raise ValueError(f"unknown part {unknown[0] if parts else ''!r}: use some of {', '.join(PARTS)}")
    return parts


def train_parts(model: InfiniteWorldTransformer, parts: Iterable[str]) -> None:
    """Lets these parts learn, in float32, and nothing else."""
    chosen = re.compile("|".join(PARTS[part] for part in parts))
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if chosen.match(name):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def add_lora(model: InfiniteWorldTransformer, parts: Iterable[str], rank: int, name: str = "default") -> None:
    """Adds trainable low-rank changes, zero at first, to all linear and convolution layers of these parts.

    name: of the set, where there are several. Everything else stops learning, but for other sets. Raises ValueError for
    a rank below 1.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds

    if rank < 1:
        raise ValueError(f"the rank of a LoRA must be 1 or more, not {rank}")
    chosen = re.compile("|".join(PARTS[part] for part in parts))
    layers = [
        layer.removesuffix(".base_layer")
        for layer, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv3d)) and chosen.match(layer) and "lora_" not in layer
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there are several sets
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), model, adapter_name=name)


def lora_matrices(tensors: dict[str, Tensor], name: str = "default") -> dict[str, tuple[Tensor, Tensor]]:
    """The matrices A and B of a set by layer, as `infworld.lora.save` takes them, from a model's named tensors."""
    end = f".lora_A.{name}.weight"
    layers = [tensor.removesuffix(end) for tensor in tensors if tensor.endswith(end)]
    return {layer: (tensors[f"{layer}{end}"], tensors[f"{layer}.lora_B.{name}.weight"]) for layer in layers}


def recompute(model: InfiniteWorldTransformer) -> None:
    """Activation checkpointing: of blocks and compressor only the inputs are kept for the way back."""
    again = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in them is random
    for block in model.blocks:
        block.memory_step = partial(checkpoint, block.memory_step, **again)
        block.noisy_step = partial(checkpoint, block.noisy_step, **again)
    model.latent_encoder.encode = partial(checkpoint, model.latent_encoder.encode, **again)
