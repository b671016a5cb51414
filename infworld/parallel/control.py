"""Control of the ranks: the Team that a World takes, what rank 0 decides, and how the ranks stay together."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _abort_process_group

from infworld.memory_plan import TOO_LITTLE, NotEnoughMemory
from infworld.parallel.supervision import GRACE, Abandoned, Link, caused_elsewhere
from infworld.parallel.tensors import BranchShard, RankGroup, ShardedVAE, TokenShard, shares
from infworld.vae import VideoVAE

T = TypeVar("T")
TIMEOUT = timedelta(hours=1)  # of one exchange of tensors; a lost rank is noticed on the Link long before
FREEING = 0.5  # seconds; without any, a group in two busy processes hung within 40 ends, with 0.2 not in 200


class Team:
    """The processes that make one film together. Made by `join_team`."""

    def __init__(self, device: torch.device, link: Link):
        self.device = device
        self._link = link
        self._make_groups()
        if device.type == "cuda":
            link.interrupt = self._break_off

    def _make_groups(self) -> None:
        size, rank = self._link.size, self._link.rank
        # Not torch's default group, whose connections outlive its end.
        self._everyone, self._pair, self._half = RankGroup.of(dist.new_group()), None, None
        if size % 2 == 0:
            half = size // 2
            pairs = [dist.new_group([place, place + half]) for place in range(half)]
            halves = [dist.new_group(range(first, first + half)) for first in (0, half)]
            self._pair, self._half = RankGroup.of(pairs[rank % half]), RankGroup.of(halves[rank // half])

    @property
    def size(self) -> int:
        return self._link.size

    @property
    def is_rank0(self) -> bool:
        """Whether this is rank 0, which decides."""
        return self._link.rank == 0

    # --------------------------------------------------------------------------------------------------- sharding

    def branches(self, guided: bool) -> BranchShard:
        """How to share out a film, which may be guided at every step and so have two branches of equal work."""
        if guided and self._pair:
            layout = TokenShard(self._half) if self._half.size > 1 else None
            return BranchShard(slice(self._pair.place, self._pair.place + 1), layout, self._pair)
        return BranchShard(slice(None), TokenShard(self._everyone), None)

    def shard_vae(self, vae: VideoVAE) -> ShardedVAE:
        """The VAE with its pictures split over all ranks."""
        return ShardedVAE(vae, lambda: self._everyone)

    def map(self, function: Callable[[Tensor], Tensor], items: list[Tensor]) -> list[Tensor]:
        """`function` of every item, each computed by one rank. All results have one shape."""
        sizes = shares(len(items), self.size)
        begin = sum(sizes[: self._everyone.place])
        own = items[begin : begin + sizes[self._everyone.place]]
        # Where there are more ranks than items, one is computed for the shape.
        results = torch.stack([function(item) for item in own or items[:1]])
        return list(self._everyone.gather(results[: len(own)], 0, sizes).unbind())

    # --------------------------------------------------------------------------------------------------- deciding

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank; where it raises, the others raise Abandoned."""
        if not self.is_rank0:
            return self._link.receive()  # type: ignore[return-value]
        try:
            value = make()
        except BaseException:
            self._link.send(False, None)
            raise
        self._link.send(True, value)
        return value

    def computed_on_rank0(self, function: Callable[..., T]) -> Callable[..., T]:
        """`function` computed by rank 0 for every rank."""
        return lambda *arguments: self.broadcast_from_rank0(lambda: function(*arguments))

    def synced_iterator(self, items: Iterator[T]) -> Generator[T]:
        """The items, made by all ranks `together` as long as rank 0 asks for them."""
        done = object()
        try:
            while True:
                self.broadcast_from_rank0(lambda: None)
                if (item := self.together(lambda: next(items, done))) is done:
                    return
                yield item  # type: ignore[misc]  # not `done`
        except GeneratorExit:
            if self.is_rank0:
                self._link.send(False, None)
            else:  # it hears of that here, if rank 0 ends it too
                with suppress(Abandoned):
                    self._link.receive()
            raise

    def together(self, work: Callable[[], T]) -> T:
        """What `work` returns, done by all ranks at once.

        Raises NotEnoughMemory on all of them where any runs out of memory; the team can go on working then.
        """
        try:
            result = work()
            self._agree()
            return result
        except torch.OutOfMemoryError:
            self._link.report_memory()
        except Exception as error:
            if not (caused_elsewhere(type(error).__name__) and self._link.out_of_memory(within=GRACE)):
                raise
        # Not above, where the error still holds tensors and process groups.
        self._meet_again()
        raise NotEnoughMemory(TOO_LITTLE)

    def _agree(self) -> None:
        """Returns when all ranks have come here. Raises RuntimeError if one is out of memory instead."""
        self._everyone.gather(torch.zeros(1, device=self.device), 0, [1] * self.size).cpu()
        if self._link.out_of_memory():  # and on a GPU the exchange was only broken off
            raise RuntimeError("another rank is out of memory")

    def _break_off(self) -> None:
        """Ends what waits on this GPU for other ranks. Called by another thread than the one that waits."""
        for ranks in (self._pair, self._half, self._everyone):
            if ranks is not None:
                with suppress(RuntimeError):
                    ranks.group.abort()

    def _meet_again(self) -> None:
        """New process groups: a rank that has left an exchange of tensors can't be waited for in the old ones."""
        self._everyone = self._pair = self._half = None  # type: ignore[assignment]  # until _make_groups
        gc.collect()
        _abort_groups()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        store = None
        if self.is_rank0:
            store = dist.TCPStore("127.0.0.1", 0, self.size, is_master=True, wait_for_workers=False)
        port = self._link.meet(store.port if store else None)
        store = store or dist.TCPStore("127.0.0.1", port, self.size, is_master=False)
        _init_groups(self.device, store=store, rank=self._link.rank, world_size=self.size)
        self._make_groups()

    def if_lost(self, rescue: Callable[[], str]) -> None:
        """Sets what rank 0 does, and says, when another one is lost; it runs in a thread of its own."""
        self._link.rescue = rescue

    def fail(self, reason: str) -> None:
        """Ends all processes: the ranks have come apart."""
        self._link.fail(reason)

    def end(self) -> None:
        """Ends all processes, whatever they are doing, without an error."""
        self._link.leave()
        os._exit(0)


def world_size() -> int:
    """How many processes torchrun started with this one; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK", 0))


def device_of_rank(name: str) -> str:
    """The device of this process where `name` (auto, cuda, cpu) is asked of all. ValueError if there are too few."""
    if world_size() == 1 or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    cards = torch.cuda.device_count()
    if world_size() > cards:
        raise ValueError(f"{world_size()} processes, but {cards} GPUs: use --nproc-per-node {cards}")
    return f"cuda:{os.environ['LOCAL_RANK']}"


@contextmanager
def join_team(device: torch.device) -> Iterator[Team | None]:
    """The team of all processes that torchrun started with this one, each on its device; None if it is alone.

    ValueError if they are on several hosts. What is raised within ends the other processes too.
    """
    if world_size() == 1:
        yield None
        return
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        raise ValueError("a film is made on one host: start all processes with one torchrun")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Torch's own watchdog would end the process where an exchange is broken off.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    _init_groups(device)
    link = Link(dist.get_rank(), dist.get_world_size())
    if link.rank:  # follows rank 0, which alone is interrupted
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):  # Windows has no SIGHUP
                signal.signal(getattr(signal, name), signal.SIG_IGN)
    try:
        yield Team(device, link)
    except BaseException as error:
        link.leave(f"{type(error).__name__}: {error}")
        raise
    link.leave()
    end_process_group()


def end_process_group() -> None:
    """Ends the default process group after its last exchange.

    A gloo thread needs Python's lock to free what it has sent, and whoever destroys the group (here, or where a
    DistributedDataParallel ends) holds the lock while waiting for that thread. So the thread gets time to free it
    first; torch offers no way to wait for that.
    """
    time.sleep(FREEING)
    dist.destroy_process_group()


def _init_groups(device: torch.device, **rendezvous) -> None:
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT, **rendezvous)


def _abort_groups() -> None:
    """Ends all process groups of this rank, and with them what waits in them here or on other ranks."""
    with suppress(Exception):  # they may have been ended before
        _abort_process_group()
    with suppress(Exception):
        dist.destroy_process_group()
