#!/usr/bin/env bash
# CPython's asyncio (seen in 3.11.7): a server on a socket that one made and bound oneself, by socket.create_server,
# accepts connections without TCP_NODELAY; one on a host and port has it, and uvloop
# 0.23.0 has it in both. asyncio sets it where the socket's `proto` is IPPROTO_TCP, and create_server makes one
# with 0, which accepted sockets inherit. The two loops so differ by the delayed acknowledgement of the other side.
#
# Guessed before: asyncio sets TCP_NODELAY on every TCP connection since 3.6, whoever made the listening socket.
# Seen: 0 with a socket of one's own, 1 with host and port; uvloop 1 and 1.
# What follows: set it in connection_made. Triad's first token took 47 ms without it on plain asyncio, 6 with it
# (docs/experiments/door.md, "A frame that waits for the one before").
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check uvloop==0.23.0
"$folder/venv/bin/python" - <<'PY'
import asyncio
import platform
import socket
import sys

import uvloop


class Server(asyncio.Protocol):
    def __init__(self, seen):
        self.seen = seen

    def connection_made(self, transport):
        sock = transport.get_extra_info("socket")
        self.seen.set_result(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0)


async def has_no_delay(**where):
    loop = asyncio.get_running_loop()
    seen = loop.create_future()
    server = await loop.create_server(lambda: Server(seen), **where)
    _, writer = await asyncio.open_connection("127.0.0.1", server.sockets[0].getsockname()[1])
    try:
        return await seen
    finally:
        writer.close()
        server.close()


async def both():
    own = socket.create_server(("127.0.0.1", 0))
    return await has_no_delay(sock=own), await has_no_delay(host="127.0.0.1", port=0)


plain, fast = asyncio.run(both()), uvloop.run(both())
print(f"Python {platform.python_version()}, uvloop {uvloop.__version__}, TCP_NODELAY of an accepted connection:")
print(f"asyncio: own socket {plain[0]}, host and port {plain[1]}; uvloop: {fast[0]}, {fast[1]}")
sys.exit(0 if (plain, fast) == ((False, True), (True, True)) else "this has changed: see the head of the script")
PY
