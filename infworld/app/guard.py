"""What a server lets in before anything else sees it: by whom it is addressed, from which site, and how large it is."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from urllib.parse import urlsplit

log = logging.getLogger(__name__)

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
JSON_BYTES = (
    4 * 2**20
)  # of a request that is no upload: above the longest list of actions; also what MCP's library takes
READING = ("GET", "HEAD", "OPTIONS")


class Guard:
    """ASGI middleware. hosts: the names that the server answers to, None for all. upload: bytes that one upload may
    have; stored: of all together. connections: how many requests are answered at the same time.

    Only the server's own pages may change something: those of the host that the request names, and those of
    `hosts` and `own_sites`, as behind a proxy the browser may know it by another name.
    """

    def __init__(self, app, *, hosts: Iterable[str] | None, upload: int, stored: Stored, connections: int):
        self._app = app
        self._hosts = None if hosts is None else {host.lower() for host in hosts}
        # A loopback name says nothing: every local server has it.
        self._sites = ((self._hosts or set()) | own_sites()) - set(LOOPBACK)
        self._upload, self._stored = upload, stored
        self._connections, self._open = connections, 0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.set_exception_handler(Patient())
        refusal = self._refusal(scope)
        if refusal:
            await _answer(send, *refusal)
            return
        self._open += 1
        try:
            await self._limited(scope, receive, send)
        finally:
            self._open -= 1

    def _refusal(self, scope) -> tuple[int, str] | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if self._open >= self._connections:
            return 503, "Too many requests at once: try again in a moment."
        if self._hosts is not None and _name(host) not in self._hosts:
            return 421, "This server does not answer to that name: start it with --allow-host to change that."
        changes = scope["method"] not in READING or "/mcp" in scope["path"]
        foreign = headers.get("sec-fetch-site") == "cross-site" if origin is None else _netloc(origin) != host
        named = origin is not None and _name(_netloc(origin)) in self._sites
        if changes and foreign and not named:
            return 403, "Requests of other sites are refused."
        return None

    async def _limited(self, scope, receive, send) -> None:
        """The request, but for a body that is too large."""
        is_upload = scope["path"].endswith("/upload")
        limit = self._upload if is_upload else JSON_BYTES
        client = scope["client"][0] if scope.get("client") else ""
        answered, received, refused = False, 0, ""

        async def counted():
            nonlocal received, refused
            message = await receive()
            size = len(message.get("body", b""))
            received += size
            if received > limit:
                refused = f"At most {limit / 2**20:.0f} MB may be sent here."
            elif is_upload and not self._stored.add(client, size):
                refused = "There is no room for more uploads now: try again later."
            if refused:
                raise _TooLarge
            return message

        async def noted(message):
            nonlocal answered
            if not refused:  # what is said of half a body is of no use
                answered = True
                await send(message)

        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > limit:
            await _answer(send, 413, f"At most {limit / 2**20:.0f} MB may be sent here.")
            return
        try:
            with suppress(_TooLarge):
                await self._app(scope, counted, noted)
        except OSError as error:
            if not is_upload or answered:
                raise
            log.warning("an upload could not be kept: %s", error)
            refused, status = f"The upload could not be kept: {os.strerror(error.errno or 0)}.", 507
        else:
            status = 413
        if refused and not answered:
            await _answer(send, status, refused)


class Stored:
    """Bytes of uploads: at most `most` together, and `per_client` of one address between two sweeps."""

    def __init__(self, most: int, per_client: int):
        self._most, self._per_client = most, per_client
        self._lock = threading.Lock()
        self.reset(0)

    def reset(self, total: int) -> None:
        """After a sweep: the bytes that are there."""
        with self._lock:
            self._total, self._of = total, {}

    def add(self, client: str, size: int) -> bool:
        """Counts bytes that came in; False if they are too many."""
        with self._lock:
            of = self._of.get(client, 0)
            if self._total + size > self._most or of + size > self._per_client:
                return False
            self._total += size
            self._of[client] = of + size
            return True


class _TooLarge(Exception):
    pass


class Patient:
    """Handles what asyncio has no one else for. Out of file descriptors, it would log thousands of lines a second."""

    PAUSE = 10.0  # seconds

    def __init__(self):
        self._last = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict) -> None:
        if "out of system resource" not in context.get("message", ""):
            loop.default_exception_handler(context)
        elif time.monotonic() - self._last > self.PAUSE:
            self._last = time.monotonic()
            log.error("no more connections can be taken: %s", context.get("exception"))


def own_sites() -> set[str]:
    """The names of the Space that this is, none elsewhere: its own, and that of its owner's domain."""
    return {name.strip().lower() for name in os.environ.get("SPACE_HOST", "").split(",")} - {""}


def _netloc(origin: str) -> str:
    return urlsplit(origin).netloc.lower()


def _name(host: str) -> str:
    """A host without its port."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


async def _answer(send, status: int, words: str) -> None:
    body = words.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))  # a body that was not read, and the place of a connection
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
