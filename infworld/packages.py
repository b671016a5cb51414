"""A block's two steps compiled ahead of time, where torch.compile does not work (ZeroGPU) or takes too long.

A package is native code for one kind of device and one version of torch. It holds no weights, so that one package
serves all blocks of a model; the lengths of memory, noise and text may vary. `make` writes it, `apply` finds one that
fits.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import platform
import threading
from collections.abc import Iterable
from contextlib import nullcontext
from contextvars import Context
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor

from infworld import layers
from infworld.config import ModelConfig, TransformerConfig
from infworld.dit import Block, InfiniteWorldTransformer, inductor_options
from infworld.fused import ALLOWED
from infworld.layers import fastest_attention, rope_3d
from infworld.memory import MAX_SINGLE_PASS, memory_latents

log = logging.getLogger(__name__)

STEPS = {"memory_step": 1, "noisy_step": 2}  # of a block; how many tensors of tokens each takes
RECORD = "blocks.json"  # records what a package was made for; written last, so that it marks a complete package
# Prefixes of the kernel's names for the instruction sets that a compiler may use.
INSTRUCTIONS = ("sse", "ssse", "avx", "fma", "f16c", "bmi", "abm", "popcnt", "movbe", "adx", "amx", "asimd", "sve")
_USELESS = "the blocks compiled ahead of time do not work here, so on without: %s"


def folder_name(name: str, device: torch.device) -> str:
    """Of the package for a model and the device: "blocks-infinite-world-sm90-torch2.11"."""
    return f"blocks-{name}-{_kind(device)}-torch{'.'.join(torch.__version__.split('.')[:2])}"


def make(config: ModelConfig, device: torch.device, dtype: torch.dtype, folder: Path) -> float:
    """Compiles the steps of the model's blocks into `folder`, which takes about a minute and no weights.

    Returns the largest deviation from uncompiled blocks, relative to the largest value. Raises ValueError where that is
    more than rounding; the folder then holds no package any more.
    """
    import spaces  # patches torch on ZeroGPU; not needed elsewhere in this library

    sizes = config.model_cfg
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)
    block = Block(sizes.dim, sizes.ffn_dim, sizes.num_heads).to(device, dtype).eval().requires_grad_(False)
    grid = tuple(side // config.token_pixels for side in config.largest_bucket)
    any_length = torch.export.Dim.DYNAMIC
    with torch.no_grad(), fastest_attention(device):
        for step, tokens in STEPS.items():
            block.forward = getattr(block, step)
            latents = (config.chunk_latents, memory_latents(MAX_SINGLE_PASS))[-tokens:]
            inputs = _inputs(block, latents, grid, config.text_encoder_cfg.model_max_length)
            shapes = (*[{1: any_length}] * tokens, None, {1: any_length}, ({2: any_length},) * 2)
            exported = torch.export.export(block, inputs, dynamic_shapes=shapes, strict=False)
            # On a CPU with as many threads as there are when a film is made, not now.
            options = {"cpp.dynamic_threads": True, **inductor_options()}
            spaces.aoti_compile_and_save(folder, exported, options, submodule=step)
        del block.forward
        deviation = _deviation(block, {step: _Code(_package(folder, step)) for step in STEPS})
    if not deviation <= ALLOWED[dtype]:
        raise ValueError(f"the compiled blocks deviate by {deviation:.1e} of the largest value: they are of no use")
    record = {"model": config.name, **_fingerprint(sizes, device, dtype)}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return deviation


def apply(transformer: InfiniteWorldTransformer, places: Iterable[Path]) -> bool:
    """Makes the blocks use a fitting package; returns whether there is one.

    places: folders to look in. A package that is damaged, or fails later, is logged in one line, and the blocks work
    without it.
    """
    try:
        folders = dict.fromkeys(place.absolute() for place in places)
        records = [path for place in folders for path in sorted(place.glob(f"blocks-*/{RECORD}"))]
        if not records:
            return False
        wanted = _fingerprint(transformer.config, transformer.patch_embedding.weight.device, transformer.dtype)
        folder = _fitting(wanted, records)
        if folder is None:
            return False
        codes = {step: _Code(_package(folder, step)) for step in STEPS}
    except Exception as error:  # of any kind: blocks work without a package
        log.warning(_USELESS, error)
        return False
    for step, code in codes.items():
        for block in transformer.blocks:
            setattr(block, step, _Step(block, step, code))
    log.info("blocks compiled ahead of time: %s", folder)
    return True


class _Code:
    """One step's package: loaded when it is first called, once in each process, and shared by all blocks."""

    def __init__(self, path: Path):
        from spaces.zero.torch.aoti import LazyAOTIModel

        self.works = True
        self._model = LazyAOTIModel(str(path))
        # It loads once per context, of which every thread has its own.
        self._context, self._one_at_a_time = Context(), threading.Lock()

    def __call__(self, weights: dict[str, Tensor], *inputs: Any) -> Tensor:
        device = torch.cuda.device(inputs[0].device) if inputs[0].is_cuda else nullcontext()
        with device, self._one_at_a_time:
            # A new dict, or it would not notice where the weights are now.
            return self._context.run(self._model, dict(weights), True, *inputs)


class _Step:
    """Takes the place of a block's step, which still handles what the package was not made for."""

    def __init__(self, block: Block, step: str, code: _Code):
        self._own = getattr(block, step)
        self._code = code
        # The parameters themselves: ZeroGPU moves them after the model is loaded.
        self._weights = dict(block.named_parameters())
        self._count = STEPS[step] + 3

    def __call__(self, *inputs: Any) -> Tensor:
        x, attention = inputs[0], any(inputs[self._count :])
        fits = len(x) == 1 and x.dtype == self._weights["modulation"].dtype
        if attention or not fits or torch.is_grad_enabled() or not self._code.works:
            return self._own(*inputs)
        try:
            return self._code(self._weights, *inputs[: self._count])
        except Exception as error:  # of any kind: the block's own step works, or reports it better
            self._code.works = False
            log.warning(_USELESS, error)
            return self._own(*inputs)


def _package(folder: Path, step: str) -> Path:
    return folder / "submodules" / step / "package.pt2"  # as `spaces` has it


def _fitting(wanted: dict[str, Any], records: Iterable[Path]) -> Path | None:
    """The folder of the first complete package whose record matches what is wanted."""
    for path in records:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            other = [key for key in wanted if key != "instructions" and found[key] != wanted[key]]
            if not set(found["instructions"]) <= set(wanted["instructions"]):
                other.append("instructions")
            if other:
                log.info("%s was made for other %s", path.parent, ", ".join(other))
                continue
            for step in STEPS:
                with ZipFile(_package(path.parent, step)) as package:
                    if name := package.testzip():
                        raise ValueError(f"{name} in {package.filename} is not what was written")
            return path.parent
        except (OSError, ValueError, KeyError, TypeError, BadZipFile) as error:
            log.warning("%s is damaged, so on without: %s", path.parent, error)
    return None


def _fingerprint(sizes: TransformerConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What must be equal where a package is made and where it is used, as JSON values.

    The CPU's instructions count for a GPU's package too, whose kernels are called by code for the CPU; those of the
    package have to be among those of the machine.
    """
    code = inspect.getsource(Block) + inspect.getsource(layers)
    return {
        "sizes": {name: getattr(sizes, name) for name in ("dim", "ffn_dim", "num_heads")},
        "dtype": str(dtype).removeprefix("torch."),
        "device": _kind(device),
        "torch": str(torch.__version__),
        "system": f"{platform.system()} {platform.machine()}",
        "instructions": _instructions(),
        "code": hashlib.sha256(code.encode()).hexdigest(),
    }


def _kind(device: torch.device) -> str:
    return "sm{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else "cpu"


def _instructions(cpus: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Names of the CPU's instruction sets; none where the system does not tell."""
    try:
        lines = cpus.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return sorted({flag for flag in flags.split() if flag.startswith(INSTRUCTIONS)})


def _inputs(block: Block, latents: tuple[int, ...], grid: tuple[int, int], text: int) -> tuple:
    """What a step takes, random: tokens of so many latents of `grid` patches each (noise before memory), and text."""
    weight = block.modulation
    dim, heads = weight.shape[-1], block.self_attn.num_heads

    def draw(tokens: int) -> Tensor:
        return torch.randn(1, tokens, dim, device=weight.device, dtype=weight.dtype)

    tokens = [draw(number * grid[0] * grid[1]) for number in latents]
    modulation = torch.randn(1, 6, dim, device=weight.device)
    rope = rope_3d(range(sum(latents)), *grid, dim // heads, weight.device)
    return *tokens, modulation, rope, block.cross_attn.keys_values(draw(text))


def _deviation(block: Block, codes: dict[str, _Code]) -> float:
    """The largest difference between steps and packages, of the largest value, for lengths that are not their own."""
    weights, found = dict(block.named_parameters()), []
    for step, code in codes.items():
        for memory in (1, 3):
            inputs = _inputs(block, (2, memory)[-STEPS[step] :], (4, 6), text=7)
            expected = getattr(block, step)(*inputs)
            found.append((code(weights, *inputs) - expected).abs().max() / expected.abs().max())
    return float(torch.stack(found).max())  # NaN if any is
