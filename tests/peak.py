"""The most memory that tensors take, on any device."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors of one kind of device that are made within it and still alive."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device
        self.alive: set[int] = set()
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device:
                self.add(tensor.untyped_storage())
        self.most = max(self.most, self.now)
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.alive:
            self.alive.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())

    def freed(self, name: int, size: int) -> None:
        self.alive.discard(name)
        self.now -= size
