"""What the command-line programs have in common: how they end."""

from __future__ import annotations

import sys
from collections.abc import Callable

FAILED, INTERRUPTED = 2, 130  # exit codes; the second is what shells give to Ctrl-C


def exit_code(program: Callable[[], int | None], stopped: str, *, quiet: bool = False) -> int:
    """Runs a program and returns its exit code, None counting as 0.

    What cannot work (ValueError, OSError) is said in one line on stderr in place of a traceback, Ctrl-C with the words
    `stopped`. quiet: the error is not said, because another process says it.
    """
    try:
        return program() or 0
    except (ValueError, OSError) as error:
        if not quiet:
            print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return INTERRUPTED
