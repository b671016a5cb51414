"""Weights of 8 bits with their scales, as other programs keep them: read by name, widened when they are used.

A layer's `weight` has a scale beside it, `scale_weight` (ComfyUI's files up to 2025, `umt5_xxl_fp8_e4m3fn_scaled`) or
`weight_scale` (its newer ones, and those of diffusers): the true weight is 8-bit weight * scale. A scale is one number,
one for each row, or one for each block of rows and columns. What a file says about rounding activations is not needed,
as these are not rounded here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

SCALES = ("scale_weight", "weight_scale")
UNUSED = ("scale_input", "input_scale")
RECIPE = "comfy_quant"  # JSON, as bytes, of how a layer's weight was quantised
FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "int8_blockwise")
SETTINGS = {"format", "group_size", "full_precision_matrix_mult"}  # of a recipe, by which weight * scale stays true


def split_scales(tensors: Mapping[str, Tensor], where: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file's tensors without those about quantisation, and the scales by the names of the weights.

    Raises ValueError for weights of another kind, and for scales that are missing, of no weight, or of a wrong shape.
    """
    weights, scales = {}, {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind in SCALES:
            scales[f"{layer}.weight"] = tensor.float()
        elif kind == RECIPE:
            _check_recipe(bytes(tensor.tolist()), f"{where}: {name}")
        elif kind not in UNUSED:
            weights[name] = tensor
    for name, weight in weights.items():
        unknown = weight.dtype == torch.uint8 or (weight.dtype == torch.int8 and name not in scales)
        if unknown and name.endswith(".weight"):
            raise ValueError(
                f"{where}: {name} is {weight.dtype} without a scale: use a file of bf16, fp8 or scaled int8"
            )
    for name, scale in scales.items():
        if name not in weights or not _fits(scale, weights[name]):
            found = f"of a weight {tuple(weights[name].shape)}" if name in weights else "of no weight"
            raise ValueError(f"{where}: the scale of {name} is {tuple(scale.shape)}, {found}: use another file")
    return weights, scales


def widen(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The true weight: computed in float32, then `dtype`."""
    if scale is None:
        return weight.to(dtype)
    if scale.numel() > 1:
        scale = scale if scale.ndim == 2 else scale[:, None]
        for axis, size in enumerate(weight.shape):
            scale = scale.repeat_interleave(size // scale.shape[axis], axis)
    return (weight.float() * scale).to(dtype)


def is_narrow(tensor: Tensor) -> bool:
    """Whether it has 8 bits a number."""
    return tensor.itemsize == 1


class Widened(nn.Module):
    """A module whose parameters are wide while it computes, and only then. scales: by the parameters' names."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, scales: Mapping[str, Tensor]):
        super().__init__()
        self.module, self.dtype = module, dtype
        self.scales = {name: scales[name] for name, _ in module.named_parameters() if name in scales}

    def forward(self, *args, **kwargs):
        weights = {
            name: widen(parameter, self.scales.get(name), self.dtype)
            for name, parameter in self.module.named_parameters()
        }
        return functional_call(self.module, weights, args, kwargs)


def _fits(scale: Tensor, weight: Tensor) -> bool:
    if scale.numel() == 1 or scale.shape == weight.shape[:1]:
        return True
    blocks = zip(weight.shape, scale.shape, strict=False)
    return weight.ndim == scale.ndim == 2 and all(size % parts == 0 for size, parts in blocks)


def _check_recipe(text: bytes, where: str) -> None:
    try:
        recipe = json.loads(text)
        known = recipe["format"] in FORMATS and not {name for name in recipe.keys() - SETTINGS if recipe[name]}
    except (ValueError, KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise ValueError(f"{where} is {text[:100]!r}, which is not known here: known are {', '.join(FORMATS)}")
