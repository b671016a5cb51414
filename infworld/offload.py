"""Weights and memory streams that stay in CPU memory and are streamed through the GPU as they are used. Under dit.py.

Double buffering: while one item is used, the next is copied into the other slot, so that a film waits for copies only
where they take longer than the computation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

SLOTS = 2


class StreamedBlocks(nn.ModuleList):
    """A model's blocks, in CPU memory; iterating yields each on `device`.

    A block is valid until the next one is requested. Names and order of the parameters are unchanged.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device):
        super().__init__(blocks.children())
        # In a tuple, so that it does not count as a part of the model.
        self._form = (copy.deepcopy(blocks[0]).to("meta"),)
        self._device = device
        for parameter in self.parameters():
            parameter.data = _to_cpu(parameter.data, pinned=device.type == "cuda")

    def __iter__(self) -> Iterator[nn.Module]:
        slots = [copy.deepcopy(self._form[0]).to_empty(device=self._device) for _ in range(SLOTS)]
        items = [list(block.parameters()) for block in self.children()]
        for slot in copied_ahead(items, [list(slot.parameters()) for slot in slots], self._device):
            yield slots[slot]


class StreamedTensors:
    """Tensors of one shape, copied to CPU memory as they come; iterating yields each on the device that it came from.

    A tensor is valid until the next one is requested.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        self._kept = []
        for tensor in tensors:
            self._kept.append(_to_cpu(tensor, pinned=tensor.device.type == "cuda"))
            self._device = tensor.device

    def __iter__(self) -> Iterator[Tensor]:
        slots = [torch.empty_like(self._kept[0], device=self._device) for _ in range(SLOTS)]
        for slot in copied_ahead([[kept] for kept in self._kept], [[slot] for slot in slots], self._device):
            yield slots[slot]


class Recomputed:
    """Tensors that are not kept: every iteration computes them again."""

    def __init__(self, make: Callable[[], Iterator[Tensor]]):
        self._make = make

    def __iter__(self) -> Iterator[Tensor]:
        return self._make()


def copied_ahead(
    items: Sequence[Sequence[Tensor]], slots: Sequence[Sequence[Tensor]], device: torch.device
) -> Iterator[int]:
    """Copies each item into a slot, in turn, and yields the slot: on a GPU while the previous item is used."""
    working = torch.cuda.current_stream(device) if device.type == "cuda" else None
    copying = torch.cuda.Stream(device) if device.type == "cuda" else None

    def wait(stream: torch.cuda.Stream | None, other: torch.cuda.Stream | None) -> None:
        if stream is not None and other is not None:
            stream.wait_stream(other)

    def fetch(i: int) -> None:
        wait(copying, working)  # the slot may still be in use
        with torch.cuda.stream(copying):
            for place, tensor in zip(slots[i % SLOTS], items[i], strict=True):
                place.copy_(tensor, non_blocking=True)

    try:
        fetch(0)
        for i in range(len(items)):
            wait(working, copying)
            if i + 1 < len(items):
                fetch(i + 1)
            yield i % SLOTS
    finally:
        wait(working, copying)  # so that nothing is copied into a slot after it was freed


def _to_cpu(tensor: Tensor, pinned: bool) -> Tensor:
    """A copy in CPU memory; pinned, so that copies to and from a GPU overlap with its work."""
    return torch.empty_like(tensor, device="cpu", pin_memory=pinned).copy_(tensor, non_blocking=pinned)
