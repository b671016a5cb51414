"""Weight files: reading (`.safetensors`, `.ckpt`, `.pth`), strict loading, saving. Knows tensors and modules only.

A module that is loaded here is built on `meta`, so that nothing is initialised only to be overwritten; constant
buffers that are not in the file are therefore made with an explicit `device="cpu"` by the module that owns them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# Left in the released transformer's file by its training; the model computes its positions (spec section 1).
RELEASED_EXTRAS = ("pos_embed", "pos_embed_temporal")

TORCH_SUFFIXES = (".ckpt", ".pth")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
_GIT_LFS = b"version https://git-lfs"
_ZIP = b"PK\x03\x04"  # how a torch file begins, unless it is older than torch 1.6
_NAMED = 4  # names per kind of mismatch in an error

Module = TypeVar("Module", bound=nn.Module)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a weight file by name, on the CPU and mapped from the disk where the format allows it.

    A torch file may keep its tensors at top level or under `state_dict`; what is no tensor is left out.
    Raises FileNotFoundError for a missing file, ValueError for one that cannot be read; nothing in a file is run.
    """
    path = _checked(path)
    if path.suffix == ".safetensors":
        return _read(path, lambda: load_file(path))
    zipped = _begins_with(path, _ZIP)
    data = _read(path, lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=zipped))
    if not isinstance(data, Mapping):
        raise ValueError(f"{path} holds a {type(data).__name__}, not named tensors: it is no checkpoint of this model")
    nested = data.get("state_dict")
    everything = {**data, **nested} if isinstance(nested, Mapping) else data
    tensors = {str(name): value for name, value in everything.items() if isinstance(value, Tensor)}
    if not tensors:
        found = ", ".join(map(str, list(data)[:_NAMED])) or "nothing"
        raise ValueError(f"{path} has no tensors at top level or under 'state_dict' (found: {found}); wrong file?")
    return tensors


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text entries that `save_tensors` wrote beside the tensors of a `.safetensors` file. Errors as above."""
    path = _checked(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: only a .safetensors file has metadata")

    def metadata() -> dict[str, str]:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}

    return _read(path, metadata)


def load_strict(
    build: Callable[[], Module],
    tensors: Mapping[str, Tensor],
    *,
    where: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    drop: tuple[str, ...] = (),
) -> Module:
    """The module that `build` makes, with exactly these tensors as its parameters and buffers, in eval mode.

    build: called under `torch.device("meta")`. where: names the source in errors. dtype: what floating-point
    tensors become (None: as in the file); constants that the module made itself keep their own. drop: names that
    may be there and are ignored. Raises one ValueError that names missing, extra and misshapen tensors.
    """
    with torch.device("meta"):
        module = build()
    tensors = {name: tensor for name, tensor in tensors.items() if name not in drop}
    _check_fit(module.state_dict(), tensors, where)
    placed = {name: _placed(tensor, device, dtype) for name, tensor in tensors.items()}
    module.load_state_dict(placed, strict=True, assign=True)
    return module.to(device).eval()


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes one `.safetensors` file, whole or not at all: a file that was there stays until the new one is complete.

    Missing folders are made. Raises ValueError for another suffix and for a place that cannot be written.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: tensors are saved as .safetensors, not as {path.suffix or 'a file without suffix'}")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    # Copies, because views of one tensor would share memory, which the format does not allow.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(copies, part, dict(metadata or {}))
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write {path}: {error}; choose a folder that is writable and has space") from error
    finally:
        if part.exists():
            part.unlink()


def _checked(path: str | Path) -> Path:
    """The path, if there is a file of a known suffix that could be a checkpoint."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the weight file in it ({', '.join(SUFFIXES)})")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is no weight file by its name: known are {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}: download it there or correct the path in the config")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: download it again")
    if _begins_with(path, _GIT_LFS):
        raise ValueError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` or download the file")
    return path


def _begins_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _read(path: Path, read: Callable[[], object]):
    """Calls `read` and says what is wrong with the file if it fails."""
    try:
        return read()
    except Exception as error:  # a damaged pickle can fail in any way at all
        kind = "safetensors" if path.suffix == ".safetensors" else "torch"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} is truncated or not a {kind} checkpoint: download it again and compare its size ({reason})"
        ) from error


def _check_fit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str | Path) -> None:
    misshapen = (
        f"{name} is {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    )
    kinds = {
        "missing": [name for name in expected if name not in found],
        "extra": [name for name in found if name not in expected],
        "misshapen": list(misshapen),
    }
    problems = [f"{len(names)} {kind}: {_first(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise ValueError(
            f"{where} does not fit the model, by its tensors: {'; '.join(problems)}. "
            "Check that this is the right file and that the config has its sizes"
        )


def _first(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _placed(tensor: Tensor, device: str | torch.device, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else None)
