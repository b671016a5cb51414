"""Which of the shared functions of layers.py and vae.py a kernel computes in one pass over memory, and where.

Norms, modulation and rotation take plain torch several passes each. The kernels are triton_kernels.py's; Triton comes
with torch for GPUs. Plain torch stays the reference: it is used on a CPU, with gradients, in what is compiled,
under autocast, without Triton, and wherever a kernel fails its trial.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec, cast

import torch
from torch import Tensor

log = logging.getLogger(__name__)

KERNELS = "infworld.triton_kernels"  # imported when a GPU first needs it
# By how much of the largest value a kernel may deviate: rounding, and no more.
ALLOWED = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
DEVICES = {"cuda"}

P = ParamSpec("P")

_plain: ContextVar[bool] = ContextVar("plain", default=False)
_said: set[str] = set()  # warnings: several kernels may fail for one reason


@contextmanager
def plain_torch() -> Iterator[None]:
    """A context without kernels, to compare them with."""
    before = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(before)


def fused(small: Callable[P, tuple]) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Lets the kernel of the same name take the function's place where it can.

    small: the function's arguments -> fewer of them, for a trial. The first call for a device, a dtype and a width
    compares the two on these, once in a process: not when a model is loaded, as on ZeroGPU there is no GPU then. A
    kernel that fails, or differs by more than rounding, is left out with a warning.
    """

    def decorate(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        fastest: dict[tuple[torch.device, torch.dtype, int], Callable[P, Tensor]] = {}

        @wraps(function)
        def chosen(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            x = cast(Tensor, args[0])
            if torch.compiler.is_compiling() or torch.is_grad_enabled() or not _allowed(x):
                return function(*args, **kwargs)
            key = (x.device, x.dtype, x.shape[-1])
            if key not in fastest:
                fastest[key] = _kernel(function) if _passes_trial(function, small(*args, **kwargs)) else function
            return fastest[key](*args, **kwargs)

        return chosen

    return decorate


def _allowed(x: Tensor) -> bool:
    return x.device.type in DEVICES and not _plain.get() and not torch.is_autocast_enabled(x.device.type)


def _kernel(function: Callable) -> Callable:
    return getattr(importlib.import_module(KERNELS), function.__name__)


def _passes_trial(function: Callable, args: tuple) -> bool:
    name = function.__name__
    with plain_torch():
        expected = function(*args)
    try:
        found = _kernel(function)(*args)
        error = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
    except torch.OutOfMemoryError:
        raise
    except ModuleNotFoundError:
        log.info("%s without a kernel: Triton is not installed", name)
        return False
    except Exception as error:  # of any kind: such as no C compiler, or a card that Triton does not know
        _warn_once(f"kernels of Triton do not run here, and plain torch takes their place: {reason(error)}")
        return False
    if found.shape != expected.shape or not error <= ALLOWED[expected.dtype]:
        _warn_once(f"the kernel for {name} is off by {error:.1e} of torch's result and is left out")
        return False
    return True


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _warn_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        log.warning(message)
