"""One film on several devices of a host, one process each: who computes what, and what happens when one is lost.

`torchrun --nproc-per-node N` starts the processes; `join_team` makes a Team of them, which a World takes. Guidance's
two texts go to two halves of an even team, and the tokens of each are split over its half; an odd team, or a film
without guidance, splits the tokens over all. Attention trades tokens for heads (DeepSpeed's Ulysses): everything else
of a block is per token. The VAE is split by rows of the picture, which trade the rows at their borders before each
convolution. All ranks keep the same latents, and nothing is approximated: results differ from one device's by rounding.

Rank 0 decides: it alone hears callbacks, writes and stops, and the others follow. That goes over plain sockets, the
Link, on which a process that dies is noticed at once, while whoever waits for it on a GPU would wait for ever.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Client, Connection, Listener, wait
from queue import SimpleQueue
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh

log = logging.getLogger(__name__)

T = TypeVar("T")
LOST = 1  # the exit code of a process whose team is broken
GRACE = 3.0  # seconds in which an error turns out to be the loss of another rank
PATIENCE = 10.0  # seconds that the other ranks have to end when rank 0 has
GONE = object()  # what comes after rank 0's last value
TIMEOUT = timedelta(hours=1)  # of one exchange of tensors; a lost rank is noticed on the Link long before


class Abandoned(Exception):
    """Raised on the other ranks when rank 0 has ended what they do together."""


# ---------------------------------------------------------------------------------------------------- splitting tensors


def shares(total: int, parts: int) -> list[int]:
    """`total` things for so many: as evenly as it goes, the first get one more."""
    return [total // parts + (part < total % parts) for part in range(parts)]


@dataclass(frozen=True)
class RankGroup:
    """The ranks of a group and this one's place among them. Splits and gathers along any axis of a tensor."""

    group: ProcessGroup
    size: int
    place: int

    @staticmethod
    def of(group: ProcessGroup) -> RankGroup:
        return RankGroup(group, dist.get_world_size(group), dist.get_rank(group))

    def own(self, x: Tensor, dim: int, sizes: list[int] | None = None) -> Tensor:
        """This rank's part of x along an axis, split into `sizes`, by default evenly."""
        return x.split(sizes or shares(x.shape[dim], self.size), dim)[self.place]

    def whole(self, x: Tensor, dim: int, sizes: list[int]) -> Tensor:
        """The parts of all ranks, joined along an axis of which rank i has sizes[i]."""
        longest = max(sizes)
        x = x.movedim(dim, 0)
        part = x.new_zeros(longest, *x.shape[1:])
        part[: len(x)] = x
        parts = x.new_empty(self.size * longest, *x.shape[1:])
        dist.all_gather_into_tensor(parts, part, group=self.group)
        pieces = [piece[:size] for piece, size in zip(parts.split(longest), sizes, strict=True)]
        return torch.cat(pieces).movedim(0, dim)

    def exchange(self, x: Tensor, gives: list[int], takes: list[int]) -> list[Tensor]:
        """Sends gives[i] numbers of the flat x to rank i; what the ranks sent here, of takes[i] numbers each."""
        received = x.new_empty(sum(takes))
        dist.all_to_all_single(received, x.reshape(-1), takes, gives, group=self.group)
        return list(received.split(takes))


@dataclass(frozen=True)
class Sequence:
    """The tokens of one branch over several ranks."""

    members: RankGroup

    def own(self, tokens: Tensor) -> Tensor:
        """(B, L, ...) -> this rank's part of the L tokens."""
        return self.members.own(tokens, 1)

    def whole(self, tokens: Tensor, length: int) -> Tensor:
        """This rank's tokens (B, l, ...) -> all of them, (B, length, ...)."""
        return self.members.whole(tokens, 1, shares(length, self.members.size))

    def attention(self, *lengths: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Attention of tokens that are split, as a function of this rank's queries, keys and values (B, heads, l, d).

        lengths: of the parts that the keys consist of, each split by itself; the queries are the last of them.
        """
        parts = [shares(length, self.members.size) for length in lengths]
        return partial(_attend, self.members, parts[-1], [sum(each) for each in zip(*parts, strict=True)])


def _attend(members: RankGroup, queries: list[int], keys: list[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rank i has queries[i] queries and keys[i] keys of all heads; in between, each has all tokens of some heads."""
    batch, dim = q.shape[0], q.shape[-1]
    heads = shares(q.shape[1], members.size)
    own, number = heads[members.place], batch * dim
    packed = torch.cat([x.transpose(0, 1) for x in (q, k, v)], dim=2)  # heads first: a rank's are one piece of memory
    rows = [mine + 2 * theirs for mine, theirs in zip(queries, keys, strict=True)]
    gives = [count * rows[members.place] * number for count in heads]
    pieces = members.exchange(packed, gives, [own * count * number for count in rows])
    split = [
        piece.view(own, batch, count, dim).split([mine, theirs, theirs], dim=2)
        for piece, count, mine, theirs in zip(pieces, rows, queries, keys, strict=True)
    ]
    # A rank without a head (there are more ranks than heads) has nothing to attend with.
    q, k, v = (torch.cat(parts, dim=2).transpose(0, 1) for parts in zip(*split, strict=True))
    attended = F.scaled_dot_product_attention(q, k, v) if own else q
    flat = torch.cat([part.transpose(0, 1).reshape(-1) for part in attended.split(queries, dim=2)])
    here = queries[members.place]
    pieces = members.exchange(flat, [own * count * number for count in queries], [c * here * number for c in heads])
    return torch.cat(pieces).view(-1, batch, here, dim).transpose(0, 1)


@dataclass(frozen=True)
class SpatialShard:
    """A picture's rows over several ranks, for the VAE; `sizes` are those of the latents, larger grids have multiples.

    Its tensors are B T H W C, as inside the VAE.
    """

    members: RankGroup
    sizes: list[int]

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This rank's rows; `dim` is the axis of the rows."""
        return self.members.own(x, dim, self._scaled(x.shape[dim], sum(self.sizes)))

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """All ranks' rows."""
        return self.members.whole(x, dim, self._scaled(x.shape[dim], self.sizes[self.members.place]))

    def largest(self, pixels: int) -> int:
        """The pixels of the rank that has most, where this one has `pixels`."""
        return pixels // self.sizes[self.members.place] * max(self.sizes)

    def bordered(self, x: Tensor) -> Tensor:
        """x with one more row above and below: the neighbours', or zeros at the picture's edges."""
        place, size = self.members.place, self.members.size
        edges = [x[:, :, :1], x[:, :, -1:]]
        number = edges[0].numel()
        counts = [number if abs(rank - place) == 1 else 0 for rank in range(size)]
        given = [edge for edge, there in zip(edges, (place > 0, place < size - 1), strict=True) if there]
        taken = self.members.exchange(torch.stack(given), counts, counts)
        above = taken[place - 1].view_as(edges[0]) if place > 0 else torch.zeros_like(edges[0])
        below = taken[place + 1].view_as(edges[0]) if place < size - 1 else torch.zeros_like(edges[0])
        return torch.cat([above, x, below], dim=2)

    def _scaled(self, rows: int, of: int) -> list[int]:
        return [size * rows // of for size in self.sizes]


@dataclass(frozen=True)
class Split:
    """How the branches (one per text) of a film are shared out: this rank's are `own`, each over `sequence`.

    pair: who has the other branch, where there is one and it is another rank's.
    """

    own: slice
    sequence: Sequence | None
    pair: RankGroup | None

    def both(self, velocity: Tensor) -> tuple[Tensor, Tensor]:
        """The velocities of both branches of a pair, from that of this rank's."""
        positive, negative = self.pair.whole(velocity.unsqueeze(0), 0, [1, 1]).unbind()
        return positive, negative


# ------------------------------------------------------------------------------------------------------------- the team


class Team:
    """The processes that make one film together. Made by `join_team`.

    turn: to be held on rank 0 where several threads have work for the team.
    """

    def __init__(self, device: torch.device, link: Link):
        self.device = device
        self._link = link
        self._interrupted = False
        self.turn = threading.Lock()
        mesh = init_device_mesh(device.type, (link.size,), mesh_dim_names=("all",))
        self._everyone = RankGroup.of(mesh.get_group("all"))
        self._halves = None
        if link.size % 2 == 0:
            mesh = init_device_mesh(device.type, (2, link.size // 2), mesh_dim_names=("branch", "sequence"))
            self._halves = RankGroup.of(mesh.get_group("branch")), RankGroup.of(mesh.get_group("sequence"))

    @property
    def size(self) -> int:
        return self._link.size

    @property
    def is_rank0(self) -> bool:
        """Whether this is rank 0, which decides."""
        return self._link.rank == 0

    def split(self, guided: bool) -> Split:
        """The way to share out a film, which may be guided at every step and so have two branches of equal work."""
        if guided and self._halves:
            pair, half = self._halves
            return Split(slice(pair.place, pair.place + 1), Sequence(half) if half.size > 1 else None, pair)
        return Split(slice(None), Sequence(self._everyone), None)

    def rows(self, rows: int) -> SpatialShard | None:
        """The way to share out a picture of so many rows of latents; None if they are too few to be shared."""
        return SpatialShard(self._everyone, shares(rows, self.size)) if rows >= self.size else None

    def each(self, function: Callable[[Tensor], Tensor], items: list[Tensor]) -> list[Tensor]:
        """`function` of every item, each computed by one rank. All results have one shape."""
        sizes = shares(len(items), self.size)
        begin = sum(sizes[: self._everyone.place])
        own = items[begin : begin + sizes[self._everyone.place]]
        # Where there are more ranks than items, one is computed for the shape.
        results = torch.stack([function(item) for item in own or items[:1]])
        return list(self._everyone.whole(results[: len(own)], 0, sizes).unbind())

    # --------------------------------------------------------------------------------------------------- deciding

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, on every rank; where it raises, the others raise Abandoned."""
        if not self.is_rank0:
            return self._link.receive()
        try:
            if self._interrupted:
                raise KeyboardInterrupt
            value = make()
        except BaseException:
            self._link.send(False, None)
            raise
        self._link.send(True, value)
        return value

    def computed_on_rank0(self, function: Callable[..., T]) -> Callable[..., T]:
        """`function` computed by rank 0 for every rank."""
        return lambda *arguments: self.broadcast_from_rank0(lambda: function(*arguments))

    def synced_iterator(self, items: Iterator[T]) -> Iterator[T]:
        """The items, made on every rank as long as rank 0 asks for them."""
        done = object()
        try:
            while True:
                self.broadcast_from_rank0(lambda: None)
                if (item := next(items, done)) is done:
                    return
                yield item
        except GeneratorExit:
            if self.is_rank0:
                self._link.send(False, None)
            else:  # it hears of that here, if rank 0 ends it too
                with suppress(Abandoned):
                    self._link.receive()
            raise

    @contextmanager
    def defer_signals(self) -> Iterator[None]:
        """Within it Ctrl-C and SIGTERM wait for the end of a step, so that the ranks stop at the same place."""
        if not self.is_rank0:
            yield
            return

        def note(number, frame) -> None:
            self._interrupted = True

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            self._interrupted = False
            for number, handler in before.items():
                signal.signal(number, handler)

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
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    link = Link(dist.get_rank(), dist.get_world_size())
    if link.rank:  # follows rank 0, which alone is interrupted
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    try:
        yield Team(device, link)
    except BaseException as error:
        link.leave(f"{type(error).__name__}: {error}")
        raise
    link.leave()
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------- the link


class Link:
    """Sockets from rank 0 to the others: its decisions one way, and the end of a process both ways.

    A thread reads them. Messages: ("value", whether there is one, what), ("bye",), ("failed", why). Where a rank fails
    or goes without a bye, rank 0 does what `rescue` says, tells it and ends, and the others end with it.
    """

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self.rescue: Callable[[], str] = lambda: "all processes end"
        self._left = False
        self._values: SimpleQueue = SimpleQueue()
        self._closing = threading.Lock()
        self._peers = self._connect()
        self._present = dict(self._peers)
        self._watcher = threading.Thread(target=self._watch, name="link", daemon=True)
        self._watcher.start()

    def send(self, there: bool, value: object) -> None:
        """From rank 0: a value, or that there will be none."""
        self._tell("value", there, value)

    def receive(self) -> object:
        """On the other ranks: what rank 0 sent. Abandoned if there is none, as always after it has left."""
        there, value = self._values.get()
        if value is GONE:
            self._values.put((there, value))
        if not there:
            raise Abandoned("rank 0 has ended the work")
        return value

    def leave(self, failure: str | None = None) -> None:
        """Ends this process's part: as planned, or by an error, unless that is only how the loss of another shows."""
        self._left = failure is None
        if self._left:
            self._tell("bye")
            self._watcher.join()  # until the others have left too
        else:
            self._watcher.join(GRACE if _by_another(failure) else 0)
            self._tell("failed", failure)

    def fail(self, reason: str) -> None:
        """Ends this process and with it all others."""
        self._end(f"rank {self.rank} failed: {reason}")

    def _connect(self) -> dict[int, Connection]:
        """The connections by rank: rank 0's to all others, the others' to rank 0."""
        if self.rank:
            where: list = [None, None]
            dist.broadcast_object_list(where, src=0)
            connection = Client(where[0], authkey=where[1])
            connection.send(self.rank)
            return {0: connection}
        key = os.urandom(32)
        with Listener(("127.0.0.1", 0), backlog=self.size, authkey=key) as listener:
            dist.broadcast_object_list([listener.address, key], src=0)
            connections = [listener.accept() for _ in range(self.size - 1)]
        return {connection.recv(): connection for connection in connections}

    def _tell(self, *message: object) -> None:
        data = pickle.dumps(message)  # and not by `send`, for which torch would share a tensor's memory
        for connection in self._peers.values():
            with suppress(OSError):  # it has gone: the watcher knows
                connection.send_bytes(data)

    def _watch(self) -> None:
        while self._present:
            ready = wait(list(self._present.values()))
            for rank, connection in list(self._present.items()):
                if connection in ready:
                    self._hear(rank, connection)

    def _hear(self, rank: int, connection: Connection) -> None:
        try:
            kind, *rest = pickle.loads(connection.recv_bytes())
        except (OSError, EOFError):
            kind, rest = "lost", []
        if kind == "value":
            self._values.put(rest)
        elif kind == "bye" or self._left:
            del self._present[rank]
            if rank == 0:
                self._values.put((False, GONE))
                ending = threading.Timer(PATIENCE, os._exit, [0])  # it may be waiting for rank 0 on a GPU
                ending.daemon = True
                ending.start()
        elif rank == 0 and kind == "failed":
            os._exit(LOST)  # rank 0 has said why
        else:
            self._end(f"rank {rank} failed: {rest[0]}" if rest else f"rank {rank} was lost (killed, or out of memory)")

    def _end(self, news: str) -> None:
        """Says what happened, rank 0 after it has saved what there is, and ends this process and the others."""
        with self._closing:
            if self.rank <= 1:  # one voice: rank 0's, or, if that is the one that is lost, rank 1's
                print(f"\nerror: {news}; {self._rescued()}", file=sys.stderr, flush=True)
            self._tell("failed", news)
            os._exit(LOST)

    def _rescued(self) -> str:
        try:
            return self.rescue()
        except Exception as error:  # the team is ended whatever happens
            return f"and nothing could be saved: {error}"


def _by_another(failure: str) -> bool:
    """Whether an error may be the loss of another rank, as it shows where tensors are exchanged."""
    return failure.startswith(("RuntimeError", "Dist", "Abandoned"))
