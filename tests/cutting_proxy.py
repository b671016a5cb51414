"""A proxy whose connections can be cut: python cutting_proxy.py LISTEN UPSTREAM; SIGUSR1 cuts all for three seconds."""

import asyncio
import signal
import sys

CUT = 3.0  # seconds


class CuttingProxy:
    def __init__(self, upstream: int):
        self.upstream = upstream
        self.writers: set[asyncio.StreamWriter] = set()
        self.down = False

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.down:
            return writer.transport.abort()
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.upstream)
        except OSError:
            return writer.transport.abort()
        self.writers |= {writer, up_writer}
        await asyncio.gather(pipe(reader, up_writer), pipe(up_reader, writer))
        self.writers -= {writer, up_writer}

    def cut(self) -> None:
        self.down = True
        for writer in list(self.writers):
            writer.transport.abort()
        asyncio.get_running_loop().call_later(CUT, self.come_back)

    def come_back(self) -> None:
        self.down = False


async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


async def main() -> None:
    proxy = CuttingProxy(int(sys.argv[2]))
    server = await asyncio.start_server(proxy.handle, "127.0.0.1", int(sys.argv[1]))
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, proxy.cut)
    await server.serve_forever()


asyncio.run(main())
