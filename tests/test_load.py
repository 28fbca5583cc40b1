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
from pathlib import Path

import httpx
import pytest
from load import read_answer

TESTS = Path(__file__).parent
WESTERN = "A lone gunslinger rides into a dusty frontier town to settle an old score with the sheriff and his ranch hands."
BODY = json.dumps({"descriptions": [WESTERN]}).encode()
HEAD = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(BODY)}\r\n".encode()
REQUEST = HEAD + b"\r\n" + BODY


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


def test_the_tool_that_measures_the_server(tmp_path):
    "A short run of tests/load.py: every request is answered, and the report says what the tool promises."
    report = tmp_path / "serving.json"
    for model in ("linear_svm", "small_bert"):
        done = subprocess.run([sys.executable, str(TESTS / "load.py"), "--seconds", "2", "--clients", "4", "--requests", "8", "--warm-up", "2",
                               "--stalled", "20", "--no-demo", "--model", model, "--output", str(report)],
                              capture_output=True, text=True, timeout=120, cwd=TESTS.parent)
        assert done.returncode == 0, done.stdout + done.stderr
    reports = json.loads(report.read_text())
    assert list(reports) == ["linear_svm", "small_bert"] and reports["small_bert"] == json.loads(done.stdout)
    for model, found in reports.items():
        assert model in found["models"] and found["exit_code"] == 0 and found["training_libraries_loaded"] == []
        assert found["one_client"]["statuses"] == {"200": 8} and found["beside_stalled_connections"]["statuses"] == {"200": 8}
        assert set(found["load"]["statuses"]) == {"200"} and set(found["load"]["milliseconds"]) == {"p50", "p90", "p99"}
        assert found["ready_seconds"] > 0 and found["memory_megabytes"]["largest"] >= found["memory_megabytes"]["load_end"]
