"""The page on several GPUs of a host: rank 0 serves it and orders, the others do the same work. Beside compute.py.

An order is a task of `compute`, less what the other ranks have already: a session that goes on from the last one shares
its history and what the encoder carries on, which are hundreds of megabytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from infworld.app.compute import Compute, Replay, Result, Scene, Task, step_by_step
from infworld.parallel import Abandoned, Team
from infworld.session import Session
from infworld.world import Chunk, World


@dataclass(frozen=True)
class Order:
    """A task for the model of this name; where `task` is None, the last session with these changes."""

    model: str
    task: Task | None
    changes: dict[str, Any]


def leading(world: World) -> Compute:
    """`on_gpu` for rank 0 of the world's team, whose other ranks are in `follow`."""
    team, name = world.team, world.config.name
    last: Session | None = None  # the one that the other ranks have too

    def order(task: Task) -> None:
        nonlocal last
        known = isinstance(task, Session) and last is not None
        made = Order(name, None, _changes(last, task)) if known else Order(name, task, {})
        last = None  # until the task has been done, on all ranks alike
        team.broadcast_from_rank0(lambda: made)

    def compute(task: Task) -> Iterator[Result]:
        nonlocal last
        if isinstance(task, Scene):
            order(task)
            task = last = world.start(task.picture, task.settings)
            yield task
        order(task)
        result = None
        for result in world.replay(task.session) if isinstance(task, Replay) else step_by_step(world, task):
            yield result
        # Not before the end, without which the other ranks have no session either.
        if isinstance(result, Chunk) and not isinstance(task, Replay):
            last = result.session

    def guarded(task: Task) -> Iterator[Result]:
        """One task at a time, even of runs that nobody waits for any more and that are still on.

        An error that the other ranks do not have too leaves them waiting for ever: then all processes end.
        """
        try:
            with team.turn:
                yield from compute(task)
        except (ValueError, GeneratorExit):
            raise
        except BaseException as error:
            team.fail(f"{type(error).__name__}: {error}")

    return guarded


def follow(team: Team, world_of: Callable[[str], World]) -> None:
    """What the other ranks do: the work that rank 0 orders, until it leaves. world_of: a model's world, by name."""
    last: Session | None = None
    while True:
        try:
            order = team.broadcast_from_rank0(lambda: None)
        except Abandoned:
            return
        # What ends rank 0's work ends it here too, and bad input is bad on all ranks.
        with suppress(Abandoned, ValueError):
            task = dataclasses.replace(last, **order.changes) if order.task is None else order.task
            last = _do(world_of(order.model), task) or last


def _do(world: World, task: Task) -> Session | None:
    """Does a task as `leading` does; the session that follows from it."""
    if isinstance(task, Replay):
        for _ in world.replay(task.session):
            pass
        return None
    if isinstance(task, Scene):
        return world.start(task.picture, task.settings)
    return world.next_chunk(task).session


def _changes(old: Session, new: Session) -> dict[str, Any]:
    """The fields in which a session is not the very same as another."""
    names = [field.name for field in dataclasses.fields(Session)]
    return {name: getattr(new, name) for name in names if getattr(new, name) is not getattr(old, name)}
