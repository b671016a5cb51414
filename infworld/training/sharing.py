"""One training on several GPUs: whole models side by side (DDP) or split ones (FSDP2), and tensors as of one GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from infworld.dit import InfiniteWorldTransformer

WAYS = ("ddp", "fsdp")


def share(learner: nn.Module, model: InfiniteWorldTransformer, way: str) -> nn.Module:
    """The learner as all processes of the group call it; their gradients become means over all of them.

    way: "ddp": each has everything. "fsdp": what learns of `model`, its gradients and its optimizer's state are split;
    what is frozen is not, as it has no such state. Alone, the learner itself.
    """
    if not dist.is_initialized():
        return learner
    if way == "ddp":
        return DistributedDataParallel(learner)
    mesh = dist.init_device_mesh(next(learner.parameters()).device.type, (dist.get_world_size(),))
    frozen = {parameter for parameter in learner.parameters() if not parameter.requires_grad}
    for block in model.blocks:
        fully_shard(block, mesh=mesh, ignored_params=frozen)
        register_fsdp_forward_method(block, "memory_step")
        register_fsdp_forward_method(block, "noisy_step")
    fully_shard(model.latent_encoder, mesh=mesh, ignored_params=frozen)
    register_fsdp_forward_method(model.latent_encoder, "compress")
    return fully_shard(learner, mesh=mesh, ignored_params=frozen)


@contextmanager
def accumulating(learner: nn.Module, more: bool) -> Iterator[None]:
    """Within it gradients stay with their process if there is `more` of the step to come."""
    if isinstance(learner, FSDPModule):
        learner.set_requires_gradient_sync(not more)
        yield
    elif isinstance(learner, DistributedDataParallel) and more:
        with learner.no_sync():
            yield
    else:
        yield


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be split over the processes, whole on the CPU; all of them have to ask for it."""
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().cpu()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor on the device of `other`, split as that is."""
    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements) if isinstance(other, DTensor) else tensor


def any_of_all(flag: bool) -> bool:
    """Whether any process says so."""
    return mean_of_all(float(flag)) > 0


def mean_of_all(value: float) -> float:
    """The mean of the processes' values."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(value, dtype=torch.float64)  # on the CPU, where every group has gloo
    dist.all_reduce(shared)
    return shared.item() / dist.get_world_size()


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """What an optimizer remembers of named parameters, whole on the CPU; empty before its first step."""
    return {
        name: {key: whole(value) for key, value in optimizer.state[parameter].items()}
        for name, parameter in parameters.items()
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Any]
) -> None:
    """Takes up what `optimizer_state` gave."""
    for name, parameter in parameters.items():
        remembered = state[name].items()
        optimizer.state[parameter] = {
            key: value if key == "step" else split_like(value, parameter) for key, value in remembered
        }


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean over all processes of the gradients of parameters that each has whole."""
    if not dist.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    parts = (together / dist.get_world_size()).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
