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


def collect_errors(page, errors: list[str]) -> None:
    """Adds what goes wrong in the page; what Gradio's client breaks off as the page is left is no error."""

    def hear(message) -> None:
        if message.type == "error" and not message.text.startswith("AbortError: signal is aborted"):
            errors.append(message.text)

    page.on("console", hear)
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
