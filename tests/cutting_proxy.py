"""A proxy whose connections can be cut: python cutting_proxy.py LISTEN UPSTREAM; SIGUSR1 cuts all for three seconds."""

import asyncio
import signal
import sys

from forwarding import connect, pipe

CUT = 3.0  # seconds


class CuttingProxy:
    def __init__(self, upstream: int):
        self.upstream = upstream
        self.writers: set[asyncio.StreamWriter] = set()
        self.down = False

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = None if self.down else await connect(self.upstream)
        if there is None:
            return writer.transport.abort()
        both = {writer, there[1]}
        self.writers |= both
        await pipe((reader, writer), there)
        self.writers -= both

    def cut(self) -> None:
        self.down = True
        for writer in list(self.writers):
            writer.transport.abort()
        asyncio.get_running_loop().call_later(CUT, self.come_back)

    def come_back(self) -> None:
        self.down = False


async def main() -> None:
    proxy = CuttingProxy(int(sys.argv[2]))
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, proxy.cut)
    server = await asyncio.start_server(proxy.handle, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()


asyncio.run(main())
