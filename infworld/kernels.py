"""Which kernel computes attention on a GPU: torch's own, or an installed FlashAttention where that is faster here.

An option, never a requirement: FlashAttention-3 from the package `fa3-fwd` (Shah et al., 2024), FlashAttention-4 from
`flash-attn-4`, both for Hopper and later cards.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from infworld.config import ModelConfig
from infworld.dit import InfiniteWorldTransformer
from infworld.fused import reason
from infworld.layers import Kernel, fastest_attention

log = logging.getLogger(__name__)

FASTER = 0.97  # of the time of torch's own: what is less is not worth another kernel
ERROR = 1e-2  # relative to the largest value of torch's own result; rounding to bfloat16 makes 4e-3
REPEATS = 3


def flash_attention_3() -> Kernel:
    from fa3_fwd_interface import flash_attn_func

    return _tokens_first(flash_attn_func)


def flash_attention_4() -> Kernel:
    from flash_attn.cute import flash_attn_func

    return _tokens_first(flash_attn_func)


KERNELS: dict[str, Callable[[], Kernel]] = {
    "FlashAttention-3": flash_attention_3,
    "FlashAttention-4": flash_attention_4,
}


def use_fastest(model: InfiniteWorldTransformer, config: ModelConfig) -> str | None:
    """Makes the model's blocks compute attention with the fastest kernel that is installed, by a trial on its device
    with a chunk's tokens and a full memory; returns its name, None for torch's own.

    A kernel that fails, or whose result differs from torch's by more than rounding, is left out with a warning. Where
    none is installed there is no trial.
    """
    if not (installed := _installed()):
        return None
    sizes = config.model_cfg
    shape = sizes.num_heads, sizes.dim // sizes.num_heads
    device = model.patch_embedding.weight.device
    generator = torch.Generator(device).manual_seed(0)

    def draw(tokens: int) -> Tensor:  # laid out as the blocks do
        flat = torch.randn(1, tokens, *shape, generator=generator, device=device)
        return flat.to(model.dtype).transpose(1, 2)

    height, width = config.buckets[0]
    tokens = config.chunk_latents * (height // config.token_pixels) * (width // config.token_pixels)
    q, k, v = draw(tokens), draw(2 * tokens), draw(2 * tokens)
    with torch.inference_mode(), fastest_attention(device):
        own = F.scaled_dot_product_attention(q, k, v)
        best, name, kernel = FASTER * _seconds(F.scaled_dot_product_attention, q, k, v), None, None
        for candidate, tried in installed.items():
            try:
                found = tried(q, k, v)
                seconds = _seconds(tried, q, k, v)
            except Exception as error:  # such as a kernel for other cards
                _leave_out(candidate, error)
                continue
            error = float((found - own).abs().max() / own.abs().max())
            if not error < ERROR:
                log.warning("%s is off by %.1e of torch's attention and is left out", candidate, error)
            elif seconds < best:
                best, name, kernel = seconds, candidate, tried
    if kernel:
        model.use_kernel(kernel)
        log.info("attention by %s", name)
    return name


def _installed() -> dict[str, Kernel]:
    kernels = {}
    for name, install in KERNELS.items():
        try:
            kernels[name] = install()
        except ModuleNotFoundError:
            continue
        except Exception as error:  # such as one that was built for another torch
            _leave_out(name, error)
    return kernels


def _leave_out(name: str, error: Exception) -> None:
    log.warning("%s does not run here and is left out: %s", name, reason(error))


def _tokens_first(function: Callable) -> Kernel:
    """For functions of (B, L, heads, d), which may return more than the result."""

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = function(*(x.transpose(1, 2) for x in (q, k, v)))
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

    return kernel


def _seconds(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> float:
    """The least of some calls after the first."""
    times = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        kernel(q, k, v)
        if q.is_cuda:
            torch.cuda.synchronize(q.device)
        times.append(time.perf_counter() - began)
    return min(times[1:])
