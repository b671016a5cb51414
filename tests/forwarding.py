"""What the proxies of the tests share: bytes from one connection to another, both ways."""

from __future__ import annotations

import asyncio

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connect(port: int) -> Ends | None:
    """A connection to this port here; None if nobody listens."""
    try:
        return await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return None


async def pipe(one: Ends, other: Ends) -> None:
    """Until both have ended."""
    await asyncio.gather(_one_way(one[0], other[1]), _one_way(other[0], one[1]))


async def _one_way(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()
