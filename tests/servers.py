"""What tests of real servers and browsers share: free ports, programs that can be ended, a page that can be killed."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

HERE = Path(__file__).parent
PATIENCE = 240_000  # milliseconds that a browser is waited for; the machine may be busy
CHROMIUM_FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync""".split()  # noqa: SIM905


# What Gradio's client says of requests that are broken off.
BROKEN_OFF = ("AbortError: signal is aborted", "Unexpected error Connection errored out")
LEAVING = "this page is being left"


def collect_errors(page, errors: list[str], kinds: tuple[str, ...] = ("error",)) -> None:
    """Adds what goes wrong in the page: the console's messages of these kinds and uncaught exceptions.

    That a page which is left or loaded again breaks off its requests is no error. To be called before the first `goto`.
    """
    leaving = False

    def heard(message) -> None:
        nonlocal leaving
        if message.text == LEAVING:
            leaving = True
        elif message.type in kinds and not (leaving and message.text.startswith(BROKEN_OFF)):
            errors.append(message.text)

    def loaded(_) -> None:
        nonlocal leaving
        leaving = False

    page.add_init_script(f"addEventListener('beforeunload', () => console.debug('{LEAVING}'))")
    page.on("domcontentloaded", loaded)
    page.on("console", heard)
    page.on("pageerror", lambda error: errors.append(str(error)))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def program(*arguments: object) -> Iterator[subprocess.Popen]:
    """A Python program, killed at the end."""
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=HERE.parent)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def proxy(name: str, upstream: str, *arguments: object) -> Iterator[tuple[subprocess.Popen, int]]:
    """The proxy in the file of this name before the server at that address; the process and its port."""
    port = free_port()
    with program(HERE / name, port, upstream.rstrip("/").rsplit(":", 1)[1], *arguments) as process:
        wait_for_port(process, port)
        yield process, port


@contextmanager
def page_server(model: Path, films: Path, port: int) -> Iterator[subprocess.Popen]:
    """The page in a process of its own, which can be killed."""
    code = (
        "import sys, infworld; from pathlib import Path; from infworld.app import server;"
        "server.serve(infworld.load(sys.argv[1], 'cpu'), Path(sys.argv[2]), server_name='127.0.0.1',"
        " server_port=int(sys.argv[3]), quiet=True)"
    )
    with program("-c", code, model, films, port) as process:
        wait_for_port(process, port)
        urlopen(f"http://127.0.0.1:{port}/", timeout=PATIENCE / 1000).close()
        yield process


def wait_for_port(process: subprocess.Popen, port: int) -> None:
    deadline = time.monotonic() + PATIENCE / 1000
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
