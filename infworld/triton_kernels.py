"""GPU kernels, nearly all in Triton, for the functions of the same names in layers.py and vae.py; see fused.py.

Each reads its input once and writes its result once, with statistics in float32 and values rounded where plain torch
rounds them. Only widths are compiled in: lengths change from chunk to chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from infworld.layers import EPS

TILE = 4096  # numbers that a program of `_normalize` works on


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _modulate_into(out, x, shift, scale)
    return out


def modulate_both(first: Tensor, second: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    lengths = [first.shape[1], second.shape[1]]
    out = second.new_empty(len(second), sum(lengths), second.shape[2])
    for part, x in zip(out.split(lengths, dim=1), (first, second), strict=True):
        _modulate_into(part, x, shift, scale)
    return out


def _modulate_into(out: Tensor, x: Tensor, shift: Tensor, scale: Tensor) -> None:
    x, shift, scale = map(_in_rows, (x, shift, scale))
    rows = map(_rows, (x, shift, scale, out))
    with torch.cuda.device_of(x):
        _modulate[_per_token(x)](x, shift, scale, out, *rows, EPS=EPS, **_sizes(x))


def gated_add(x: Tensor, result: Tensor, gate: Tensor) -> Tensor:
    x, result, gate = map(_in_rows, (x, result, gate))
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = map(_rows, (x, result, gate, out))
    with torch.cuda.device_of(x):
        _gated_add[_per_token(x)](x, result, gate, out, *rows, **_sizes(x))
    return out


def norm_heads(x: Tensor, weight: Tensor, num_heads: int, rope: Tensor | None) -> Tensor:
    x = _in_rows(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    heads = out.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    angles = weight if rope is None else rope.contiguous()  # of no rope none are read
    sizes = {"HEAD_DIM": heads.shape[-1], "ROTATE": rope is not None, "EPS": EPS, **_sizes(x)}
    with torch.cuda.device_of(x):
        _norm_heads[_per_token(x)](x, weight, angles, out, _rows(x), _rows(out), **sizes)
    return heads


def affine_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """By cuBLASLt, with the tanh GELU inside the product; on a CPU this function of torch has another GELU."""
    return torch._addmm_activation(bias, x.flatten(0, 1), weight.t(), use_gelu=True).unflatten(0, x.shape[:2])


def normalize(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    x = x.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    pixels, block = x.numel() // width, triton.next_power_of_2(width)
    rows = max(1, TILE // block)
    with torch.cuda.device_of(x):
        _normalize[(triton.cdiv(pixels, rows),)](
            x, gamma, out, pixels, width**0.5, WIDTH=width, BLOCK=block, ROWS=rows, SILU=silu, num_warps=4
        )
    return out


def _in_rows(x: Tensor) -> Tensor:
    """x (B, L, C) with each token's numbers behind the last one's; a batch may lie anywhere in whole tokens."""
    width = x.shape[-1]
    fits = x.stride(-1) == 1 and (x.shape[1] == 1 or x.stride(1) == width) and (len(x) == 1 or x.stride(0) % width == 0)
    return x if fits else x.contiguous()


def _rows(x: Tensor) -> int:
    """Tokens from one of the batch to the next; 0 where all share one."""
    return 0 if len(x) == 1 else x.stride(0) // x.shape[-1]


def _per_token(x: Tensor) -> tuple[int, int]:
    return x.shape[1], x.shape[0]


def _sizes(x: Tensor) -> dict[str, int]:
    block = triton.next_power_of_2(x.shape[-1])
    return {"WIDTH": x.shape[-1], "BLOCK": block, "num_warps": min(8, max(1, block // 512))}


@triton.jit(do_not_specialize=["x_rows", "shift_rows", "scale_rows", "out_rows"])
def _modulate(
    x, shift, scale, out, x_rows, shift_rows, scale_rows, out_rows,
    EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    numbers = tl.load(x + (batch * x_rows + row) * WIDTH + columns, inside, 0.0).to(tl.float32)
    centred = tl.where(inside, numbers - tl.sum(numbers) / WIDTH, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred) / WIDTH + EPS)
    normed = normed.to(out.dtype.element_ty).to(tl.float32)
    factor = 1.0 + tl.load(scale + batch * scale_rows * WIDTH + columns, inside, 0.0).to(tl.float32)
    added = tl.load(shift + batch * shift_rows * WIDTH + columns, inside, 0.0).to(tl.float32)
    found = (added + normed * factor).to(out.dtype.element_ty)
    tl.store(out + (batch * out_rows + row) * WIDTH + columns, found, inside)


@triton.jit(do_not_specialize=["x_rows", "result_rows", "gate_rows", "out_rows"])
def _gated_add(
    x, result, gate, out, x_rows, result_rows, gate_rows, out_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    numbers = tl.load(x + (batch * x_rows + row) * WIDTH + columns, inside).to(tl.float32)
    added = tl.load(result + (batch * result_rows + row) * WIDTH + columns, inside).to(tl.float32)
    factor = tl.load(gate + batch * gate_rows * WIDTH + columns, inside).to(tl.float32)
    found = (numbers + added * factor).to(out.dtype.element_ty)
    tl.store(out + (batch * out_rows + row) * WIDTH + columns, found, inside)


@triton.jit(do_not_specialize=["x_rows", "out_rows"])
def _norm_heads(
    x, weight, angles, out, x_rows, out_rows,
    HEAD_DIM: tl.constexpr, ROTATE: tl.constexpr, EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    numbers = tl.load(x + (batch * x_rows + row) * WIDTH + columns, inside, 0.0).to(tl.float32)
    normed = numbers * tl.rsqrt(tl.sum(numbers * numbers) / WIDTH + EPS)
    normed = normed.to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + columns, inside, 0.0).to(out.dtype.element_ty).to(tl.float32)
    found = (normed * factor).to(out.dtype.element_ty)
    if ROTATE:
        even, odd = tl.split(tl.reshape(found.to(tl.float32), (BLOCK // 2, 2)))
        turns = tl.load(angles + row * HEAD_DIM + columns % HEAD_DIM, inside, 0.0)
        cos, sin = tl.split(tl.reshape(turns, (BLOCK // 2, 2)))
        rotated = tl.join(even * cos - odd * sin, even * sin + odd * cos)
        found = tl.reshape(rotated, (BLOCK,)).to(out.dtype.element_ty)
    tl.store(out + (batch * out_rows + row) * WIDTH + columns, found, inside)


@triton.jit(do_not_specialize=["pixels"])
def _normalize(
    x, gamma, out, pixels, root, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < pixels)[:, None] & (columns < WIDTH)[None, :]
    places = rows[:, None] * WIDTH + columns[None, :]
    numbers = tl.load(x + places, inside, 0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(numbers * numbers, axis=1))
    factor = (root / tl.maximum(length, 1e-12)).to(out.dtype.element_ty).to(tl.float32)
    weight = tl.load(gamma + columns, columns < WIDTH, 0.0).to(out.dtype.element_ty).to(tl.float32)
    found = (numbers * factor[:, None]).to(out.dtype.element_ty).to(tl.float32)
    found = (found * weight[None, :]).to(out.dtype.element_ty)
    if SILU:
        wide = found.to(tl.float32)
        found = (wide / (1.0 + tl.exp(-wide))).to(out.dtype.element_ty)
    tl.store(out + places, found, inside)
