"""The shared leaf under memory.py and dit.py: norms, rotary embedding, attention, modulation.

Norm statistics, modulation and rotation are computed in float32 and results returned in the input's dtype, as the
released model was trained (spec section 7, "Precision"); torch's own norms do so inside, and only autocast, in
training, makes them return float32. All of it is plain torch, so that training can compile it with a memory of any
length; the functions marked `fused` have kernels besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from infworld.fused import fused

EPS = 1e-6  # of every norm in the transformer and the compressor
TRIED = 64  # tokens that a kernel is tried with

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, values (B, heads, L, d) -> as queries
Attending = Callable[[Kernel, Tensor, Tensor, Tensor], Tensor]  # the same of tokens on several devices, by that kernel


class TokenLayout:
    """Where a transformer's tokens are: all here. Others, with the same methods, may split them over devices."""

    def scatter(self, tokens: Tensor, *lengths: int) -> Tensor:
        """(B, L, ...), parts of so many tokens -> those of each part that are here."""
        return tokens

    def gather(self, tokens: Tensor, length: int) -> Tensor:
        """The tokens that are here -> all of them, (B, length, ...)."""
        return tokens

    def attention(self, *lengths: int) -> Attending | None:
        """How tokens elsewhere are attended to; the keys are of parts of so many tokens, the queries the last."""
        return None


LOCAL = TokenLayout()


@dataclass(frozen=True)
class WithKernel(TokenLayout):
    """Another layout, but attention is computed by this kernel, whatever the blocks' own is."""

    layout: TokenLayout
    kernel: Kernel

    def scatter(self, tokens: Tensor, *lengths: int) -> Tensor:
        return self.layout.scatter(tokens, *lengths)

    def gather(self, tokens: Tensor, length: int) -> Tensor:
        return self.layout.gather(tokens, length)

    def attention(self, *lengths: int) -> Attending:
        elsewhere = self.layout.attention(*lengths)
        if elsewhere is None:
            return lambda _, q, k, v: self.kernel(q, k, v)
        return lambda _, q, k, v: elsewhere(self.kernel, q, k, v)


class RMSNorm(nn.Module):
    """The weight of a root-mean-square norm, under its released name; `norm_heads` computes the norm."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Root-mean-square norm over the last axis, with a weight."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS).to(x.dtype) * weight.to(x.dtype)


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last axis without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS).to(x.dtype)


@fused(small=lambda x, shift, scale: (x[:, :TRIED], shift, scale))
def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm, then scale and shift: x (B, L, C), shift and scale float32 (B or 1, 1, C)."""
    return add_product(shift, layer_norm(x), 1 + scale, x.dtype)


@fused(small=lambda first, second, shift, scale: (first[:, :TRIED], second[:, :TRIED], shift, scale))
def modulate_both(first: Tensor, second: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`modulate` of tokens (B, L1, C) and (B, L2, C), joined: (B, L1 + L2, C)."""
    return modulate(torch.cat([first, second], dim=1), shift, scale)


@fused(small=lambda x, result, gate: (x[:, :TRIED], result[:, :TRIED], gate))
def gated_add(x: Tensor, result: Tensor, gate: Tensor) -> Tensor:
    """x + gate * result, summed in float32: x, result (B, L, C), gate float32 (B or 1, 1, C)."""
    return add_product(x, result, gate, x.dtype)


def add_product(a: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    """a + b * c in the widest of their dtypes, rounded once; b has the result's shape."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.addcmul(a, b, c).to(dtype)
    # Rounded while it is written, where a result in float32 would be written and read once more.
    return torch.addcmul(a, b, c, out=torch.empty_like(b, dtype=dtype))


@fused(
    small=lambda x, weight, num_heads, rope: (
        *(x[:, :TRIED], weight, num_heads),
        None if rope is None else rope[:, :TRIED],
    )
)
def norm_heads(x: Tensor, weight: Tensor, num_heads: int, rope: Tensor | None) -> Tensor:
    """RMSNorm over the whole width, then split into heads and rotated: (B, L, C) -> (B, heads, L, C / heads)."""
    x = heads(rms_norm(x, weight), num_heads)
    return x if rope is None else rotate(x, rope)


class Attention(nn.Module):
    """Multi-head attention whose queries and keys are RMS-normalised over the whole width before the heads split.

    `queries` and `keys_values` are apart so that keys and values can come from other tokens or be kept.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim)
        self.norm_k = RMSNorm(dim)
        self.kernel: Kernel = F.scaled_dot_product_attention

    def queries(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """(B, L, C) -> (B, heads, L, C / heads)."""
        return norm_heads(self.q(x), self.norm_q.weight, self.num_heads, rope)

    def keys_values(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, L, C) -> twice (B, heads, L, C / heads)."""
        return norm_heads(self.k(x), self.norm_k.weight, self.num_heads, rope), heads(self.v(x), self.num_heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention: Attending | None = None) -> Tensor:
        """Softmax attention, unmasked, and the output projection: -> (B, L, C).

        attention: where tokens are on other devices (`TokenLayout`).
        """
        attended = self.kernel(q, k, v) if attention is None else attention(self.kernel, q, k, v)
        return self.o(attended.transpose(1, 2).flatten(2))


def heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, L, C) -> (B, heads, L, C / heads), a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


@lru_cache(maxsize=8)  # the same few grids at every step of a film
@torch.inference_mode(False)  # so that what is kept serves training too
def rope_3d(frames: range, height: int, width: int, head_dim: int, device: torch.device) -> Tensor:
    """Cosines and sines of the 3-D rotary embedding, (1, frames * height * width, head_dim / 2, 2) float32.

    head_dim d is split into d - 4 floor(d/6) for time and 2 floor(d/6) each for height and width; base 10000; angles
    in float64 (spec section 7). `frames` are the time positions.
    """
    part = 2 * (head_dim // 6)
    axes = [(frames, head_dim - 2 * part), (range(height), part), (range(width), part)]
    grid = torch.meshgrid(*(torch.tensor(list(p), dtype=torch.float64) for p, _ in axes), indexing="ij")
    angles = torch.cat(
        [
            positions.reshape(-1, 1) * 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            for positions, (_, dim) in zip(grid, axes, strict=True)
        ],
        dim=1,
    )
    return torch.stack([angles.cos(), angles.sin()], dim=-1).unsqueeze(0).float().to(device)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotates consecutive pairs of x (B, heads, L, d) by the angles whose cosines and sines are `rope` of `rope_3d`."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which fuses real numbers only
        (even, odd), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return rotated.flatten(-2).to(x.dtype)


@contextmanager
def fastest_attention(device: torch.device) -> Iterator[None]:
    """A context (or decorator) in which attention takes the fastest backend that this device has for it.

    From Hopper on that is cuDNN's, by half again over torch's own flash attention (spec section 11).
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9:
        yield
        return
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield


def linear_gelu(x: Tensor, layer: nn.Module) -> Tensor:
    """The layer, then tanh GELU."""
    # What wraps a layer, as a LoRA in training does, computes more than its weight tells.
    return affine_gelu(x, layer.weight, layer.bias) if type(layer) is nn.Linear else _gelu(layer(x))


@fused(small=lambda x, weight, bias: (x[:, :TRIED], weight, bias))
def affine_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Tanh GELU of x (B, L, C) through a linear layer."""
    return _gelu(F.linear(x, weight, bias))


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def linear_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in float32 whatever its weights' dtype."""
    with torch.autocast(x.device.type, enabled=False):  # that of training
        return F.linear(x.float(), layer.weight.float(), layer.bias.float())
