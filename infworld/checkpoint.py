"""Weight files: reading (`.safetensors`, `.ckpt`, `.pth`), strict loading, saving. Knows tensors and modules only.

A module that is loaded here is built on `meta`, so that nothing is initialised only to be overwritten; constant
buffers that are not in the file are therefore made with an explicit `device="cpu"` by the module that owns them.

No file is ever whole in memory: it is mapped from the disk, and its tensors go one by one to where they are wanted.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from infworld.files import read_unreplaced, temporary_path

# Left in the released transformer's file by its training; the model computes its positions (spec section 1).
RELEASED_EXTRAS = ("pos_embed", "pos_embed_temporal")

TORCH_SUFFIXES = (".ckpt", ".pth")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
_GIT_LFS = b"version https://git-lfs"
_ZIP = b"PK\x03\x04"  # how a torch file begins, unless it is older than torch 1.6
_ZIP_HEADER = 30  # bytes of the header before each of its members, of which the last four are two lengths
_ZIP_END = 22  # bytes of the record at its end
_NAMED = 4  # names per kind of mismatch in an error
_AGAIN = "download it again (the released files: infworld download)"
_PIECE = 2**24  # numbers that are converted and written at a time

_SAFETENSORS_DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint8: "U8", torch.bool: "BOOL"},
}
# Bytes per number of a torch file's storages, where it is not 1.
_STORAGE_BYTES = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2}

Module = TypeVar("Module", bound=nn.Module)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a weight file by name, on the CPU and mapped from the disk where the format allows it.

    A torch file may keep its tensors at top level or under `state_dict`; what is no tensor is left out.
    Raises FileNotFoundError for a missing file, ValueError for one that cannot be read; nothing in a file is run.
    """
    path = check_file(path)
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
    path = check_file(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: only a .safetensors file has metadata")

    def metadata() -> dict[str, str]:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}

    return _read(path, metadata)


def open_safetensors(path: Path) -> safe_open:
    """A `.safetensors` file whose tensors are read one by one, also if another file takes its place meanwhile.

    Raises OSError or SafetensorError if it cannot be read.
    """
    return read_unreplaced(path, lambda: safe_open(path, framework="pt"))


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
    check_fit(shapes_of(module), tensors, where)
    placed = {name: _placed(tensor, device, dtype) for name, tensor in tensors.items()}
    module.load_state_dict(placed, strict=True, assign=True)
    return module.to(device).eval()


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    """The shape of every parameter and buffer by name; the module may be on `meta`."""
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def check_fit(expected: Mapping[str, torch.Size], found: Mapping[str, Tensor], where: str | Path) -> None:
    """Raises one ValueError that names what is missing, extra and misshapen among the tensors `found`."""
    misshapen = (
        f"{name} is {tuple(found[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
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


def save_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Writes one `.safetensors` file, whole or not at all: a file that was there stays until the new one is complete.

    The tensors are written piece by piece, so that mapped ones need no memory. dtype: what floating-point tensors
    become (None: as they are). progress: hears the number of bytes after each piece. ValueError if the file cannot be
    written.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: tensors are saved as .safetensors, not as {path.suffix or 'a file without suffix'}")
    part = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            _write(file, tensors, metadata or {}, dtype, progress or (lambda size: None))
        os.replace(part, path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error}; choose a folder that is writable and has space") from error
    finally:
        if part.exists():
            part.unlink()


def _write(
    file: BinaryIO,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None,
    progress: Callable[[int], object],
) -> None:
    """A safetensors file: length of the header, header (JSON), tensors; the widest first, so that all are aligned."""
    dtypes = {name: _dtype_of(tensor, dtype) for name, tensor in tensors.items()}
    names = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].numel() * dtypes[name].itemsize
        kind, shape = _SAFETENSORS_DTYPES[dtypes[name]], list(tensors[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        for piece in _pieces(tensors[name]):
            progress(file.write(piece.to("cpu", dtypes[name]).view(torch.uint8).numpy().data))


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's numbers in order, flat, some at a time."""
    return iter(tensor.detach().contiguous().flatten().split(_PIECE))


def check_file(path: str | Path) -> Path:
    """The path, if there is a whole file of a known suffix that could be a checkpoint; takes milliseconds.

    Whether a file is whole is seen by its table of contents, which is at the beginning of a `.safetensors` and at the
    end of a torch file. Raises FileNotFoundError, or ValueError with the sizes found and expected.
    """
    path = Path(path).expanduser()
    read_unreplaced(path, lambda: _check_file(path))
    return path


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the weight file in it ({', '.join(SUFFIXES)})")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is no weight file by its name: known are {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(
            f"no weight file at {path}: download it there (the released files: infworld download) "
            "or correct the path in the config"
        )
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty: {_AGAIN}")
    if _begins_with(path, _GIT_LFS):
        raise ValueError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` or download the file")
    if path.suffix == ".safetensors":
        expected = _read(path, lambda: _safetensors_size(path))
        if size != expected:
            raise ValueError(
                f"{path} is truncated or not a safetensors checkpoint: it has {size:,} bytes and not {expected:,}; "
                f"{_AGAIN}"
            )
    elif _begins_with(path, _ZIP) and not _has_zip_end(path):  # an old torch file, or none, is found out by reading it
        expected = max(size + _ZIP_END, _read(path, lambda: _torch_size(path)))
        raise ValueError(f"{path} is truncated: it has {size:,} bytes of {expected:,} or more; {_AGAIN}")


def _safetensors_size(path: Path) -> int:
    """Bytes that the header of a safetensors file promises."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError("its header is not whole")
        header = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + length + max(ends, default=0)


def _has_zip_end(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path):
            return True
    except (zipfile.BadZipFile, OSError):
        return False


def _torch_size(path: Path) -> int:
    """Bytes that the storages of a torch file take, by its pickled table, which is its first member."""
    with path.open("rb") as file:
        file.seek(_ZIP_HEADER - 4)
        file.seek(_ZIP_HEADER + sum(struct.unpack("<HH", file.read(4))))
        table = _StorageTable(file)
        table.load()
    return sum(table.sizes.values())


class _StorageTable(pickle.Unpickler):
    """Reads the sizes of the storages in a torch file's pickle. Calls nothing that stands in it."""

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.sizes: dict[str, int] = {}

    def persistent_load(self, pid: tuple) -> None:
        _, bytes_each, key, _, numbers = pid
        self.sizes[key] = bytes_each * numbers

    def find_class(self, module: str, name: str) -> Any:
        return _STORAGE_BYTES.get(name.removesuffix("Storage"), 1) if name.endswith("Storage") else _Nothing


class _Nothing(dict):
    """Stands for whatever a pickle wants to make."""

    def __init__(self, *args: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


def _dtype_of(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _begins_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _read(path: Path, read: Callable[[], object]):
    """Calls `read` and says what is wrong with the file if it fails."""
    try:
        return read_unreplaced(path, read)
    except Exception as error:  # a damaged pickle can fail in any way at all
        kind = "safetensors" if path.suffix == ".safetensors" else "torch"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        hint = "weights_only" in str(error)  # torch advises to run the file's code, which nobody shall follow
        if hint and (foreign := re.search(r"GLOBAL ([\w.]+)", str(error))):
            raise ValueError(
                f"{path} is not a torch checkpoint of tensors alone: {foreign[1]} in it could run code. "
                "Get the weights as .safetensors from somebody you trust"
            ) from None
        reason = "it is damaged or holds something other than named tensors" if hint else reason
        raise ValueError(
            f"{path} is truncated or not a {kind} checkpoint: {_AGAIN} and compare its size ({reason})"
        ) from (None if hint else error)


def _first(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _placed(tensor: Tensor, device: str | torch.device, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(device, _dtype_of(tensor, dtype))
