"""The course of a run of `finetune` or `distill`: steps, and now and then what is kept, measured and filmed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from infworld.cli.console import StopSignals
from infworld.training.run import Log, peak_gib
from infworld.training.sharing import any_of_all
from infworld.training.tracking import Tracker


class Training(Protocol):
    """What is trained, in every process."""

    step_number: int
    device: Any

    def measure(self) -> dict[str, float]: ...

    def state(self) -> dict[str, Any]: ...


def go_through(
    training: Training,
    step: Callable[[], dict[str, float]],
    save: Callable[[dict[str, Any], dict[str, float]], None],
    film: Callable[[], Path],
    steps: int,
    every: int,
    log: Log | None,
    stop: StopSignals,
) -> None:
    """Steps until there are `steps` of them; after every `every`, at the end and when a signal comes, what is there is
    measured and saved.

    step: makes one and returns its losses. save: keeps a state, given what was measured. film: with what was saved,
    returning the mp4, unless a signal came. Both are called in the process with the log alone. Raises Stopped after a
    signal.
    """
    tracker = Tracker(log.folder) if log else None
    stopping = False
    with stop.deferred():
        while training.step_number < steps and not stopping:
            began = time.monotonic()
            losses = step()
            values = losses | {"seconds": time.monotonic() - began, "peak_gib": peak_gib(training.device)}
            number = training.step_number
            if log and tracker:
                log.add("step", step=number, **values)
                tracker.add(number, values)
            stopping = any_of_all(stop.received)
            if number % every and number < steps and not stopping:
                continue
            measured, state = training.measure(), training.state()
            if log and tracker:
                save(state, measured)
                log.add("report", step=number, **losses, **measured)
                tracker.add(number, measured)
                if not stopping:
                    log.add("film", step=number, path=str(film()))
    if log and tracker:
        tracker.close()
        if log.reports:
            log.plot("step", ["error_right", "error_wrong"], ["gap"])
    stop.check()
