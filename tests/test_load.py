"""The server under load: many connections, slow ones, and a stop in the middle of it. No timing is asserted."""
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter

import httpx
import pytest

WESTERN = "A lone gunslinger rides into a dusty frontier town to settle an old score with the sheriff and his ranch hands."
BODY = json.dumps({"descriptions": [WESTERN]}).encode()
HEAD = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(BODY)}\r\n".encode()
REQUEST = HEAD + b"\r\n" + BODY


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    "Status, headers and the whole body of the next answer; a cut one raises IncompleteReadError."
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return int(head[0].split()[1]), headers, body


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port)


async def ask_until_refused(port: int, keep_alive: bool, outcomes: Counter) -> None:
    "Send request after request until the port is closed; count what became of each."
    while True:
        try:
            reader, writer = await connect(port)
        except OSError:
            outcomes["refused"] += 1
            return
        last = False
        while not last:
            try:
                writer.write(REQUEST)
                status, headers, body = await read_answer(reader)
                outcomes[status if status == 503 or json.loads(body)["predictions"] else "no predictions"] += 1
                last = not keep_alive or headers.get("connection") == "close"
            except (asyncio.IncompleteReadError, OSError) as error:
                outcomes[f"cut: {error!r}"[:100]] += 1
                last = True
        writer.close()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_stop_under_load_loses_no_request(start_server):
    "Every request gets its whole answer, or its connection is refused: none is taken and then cut off."
    server = start_server("--no-demo")
    outcomes: Counter = Counter()

    async def load() -> None:
        clients = [asyncio.create_task(ask_until_refused(server.port, number % 2 == 0, outcomes)) for number in range(24)]
        while outcomes[200] < 200:
            await asyncio.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(asyncio.gather(*clients), 60)

    asyncio.run(load())
    assert server.process.wait(30) == 0, "".join(server.lines)
    assert set(outcomes) <= {200, 503, "refused"} and outcomes["refused"] == 24, outcomes
    assert "Traceback" not in "".join(server.lines)
