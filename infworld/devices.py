"""Device, dtypes and threads that a model uses, and how much memory it may use and has used."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch


def pick_device(name: str) -> torch.device:
    """ "auto" or a torch device name -> device, a GPU with its number. Raises ValueError if it is not available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}: use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported: use auto, cpu or cuda")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} GPUs; use auto or cpu")
    if device.type == "cuda" and device.index is None:  # torch can limit the memory of a numbered GPU only
        return torch.device(f"cuda:{torch.cuda.current_device()}")
    return device


def pick_dtype(device: torch.device, wanted: torch.dtype) -> torch.dtype:
    """`wanted` on a GPU; on a CPU bfloat16 only where it has instructions for it, else float32."""
    if device.type == "cuda":
        return wanted
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    fast = any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    return torch.bfloat16 if fast and wanted != torch.float32 else torch.float32


def pick_threads(threads: int, quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """`threads`, limited to the CPU time that a container has, which may be less than the host's cores.

    More threads would wait for each other. `quota_file` is the kernel's (cgroup v2): microseconds of work per period.
    """
    try:
        quota, period = map(int, quota_file.read_text().split())  # "max" in place of a number: no limit
    except (OSError, ValueError):
        return threads
    return max(1, min(threads, round(quota / period)))


def pick_vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """The VAE's dtype beside a transformer in `dtype`: bfloat16 with it, else float32.

    The reference's is float32 (spec section 7); bfloat16 takes half the memory and about half the time, and
    docs/performance.md says what it costs the picture.
    """
    return dtype if dtype == torch.bfloat16 else torch.float32


def device_name(device: torch.device) -> str:
    """The name to show: "NVIDIA H100 80GB HBM3" or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def limit_memory(device: torch.device, gigabytes: float | None) -> None:
    """Limits this process to so many GB (10^9 bytes) of GPU memory, which plans respect; None: all that is free.

    Raises ValueError for a CPU and unless the limit is positive.
    """
    if gigabytes is None:
        return
    if device.type != "cuda" or not gigabytes > 0:
        raise ValueError(f"memory can be limited on a GPU, to more than 0 GB; not to {gigabytes:g} GB on {device.type}")
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total), device)


def peak_memory(device: torch.device) -> str:
    """The peak memory of this process so far, as text. CPU memory includes files mapped from the disk."""
    gpu = f"GPU {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB, " if device.type == "cuda" else ""
    return f"{gpu}CPU {_peak_resident() / 1e9:.1f} GB"


def _peak_resident() -> int:
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # only where there is Unix

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def release_memory() -> None:
    """Gives the system back what is free in this process, which the C library else keeps in many pieces."""
    with suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
