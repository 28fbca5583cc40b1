"""The server as people run it: a process, a port, signals, hostile connections."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

import httpx
import pytest
from conftest import PROGRAM

from genre_nb.core import GENRES
from genre_nb.serving import STOP_SECONDS

TESTS = Path(__file__).parent
WESTERN = "A lone gunslinger rides into a dusty frontier town to settle an old score with the sheriff and his ranch hands."


@pytest.fixture(scope="module")
def http(demo_server):
    with httpx.Client(base_url=demo_server.url, timeout=30) as client:
        yield client


def raw_answer(port: int, request: bytes, seconds: float = 10) -> bytes:
    "What the server sends for these bytes."
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(request)
        received = b""
        try:
            while chunk := connection.recv(65_536):
                received += chunk
                if b"}" in received:
                    break
        except (TimeoutError, ConnectionResetError):
            pass
        return received


# What it answers

def test_predicts_a_genre(http):
    answer = http.post("/predict", json={"descriptions": [WESTERN, "A boat."], "top_k": 2, "explain": True})
    assert answer.status_code == 200
    first, second = answer.json()["predictions"]
    assert first["genre"] == "western" and len(first["probabilities"]) == 2
    assert all(WESTERN[word["start"]:word["end"]] == word["word"] for word in first["explanation"])
    assert [warning["code"] for warning in second["warnings"]] == ["too_short"]
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"]) and answer.headers["x-genre-version"]


def test_reference_route_numbers_the_genres_as_listed(http):
    assert http.get("/genres").json() == {"genres": list(GENRES)}
    answer = http.get("/small_bert/get_probabilities", params={"processed_description": "x" * 10_000 + " gunslinger sheriff"})
    assert list(answer.json()["probabilities"]) == [str(index) for index in range(27)]
    assert sum(answer.json()["probabilities"].values()) == pytest.approx(1)
    assert answer.headers["x-genre-model"] in [model["name"] for model in http.get("/models").json()["models"]]


def test_long_description_in_the_url(demo_server):
    text = quote("\N{CLAPPER BOARD}" * 19_000)  # four bytes a character, twelve in the URL
    request = f"GET /small_bert/get_probabilities?processed_description={text} HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert raw_answer(demo_server.port, request.encode()).startswith(b"HTTP/1.1 200 ")


def test_health_models_and_metrics(http):
    health = http.get("/health").json()
    assert health["live"] and health["ready"] and health["models"]
    models = http.get("/models").json()
    assert models["default"] == health["models"][0] and models["models"][0]["card"]["version"]
    http.post("/predict", json={"descriptions": [WESTERN]})
    metrics = http.get("/metrics").text
    assert re.search(r'genre_nb_predictions_total\{genre="western",model="\w+"\} [\d.]+', metrics)
    assert 'route="/predict",status="200"' in metrics


def test_request_id_is_kept_or_replaced(http):
    assert http.get("/health", headers={"X-Request-ID": "order-66"}).headers["x-request-id"] == "order-66"
    assert http.get("/health", headers={"X-Request-ID": "a" * 500}).headers["x-request-id"] != "a" * 500


# What it refuses

@pytest.mark.parametrize(("body", "status", "told"), [
    ({"descriptions": [WESTERN] * 3 + [""]}, 422, "descriptions[3] is empty"),
    ({"descriptions": [" \t\n"]}, 422, "descriptions[0] is empty"),
    ({"descriptions": ["x" * 20_001]}, 422, "descriptions[0] has 20,001 characters"),
    ({"descriptions": [WESTERN, None]}, 422, "descriptions[1] is null, not a string"),
    ({"descriptions": WESTERN}, 422, "descriptions is a string, not a list"),
    ({"descriptions": []}, 422, "descriptions is an empty list"),
    ({"descriptions": ["a"] * 65}, 422, "descriptions has more than 64 items"),
    ({}, 422, "descriptions is missing"),
    ([WESTERN], 422, "the body is a list, not an object"),
    (None, 422, "the body is missing"),
    ({"descriptions": [WESTERN], "model": "oracle"}, 422, "model 'oracle' is unknown; send one of: "),
    ({"descriptions": [WESTERN], "model": "../../etc"}, 422, "is unknown"),
    ({"descriptions": [WESTERN], "top_k": 0}, 422, "top_k is too small; send a whole number from 1 to 27"),
    ({"descriptions": [WESTERN], "top_k": "3"}, 422, "top_k is a string, not a whole number"),
    ({"descriptions": [WESTERN], "explain": 1}, 422, "explain is a number, not true or false"),
    ({"descriptions": [WESTERN], "topk": 3}, 422, "'topk' is not a field of this request"),
])
def test_refusals_say_what_to_send(http, body, status, told):
    answer = http.post("/predict", json=body)
    assert (answer.status_code, told in answer.json()["detail"]) == (status, True), answer.text


@pytest.mark.parametrize(("content", "status"), [
    (b"", 422), (b"{", 400), (b'{"descriptions": ["\xff\xfe"]}', 400), (b"\x00" * 100, 400), (b"[" * 200_000, 400),
    (b'{"descriptions": ["\\ud800"]}', 422), (b'{"\\ud800": 1, "descriptions": ["a"]}', 422),
    (b'{"descriptions": ["a"], "model": "\\udfff"}', 422), (b'{"descriptions": ["a"], "top_k": NaN}', 422),
    (b'{"descriptions": [Infinity]}', 422), (b'{"descriptions": ["a"], "top_k": 1e999}', 422),
    (b'{"descriptions": ["a"], "top_k": ' + b"9" * 5_000 + b"}", 400), (b"\xef\xbb\xbf{}", 422),
])
def test_damaged_json(http, content, status):
    answer = http.post("/predict", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, set(answer.json())) == (status, {"detail", "errors"}), answer.text
    assert "Traceback" not in answer.text


def test_other_content_types_and_methods(http):
    assert http.post("/predict", data={"descriptions": WESTERN}).status_code == 415
    text = http.post("/predict", content=json.dumps({"descriptions": [WESTERN]}), headers={"Content-Type": "text/plain"})
    assert text.status_code == 415 and "Content-Type: application/json" in text.json()["detail"]
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS"):
        answer = http.request(method, "/predict")
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert http.head("/health").status_code == 200


def test_paths_that_do_not_exist(http, client):
    for path in ("/predict/../../etc/passwd", "/docs/assets/%2e%2e/%2e%2e/core.py", "/docs/assets/../core.py", "/models/linear_svm", "/%00"):
        assert http.get(path).status_code in (400, 404), path
    assert client.get("/nowhere").json()["detail"].startswith("there is nothing here")


def test_body_over_the_limit(http, demo_server):
    def endless():
        for _ in range(100):
            yield b"x" * 1_000_000

    declared = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 104857600\r\n\r\n"
    assert raw_answer(demo_server.port, declared).startswith(b"HTTP/1.1 413 ")  # said before anything is sent
    with suppress(httpx.WriteError):  # closed while we were still sending
        assert http.post("/predict", content=endless()).status_code == 413
    long = json.dumps({"descriptions": ["x" * 20_000] * 101}).encode()
    assert http.post("/predict", content=long, headers={"Content-Type": "application/json"}).status_code == 413
    assert http.get("/health").json()["ready"]


@pytest.mark.parametrize("request_bytes", [
    b"\x00\xff\x16\x03\x01 not http\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: abc\r\n\r\n{}",
    b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
    b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /small_bert/get_probabilities?processed_description=%ff%fe%zz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
])
def test_broken_http(http, demo_server, request_bytes):
    received = raw_answer(demo_server.port, request_bytes, seconds=3)
    assert received == b"" or received.split(b" ")[1][:1] in (b"2", b"4"), received[:100]
    assert http.get("/health").json()["ready"]


def test_other_host_names_are_refused(http):
    for host in ("evil.example", "evil.example:5000", "127.0.0.1.evil.example", "localhost.evil.example"):
        for path in ("/", "/health", "/models"):
            assert http.get(path, headers={"Host": host}).status_code == 421, (host, path)
    for host in ("localhost", "LOCALHOST:99", "127.0.0.1:5000", "[::1]:5000"):
        assert http.get("/health", headers={"Host": host}).status_code == 200, host


def test_no_other_origin_is_allowed(http):
    origin = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for path in ("/", "/predict", "/health", "/gradio_api/info"):
        for answer in (http.get(path, headers=origin), http.options(path, headers=origin)):
            assert "access-control-allow-origin" not in answer.headers, path


# Under load

def test_many_clients_at_once(http):
    def ask(number: int) -> int:
        return http.post("/predict", json={"descriptions": [f"{WESTERN} Part {number}."] * 4, "explain": True}).status_code

    with ThreadPoolExecutor(32) as executor:
        statuses = list(executor.map(ask, range(200)))
    assert set(statuses) <= {200, 503} and statuses.count(200) > 100


def test_stalled_connections_do_not_stop_others(http, demo_server):
    half = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    stalled = [socket.create_connection(("127.0.0.1", demo_server.port)) for _ in range(200)]
    try:
        for connection in stalled:
            connection.sendall(half)
        assert http.post("/predict", json={"descriptions": [WESTERN]}).status_code == 200
    finally:
        for connection in stalled:
            connection.close()


def test_full_queue_says_when_to_come_back():
    from fastapi.testclient import TestClient

    from genre_nb.serving import create_app

    client = TestClient(create_app(demo=False, queue_limit=0))
    answer = client.post("/predict", json={"descriptions": [WESTERN]})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert client.get("/health").status_code == 200


# Start and stop

def test_busy_port_is_one_line_and_exit_code_1():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run([*PROGRAM, "serve", "--port", str(port)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert f"port {port} is in use" in line and f"make demo PORT={port + 1}" in line


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_stops_politely_and_logs_no_texts(start_server):
    "SIGTERM with a demo page open and an answer in flight: the answer arrives, the page does not hold the server up."
    server = start_server()
    httpx.post(server.url + "/predict", json={"descriptions": ["A zebrafish wearing a monocle."]})
    httpx.get(server.url + "/small_bert/get_probabilities", params={"processed_description": "zebrafish"})
    httpx.post(server.url + "/predict", json={"descriptions": ["zebrafish", ""], "zebrafish": 1})
    httpx.get(server.url + "/?description=zebrafish")
    heavy = {"descriptions": [(WESTERN + " ") * 40] * 64, "explain": True}
    with ThreadPoolExecutor(1) as executor, httpx.stream("GET", server.url + "/gradio_api/heartbeat/abc", timeout=60) as open_page:
        assert next(open_page.iter_lines()) == "data: ALIVE"
        answer = executor.submit(httpx.post, server.url + "/predict", json=heavy, timeout=60)
        while not answer.done() and "genre_nb_pending_requests 1.0" not in httpx.get(server.url + "/metrics").text:
            pass  # until the server is at it
        begin = time.monotonic()
        assert server.stop(signal.SIGTERM) == 0
        assert time.monotonic() - begin < STOP_SECONDS - 5  # it did not wait for the page until it was cut off
        assert len(answer.result().json()["predictions"]) == 64
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)
    log = "".join(server.lines)
    entries = [json.loads(line) for line in server.lines if line.startswith("{")]
    assert [(entry["route"], entry["status"]) for entry in entries if "route" in entry] == [
        ("/predict", 200), ("/small_bert/get_probabilities", 200), ("/predict", 422), ("/predict", 200)], log
    assert entries[0]["descriptions"] == 1 and "zebrafish" not in log and "Traceback" not in log


def test_launch_and_stop_in_this_process():
    from genre_nb.serving import PortInUse, launch

    with launch(port=0, demo=False) as server:
        assert httpx.get(server.url + "/health").json()["ready"]
        with pytest.raises(PortInUse, match=f"port {server.port} is in use"):
            launch(port=server.port, demo=False)
    socket.create_server(("127.0.0.1", server.port)).close()
    assert not [thread for thread in threading.enumerate() if thread.name == "genre_nb server"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux gives each loopback address its own sockets")
def test_listens_on_loopback_only(demo_server):
    assert demo_server.url.startswith("http://127.0.0.1:")
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", demo_server.port), timeout=2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_no_training_library_is_loaded(http, demo_server):
    http.post("/predict", json={"descriptions": [WESTERN], "explain": True})
    with open(f"/proc/{demo_server.process.pid}/maps", encoding="utf-8") as maps:
        loaded = maps.read()
    assert "sklearn" in loaded and not re.search(r"/(torch|fastai|transformers|spacy)/", loaded)


def test_api_works_without_gradio_and_training_libraries():
    program = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "fastai", "transformers", "gradio", "pandas", "matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from fastapi.testclient import TestClient
from genre_nb.serving import create_app
print(TestClient(create_app(demo=False)).post("/predict", json={"descriptions": [sys.argv[1]]}).json()["predictions"][0]["genre"])
try:
    create_app()
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program, WESTERN], capture_output=True, text=True, timeout=60)
    assert re.fullmatch(r"western\n.*pip install 'genre_nb\[serve\]'\n", done.stdout), done.stdout + done.stderr


# Nothing from other hosts

class Loads(HTMLParser):
    "Addresses that a browser would load for a page."

    LOADING_LINKS = ("stylesheet", "icon", "manifest", "preload", "modulepreload", "preconnect", "dns-prefetch", "prefetch")

    def __init__(self, page: str):
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page)
        self.addresses += style_addresses(page)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "link" and any(kind in (values.get("rel") or "") for kind in self.LOADING_LINKS) or tag == "base":
            self.addresses.append(values.get("href") or "")
        elif tag not in ("link", "a"):
            self.addresses += [values[name] for name in ("src", "srcset", "data", "poster", "background") if values.get(name)]


def style_addresses(text: str) -> list[str]:
    "Addresses that a style sheet would load."
    return re.findall(r"""url\(\s*["']?([^"')\s]+)""", text) + re.findall(r"""@import\s+["']([^"']+)""", text)


def script_addresses(text: str) -> list[str]:
    "Addresses on other hosts that a script would load as a module, worker or script."
    return re.findall(r"""(?:\bfrom|\bimport|\bimport\(|importScripts\(|new Worker\()\s*["'`]((?:https?:)?//[^"'`]+)""", text)


def is_external(address: str, base: str) -> bool:
    target = urlsplit(urljoin(base, address))
    return target.scheme in ("http", "https", "ws", "wss", "") and target.netloc != urlsplit(base).netloc


@pytest.mark.parametrize("page", ["/", "/docs"])
def test_pages_load_nothing_from_other_hosts(http, demo_server, page):
    answer = http.get(page)
    assert answer.status_code == 200
    waiting, seen = [urljoin(demo_server.url + page, address) for address in Loads(answer.text).addresses], set()
    assert not [address for address in waiting if is_external(address, demo_server.url)]
    while waiting:
        address = waiting.pop()
        if address in seen or not address.startswith("http"):
            continue
        seen.add(address)
        asset = http.get(address)
        kind = asset.headers.get("content-type", "")
        found = style_addresses(asset.text) if "css" in kind else script_addresses(asset.text) if "javascript" in kind else []
        external = [other for other in found if is_external(other, address)]
        assert not external, (address, external)
        if "css" in kind:
            waiting += [urljoin(address, other) for other in found]
    assert len(seen) >= 3


def test_gradio_is_configured_to_load_nothing_else(http):
    config = http.get("/config").json()
    assert not [sheet for sheet in config.get("stylesheets") or [] if sheet.startswith(("http", "//"))]
    assert config["analytics_enabled"] is False and not config.get("footer_links")


def test_browsers_are_told_to_load_nothing_else(http):
    for path in ("/", "/docs", "/health", "/docs/assets/swagger-ui.css"):
        answer = http.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "connect-src 'self'" in policy and "object-src 'none'" in policy
        assert not [source for source in policy.split("frame-ancestors")[0].split() if "." in source or "http" in source or source == "*"]
        assert answer.headers["x-content-type-options"] == "nosniff"


# Several processes

def children_of(process: subprocess.Popen) -> list[int]:
    "The worker processes of a server."
    with open(f"/proc/{process.pid}/task/{process.pid}/children", encoding="ascii") as listed:
        children = [int(number) for number in listed.read().split()]
    return [child for child in children if "spawn_main" in command_of(child)]


def command_of(number: int) -> str:
    "The command line of a process; empty if there is none of that number."
    try:
        with open(f"/proc/{number}/cmdline", encoding="utf-8") as command:
            return command.read()
    except OSError:
        return ""


def predictions_counted(server) -> float:
    "What /metrics says of this model's predictions."
    return sum(float(line.rpartition(" ")[2]) for line in httpx.get(server.url + "/metrics", timeout=30).text.splitlines()
               if line.startswith("genre_nb_predictions_total"))


def eventually(holds, seconds: float = 60) -> bool:
    "Does it hold in the end?"
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_workers_share_the_port_and_dead_ones_are_replaced(start_server):
    server = start_server("--no-demo", "--workers", "2")
    workers = children_of(server.process)
    assert len(workers) == 2
    for _ in range(12):
        assert httpx.post(server.url + "/predict", json={"descriptions": [WESTERN]}, timeout=30).status_code == 200
    assert {predictions_counted(server) for _ in range(6)} == {12}  # whichever answers
    os.kill(workers[0], signal.SIGKILL)
    assert eventually(lambda: len(set(children_of(server.process)) - {workers[0]}) == 2)
    assert httpx.post(server.url + "/predict", json={"descriptions": [WESTERN]}, timeout=60).status_code == 200
    assert predictions_counted(server) == 13  # what the dead one did still counts
    workers = children_of(server.process)
    assert server.stop(signal.SIGTERM) == 0
    assert not any(command_of(worker) for worker in workers)
    socket.create_server(("127.0.0.1", server.port)).close()  # the port is free
    log = "".join(server.lines)
    assert "Traceback" not in log and log.count('"event": "worker died"') == 1, log


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_workers_end_with_their_parent(start_server):
    server = start_server("--no-demo", "--workers", "2")
    workers = children_of(server.process)
    server.stop(signal.SIGKILL)
    assert eventually(lambda: not any("spawn_main" in command_of(worker) for worker in workers))
    socket.create_server(("127.0.0.1", server.port)).close()


def worker_that_fails(listener, host, ready):
    sys.exit("genre_nb: no such luck")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has one process")
def test_workers_that_can_not_start_end_the_server():
    program = ("from genre_nb.serving import Workers; from test_server import worker_that_fails; "
               "raise SystemExit(Workers(0, count=2, target=worker_that_fails).run())")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=TESTS)
    assert done.returncode == 1 and "no such luck" in done.stderr and "Traceback" not in done.stderr


def test_workers_and_demo_do_not_go_together():
    done = subprocess.run([*PROGRAM, "serve", "--port", "0", "--workers", "2"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("genre_nb: --workers needs --no-demo, because")


# Programs that speak Gradio's protocol

def test_gradio_client_can_ask_the_demo(demo_server):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(demo_server.url, verbose=False, analytics_enabled=False)
    try:
        assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/classify"]
        found = client.predict(WESTERN, api_name="/classify")
        assert found["genre"] == "western" and len(found["probabilities"]) == 27
        assert client.predict(WESTERN, "small_bert", api_name="/classify")["model"] == "small_bert"
        with pytest.raises(AppError, match="send a text of 1 to 20,000 characters"):
            client.predict(" ", api_name="/classify")
        with pytest.raises(AppError, match="model 'oracle' is unknown"):
            client.predict(WESTERN, "oracle", api_name="/classify")
    finally:
        client.close()
