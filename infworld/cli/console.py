"""What the command-line programs have in common: how they speak, how they are stopped, how they end."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

FAILED, INTERRUPTED = 2, 130  # exit codes; the second is what shells give to Ctrl-C


def exit_code(
    program: Callable[[], int | None],
    stopped: str,
    *,
    quiet: bool = False,
    expected: tuple[type[Exception], ...] = (ValueError, OSError),
) -> int:
    """Runs a program and returns its exit code, None counting as 0.

    What is `expected` to go wrong is said in one line on stderr in place of a traceback, Ctrl-C with the words
    `stopped`. quiet: the error is not said, because another process says it.
    """
    try:
        return program() or 0
    except expected as error:
        if not quiet:
            print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt as interruption:
        print(stopped, file=sys.stderr)
        return stop_code(interruption)


# ------------------------------------------------------------------------------------------------------------- stopping


class Stopped(KeyboardInterrupt):
    """The signal `number` asked the program to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def stop_code(interruption: KeyboardInterrupt) -> int:
    """The exit code that shells know the signal by."""
    return 128 + interruption.number if isinstance(interruption, Stopped) else INTERRUPTED


class StopSignals:
    """Within it Ctrl-C, SIGTERM and SIGHUP raise Stopped: at once, or while `deferred`, only where `check` is called.

    A signal that the program was started to ignore, as by nohup, stays ignored.
    """

    def __init__(self):
        self._received: int | None = None
        self._deferring = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # no other one can set handlers
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number and signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals wait for the next `check`: what is done in between is not torn apart."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    @property
    def received(self) -> bool:
        """Whether a signal waits for the next `check`."""
        return self._received is not None

    def check(self) -> None:
        if self._received is not None:
            raise Stopped(self._received)

    def _hear(self, number: int, frame) -> None:
        self._received = number
        if not self._deferring:
            self.check()
        with suppress(OSError):  # not `print`, which may be what was interrupted
            os.write(2, b"\nstopping after this step\n")


# ------------------------------------------------------------------------------------------------------------- speaking


@contextmanager
def unfailing_output() -> Iterator[None]:
    """Within it nothing that is printed, logged or drawn can stop the program: what cannot be written is left out.

    Standard streams can be closed by who started the program, be a pipe whose reader has gone, a terminal that is
    gone, a file on a full disk, or unable to encode a character; that is then written as its number.
    """
    before = sys.stdout, sys.stderr
    _open_missing()
    sys.stdout, sys.stderr = Unfailing(sys.stdout, 1), Unfailing(sys.stderr, 2)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.end()
        sys.stdout, sys.stderr = before


class Unfailing:
    """A text stream whose writing never fails."""

    def __init__(self, stream: TextIO | None, descriptor: int):
        self._stream = stream or open(descriptor, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        with suppress(AttributeError):
            self._stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError, RuntimeError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError, RuntimeError):
            self._stream.flush()

    def end(self) -> None:
        """Drops what could not be written, which the interpreter's end would fail with."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def _open_missing() -> None:
    """Gives the standard descriptors that are closed to the null device, so that no file of the program gets one."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
