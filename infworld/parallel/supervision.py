"""Supervision of the processes of a team: sockets on which a lost process is noticed at once.

Whoever waits for a lost process on a GPU would wait for ever; here its socket closes.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener, wait
from queue import Empty, SimpleQueue

import torch.distributed as dist

LOST = 1  # the exit code of a process whose team is broken
GRACE = 3.0  # seconds in which an error turns out to be the failure of another rank
PATIENCE = 10.0  # seconds that the other ranks have to end when rank 0 has
GONE = object()  # what comes after rank 0's last value


class Abandoned(Exception):
    """Raised on the other ranks when rank 0 has ended what they do together."""


class Link:
    """Sockets between rank 0 and the others: decisions of rank 0 one way, failures and the end of a process both ways.

    A thread reads them. Messages: ("value", whether there is one, the value), ("bye",), ("failed", reason),
    ("memory", round): a rank is out of memory, and ("rebuild", address): the ranks meet again there, in the next round.
    Where a rank fails or leaves without a bye, rank 0 calls `rescue`, prints what it returns and ends, and the others
    end too.
    """

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self.rescue: Callable[[], str] = lambda: "all processes end"
        self._left = False
        self._values: SimpleQueue = SimpleQueue()
        self._addresses: SimpleQueue = SimpleQueue()
        self._round, self._exhausted = 0, -1  # counts the meetings; the latest round in which memory ran out
        self.interrupt: Callable[[], None] = lambda: None  # ends an exchange of tensors that waits
        self._closing = threading.Lock()
        self._peers = self._connect()
        self._present = dict(self._peers)
        self._watcher = threading.Thread(target=self._watch, name="link", daemon=True)
        self._watcher.start()

    def send(self, there: bool, value: object) -> None:
        """From rank 0: a value, or that there will be none."""
        self._tell("value", there, value)

    def receive(self) -> object:
        """On the other ranks: what rank 0 sent. Raises Abandoned if there is none, as always after it has left."""
        there, value = self._values.get()
        if value is GONE:
            self._values.put((there, value))
        if not there:
            raise Abandoned("rank 0 has ended the work")
        return value

    def report_memory(self) -> None:
        """This rank is out of memory: all ranks end the chunk that they are making."""
        self._exhausted = self._round
        self._tell("memory", self._round)

    def out_of_memory(self, within: float = 0) -> bool:
        """Whether some rank has reported that in this round, or does so within so many seconds."""
        deadline = time.monotonic() + within
        while self._exhausted < self._round and time.monotonic() < deadline:
            time.sleep(0.01)
        return self._exhausted >= self._round

    def meet(self, address: int | None = None) -> int:
        """The ranks begin the next round, where nothing of the last one is left. Rank 0 gives the address at which they
        find each other; returns it on all ranks."""
        if self.rank == 0:
            self._tell("rebuild", address)
        else:
            address = self._addresses.get()
        self._round += 1
        return address  # type: ignore[return-value]  # rank 0 gave it

    def leave(self, failure: str | None = None) -> None:
        """Ends this process's part: as planned, or by an error, unless that is only how the loss of another shows."""
        self._left = failure is None
        if self._left:
            self._tell("bye")
            self._watcher.join()  # until the others have left too
        else:
            self._watcher.join(GRACE if caused_elsewhere(failure.partition(":")[0]) else 0)
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
        elif kind == "memory":
            if rest[0] > self._exhausted:
                self._exhausted = rest[0]
                if self.rank == 0:
                    self._tell("memory", rest[0])
                self.interrupt()
        elif kind == "rebuild":
            with suppress(Empty):
                while True:  # what was meant for the last round
                    self._values.get_nowait()
            self._addresses.put(rest[0])
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


def caused_elsewhere(kind: str) -> bool:
    """Whether an exception of this class may be the failure of another rank, seen where tensors are exchanged."""
    return kind in ("RuntimeError", "Abandoned") or kind.startswith("Dist")
