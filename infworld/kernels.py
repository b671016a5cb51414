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
ERROR_OF_8_BITS = 0.15  # the same; e4m3 has steps of an eighth
LARGEST = 448.0  # number of e4m3
REPEATS = 3


def flash_attention_3() -> Kernel:
    from fa3_fwd_interface import flash_attn_func

    return _tokens_first(flash_attn_func)


def flash_attention_4() -> Kernel:
    from flash_attn.cute import flash_attn_func

    return _tokens_first(flash_attn_func)


def flash_attention_3_in_8_bits() -> Kernel:
    from fa3_fwd_interface import flash_attn_func

    def attend(*qkv: Tensor) -> Tensor:
        (q, q_scale), (k, k_scale), (v, v_scale) = map(to_8_bits, qkv)
        return flash_attn_func(q, k, v, q_descale=q_scale, k_descale=k_scale, v_descale=v_scale)

    return _tokens_first(attend)


def to_8_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L, heads, d) as e4m3, and what each head (B, heads) was divided by, float32."""
    scales = x.abs().amax(dim=(1, 3)).float().clamp_min(1e-12) / LARGEST
    return (x / scales[:, None, :, None].to(x.dtype)).to(torch.float8_e4m3fn), scales


KERNELS: dict[str, Callable[[], Kernel]] = {
    "FlashAttention-3": flash_attention_3,
    "FlashAttention-4": flash_attention_4,
}
NARROW_KERNELS: dict[str, Callable[[], Kernel]] = {"FlashAttention-3 in 8 bits": flash_attention_3_in_8_bits}


def use_fastest(model: InfiniteWorldTransformer, config: ModelConfig) -> str | None:
    """Makes the model's blocks compute attention with the fastest kernel that is installed, by a trial on its device
    with a chunk's tokens and a full memory; returns its name, None for torch's own. One of 8 bits that is faster still
    becomes the model's `narrow_kernel`, for presets that take it.

    A kernel that fails, or whose result differs from torch's by more than rounding, is left out with a warning. Where
    none is installed there is no trial.
    """
    installed, narrow = _installed(KERNELS), _installed(NARROW_KERNELS)
    if not installed and not narrow:
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
        seconds = _seconds(F.scaled_dot_product_attention, q, k, v)
        name, kernel, seconds = _fastest(installed, ERROR, (q, k, v), own, seconds)
        narrow_name, model.narrow_kernel, _ = _fastest(narrow, ERROR_OF_8_BITS, (q, k, v), own, seconds)
    if kernel:
        model.use_kernel(kernel)
    for used in filter(None, (name, narrow_name)):
        log.info("attention by %s", used)
    return name


def _fastest(
    kernels: dict[str, Kernel], allowed: float, qkv: tuple[Tensor, Tensor, Tensor], own: Tensor, seconds: float
) -> tuple[str | None, Kernel | None, float]:
    """Name, kernel and seconds of the fastest that takes less than `seconds`, which are given back if there is none."""
    name, kernel = None, None
    for candidate, tried in kernels.items():
        try:
            found = tried(*qkv)
            taken = _seconds(tried, *qkv)
        except Exception as error:  # such as a kernel for other cards
            _leave_out(candidate, error)
            continue
        error = float((found - own).abs().max() / own.abs().max())
        if not error < allowed:
            log.warning("%s is off by %.1e of torch's attention and is left out", candidate, error)
        elif taken < FASTER * seconds:
            name, kernel, seconds = candidate, tried, taken
    return name, kernel, seconds


def _installed(offered: dict[str, Callable[[], Kernel]]) -> dict[str, Kernel]:
    kernels = {}
    for name, install in offered.items():
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
