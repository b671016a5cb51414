"""A TLS terminator that changes no header (as stunnel does): python tls_proxy.py LISTEN UPSTREAM CERT KEY"""

import asyncio
import ssl
import sys

from forwarding import connect, pipe


async def handle(*here) -> None:
    if there := await connect(int(sys.argv[2])):
        await pipe(here, there)


async def main() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[3], sys.argv[4])
    server = await asyncio.start_server(handle, "127.0.0.1", int(sys.argv[1]), ssl=context)
    await server.serve_forever()


asyncio.run(main())
