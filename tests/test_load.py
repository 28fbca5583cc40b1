"""The server under load: many connections, slow ones, and a stop in the middle of it. No timing is asserted."""
import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from conftest import start_serving
from load import read_answer

from genre_nb.serving import PatientProtocol, launch

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
@pytest.mark.parametrize("workers", ["1", "2"])
def test_stop_under_load_loses_no_request(start_server, workers):
    "Every request gets its whole answer, or its connection is refused: none is taken and then cut off."
    server = start_server("--no-demo", "--workers", workers)
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
        assert found["one_client_explained"]["statuses"] == {"200": 2} and found["one_client"]["statuses"] == {"200": 8}
        assert found["beside_stalled_connections"]["statuses"] == {"200": 8}
        assert set(found["load"]["statuses"]) == {"200"} and set(found["load"]["milliseconds"]) == {"p50", "p90", "p99"}
        assert found["ready_seconds"] > 0 and found["memory_megabytes"]["largest"] >= found["memory_megabytes"]["load_end"]


# Clients that nobody wishes for

@pytest.fixture(scope="module")
def port():
    "A server of the API alone, in a process that may open few files unless it asks for more."
    soft, hard = open_files()
    with open_files_at_most(256, hard):
        server = start_serving("--no-demo")
    yield server.port
    assert server.stop(signal.SIGTERM) == 0 and "Traceback" not in "".join(server.lines), "".join(server.lines)[-3000:]


def open_files() -> tuple[int, int]:
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    return resource.getrlimit(resource.RLIMIT_NOFILE)


@contextmanager
def open_files_at_most(soft: int, hard: int):
    "What processes that are started now may open."
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def said_to(port: int, *parts: bytes, seconds: float = 20) -> bytes:
    "All that the server answers to these bytes until it hangs up, or falls silent for a second."
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        try:
            for part in parts:
                connection.sendall(part)
            while chunk := connection.recv(65_536):
                received += chunk
                connection.settimeout(1)
        except (TimeoutError, ConnectionError):
            pass
    return received


def statuses_in(received: bytes) -> list[int]:
    "The statuses of all answers in what was received."
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


def is_well(port: int) -> bool:
    return httpx.post(f"http://127.0.0.1:{port}/predict", content=BODY, headers={"Content-Type": "application/json"}, timeout=30).status_code == 200


def test_thousand_connections(port):
    "Idle ones first; then each asks something. Every request is answered, if only with 'busy'."
    with open_files_at_most(min(4096, open_files()[1]), open_files()[1]):
        async def all_at_once() -> tuple[bool, Counter]:
            pairs = [await connect(port) for _ in range(1000)]
            answered_beside = await asyncio.to_thread(is_well, port)
            for _, writer in pairs:
                writer.write(REQUEST)
            answers = await asyncio.wait_for(asyncio.gather(*(read_answer(reader) for reader, _ in pairs)), 120)
            for _, writer in pairs:
                writer.close()
            return answered_beside, Counter(status for status, _, _ in answers)

        answered_beside, statuses = asyncio.run(all_at_once())
    assert answered_beside and set(statuses) <= {200, 503} and statuses[200] >= 64 and statuses.total() == 1000, statuses
    assert is_well(port)


def test_pipelined_requests_are_answered_in_order(port):
    "Three requests at once, one of them wrong; the last asks for the end of the connection."
    wrong = REQUEST.replace(b'"descriptions"', b'"descriptionz"')
    health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = REQUEST.replace(b"Host:", b"Connection: close\r\nHost:")
    assert statuses_in(said_to(port, REQUEST + wrong + health + last)) == [200, 422, 200, 200]


def test_expect_continue(port):
    "A client that asks before it sends its body is told to go on, or at once that it is too large."
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(HEAD + b"Expect: 100-continue\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(BODY)
        assert statuses_in(connection.recv(65_536)) == [200]
    large = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 104857600\r\nExpect: 100-continue\r\n\r\n"
    assert statuses_in(said_to(port, large)) == [413]


@pytest.mark.parametrize("chunked", [False, True])
def test_body_of_100_megabytes(port, chunked):
    "Declared or not, it is refused after 2 MB, and none of it is kept."
    million = b"x" * 1_000_000
    kind = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 100000000"
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" + kind + b"\r\n\r\n"
    parts = [b"f4240\r\n" + million + b"\r\n"] * 100 + [b"0\r\n\r\n"] if chunked else [million] * 100
    assert statuses_in(said_to(port, head, *parts)) == [413]
    assert is_well(port)


@pytest.mark.parametrize("headers", [
    b"".join(b"X-Header-%d: value\r\n" % number for number in range(100_000)),  # many
    b"X-Large: " + b"a" * 3_000_000 + b"\r\n",  # one large
    b"X-Folded: a\r\n" + b" b\r\n" * 200_000,
])
def test_flood_of_headers(port, headers):
    assert set(statuses_in(said_to(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + headers + b"\r\n"))) <= {400, 431}
    assert is_well(port)


def test_refused_upload_that_turns_into_nonsense(port):
    "After the refusal, what follows is thrown away; nonsense ends the connection, and nothing is logged as a failure of ours."
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    parts = [b"f4240\r\n" + b"x" * 1_000_000 + b"\r\n"] * 4
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(head + b"".join(parts))
        received = b""
        while not received.endswith(b"]}"):
            received += connection.recv(65_536)
        assert statuses_in(received) == [413]
        connection.sendall(b"this is no chunk\r\n")
        assert connection.recv(65_536) == b""
    assert is_well(port)


@pytest.mark.parametrize("body", [
    b'{"descriptions": ["' + b"\xc3" + b'"]}', b'{"descriptions": ["\xed\xa0\x80"]}', b'{"descriptions": ["\xc0\xaf"]}', b"\xff\xfe{\x00}\x00",
    b'{"descriptions": ["a"], "top_k": Infinity}', b'{"descriptions": ["a"], "top_k": -Infinity}', b'{"descriptions": [NaN]}',
    b'{"descriptions": ' + b"[" * 900 + b"]" * 900 + b"}", b'{"descriptions": ' + b"[" * 90_000 + b"]" * 90_000 + b"}",
    b'{"a":' * 90_000 + b"1" + b"}" * 90_000, b'{"descriptions": ["a"], "model": ' + b'{"a":' * 400 + b"1" + b"}" * 401,
])
def test_malformed_and_deep_bodies(port, body):
    answer = httpx.post(f"http://127.0.0.1:{port}/predict", content=body, headers={"Content-Type": "application/json"}, timeout=30)
    assert answer.status_code in (400, 422) and set(answer.json()) == {"detail", "errors"} and len(answer.text) < 5_000, answer.text[:300]


def test_slow_requests_are_sent_away(monkeypatch):
    "Bytes that trickle in do not set the clock back; neither does what follows a refusal."
    monkeypatch.setattr(PatientProtocol, "seconds", 0.3)

    def trickle(first: bytes) -> bytes:
        received = b""
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            connection.sendall(first)
            connection.settimeout(0.05)
            for _ in range(200):
                try:
                    chunk = connection.recv(65_536)
                    received += chunk
                    if not chunk:
                        return received
                    continue
                except TimeoutError:
                    pass
                except ConnectionError:
                    return received
                with suppress(OSError):
                    connection.sendall(b"a")
        pytest.fail("the connection is still open")

    with launch(port=0, demo=False) as server:
        assert trickle(b"GET /health HTTP/1.1\r\nX-Slow: ") == b""
        assert statuses_in(trickle(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n\r\n")) == [413]
        assert statuses_in(trickle(REQUEST + b"GET /hea")) == [200]
        assert is_well(server.port)
