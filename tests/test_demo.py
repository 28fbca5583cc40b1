"""The demo's uploads without a browser, as somebody would send them who means no good."""
import json
import signal
import time
from pathlib import Path

import httpx
import pytest

from genre_nb.batch import MAXIMUM_ROWS, MAXIMUM_UPLOAD
from genre_nb.service import MAXIMUM_BODY

MOVIES = b"title,plot\nDust,A lone gunslinger rides into a dusty frontier town to face the sheriff and his outlaws.\n"


@pytest.fixture(scope="module")
def http(demo_server):
    with httpx.Client(base_url=demo_server.url, timeout=60) as client:
        yield client


def upload(http, content: bytes, name: str = "movies.csv") -> httpx.Response:
    return http.post("/gradio_api/upload", files={"files": (name, content, "text/csv")})


def button_index(http, element: str) -> int:
    "The number of the event that a button starts."
    config = http.get("/config").json()
    [number] = [part["id"] for part in config["components"] if part["props"].get("elem_id") == element]
    [event] = [one["id"] for one in config["dependencies"] if [number, "click"] in [list(target) for target in one["targets"]]]
    return event


def batch_of(http, path: str, session: str = "test", model: str = "linear_svm") -> list[dict]:
    "What Gradio's queue tells while a file is worked on."
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    event = {"fn_index": button_index(http, "g-batch-start"), "session_hash": session, "data": [file, model, ""]}
    http.post("/gradio_api/queue/join", json=event).raise_for_status()
    told = []
    with http.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data:"):
                told.append(json.loads(line[5:]))
                if told[-1]["msg"] in ("process_completed", "close_stream"):
                    return told
    return told


def test_upload_and_batch(http):
    [path] = upload(http, MOVIES).json()
    told = batch_of(http, path)
    assert told[-1]["success"] and "Rows that could not be used" not in json.dumps(told)
    assert "1 row classified" in json.dumps(told) and "movies.genres.csv" in json.dumps(told)


@pytest.mark.parametrize("name", ["../../../../tmp/evil.csv", "..\\..\\evil.csv", "/etc/cron.d/evil.csv", "....//....//evil.csv", ".csv",
                                  "a" * 300 + ".csv", "x\x00y.csv", "<img src=x onerror=alert(1)>.csv"])
def test_names_of_uploads_are_no_paths(http, name):
    answer = upload(http, MOVIES, name)
    assert answer.status_code in (200, 400, 500) and "Traceback" not in answer.text
    if answer.status_code == 200:
        [path] = answer.json()
        assert Path(path).resolve().is_relative_to(Path(path).parent.resolve()) and "gradio" in path and ".." not in Path(path).parts
        assert "<" not in Path(path).name
    assert not Path("/tmp/evil.csv").exists() and not Path("/etc/cron.d/evil.csv").exists()


def test_uploads_have_a_size(http):
    assert upload(http, b"x" * MAXIMUM_UPLOAD, "a.txt").status_code == 200
    assert upload(http, b"x" * (MAXIMUM_UPLOAD + 1), "a.txt").status_code == 413
    assert upload(http, b"x" * MAXIMUM_BODY, "a.txt").status_code == 413


@pytest.mark.parametrize("element", ["g-batch-start", "g-classify", "g-ask-all"])
def test_a_file_that_was_not_uploaded_is_not_read(http, tmp_path, element):
    "A mounted Gradio app would copy any file that is named, and whatever component gets it."
    secret = tmp_path / "secret.csv"
    secret.write_text("plot\nzebrafish\n")
    [path] = upload(http, MOVIES).json()
    for other in (str(secret), "/etc/passwd", "../../etc/passwd", f"{Path(path).parent}/../../../etc/passwd", "/proc/self/environ",
                  "http://127.0.0.1:1/movies.csv"):
        file = {"path": other, "meta": {"_type": "gradio.FileData"}}
        event = {"fn_index": button_index(http, element), "session_hash": "evil", "data": [file, "linear_svm", ""]}
        for route in ("queue/join", "run/predict", "api/predict"):
            answer = http.post(f"/gradio_api/{route}", json=event)
            assert answer.status_code in (400, 404, 405) and "zebrafish" not in answer.text and "root:" not in answer.text, (route, answer.text)
    for other in ("/etc/passwd", str(secret)):
        assert http.get(f"/gradio_api/file={other}").status_code in (403, 404)


def test_gradio_checks_paths_itself(demo_server):
    "The second line behind our own guard: the flag that makes Gradio look at paths is set."
    from genre_nb.serving import create_app

    app = create_app()
    [demo] = [route.app.get_blocks() for route in app.routes if hasattr(getattr(route, "app", None), "get_blocks")]
    assert demo.has_launched


def test_a_file_of_too_many_rows_is_refused(http):
    [path] = upload(http, b"A boat sinks.\n" * (MAXIMUM_ROWS + 1), "many.txt").json()
    assert f"more than {MAXIMUM_ROWS:,} rows" in json.dumps(batch_of(http, path))


def test_a_large_file_lets_others_through_and_can_be_stopped_with_the_server(start_server, monkeypatch, tmp_path):
    "While a file is worked on, single texts are answered; SIGTERM ends both, and no upload stays behind."
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    server = start_server()
    with httpx.Client(base_url=server.url, timeout=60) as http:
        long = " ".join(["A widow and her brother cross the stormy sea in an old boat to find the lost lighthouse."] * 6)
        [path] = upload(http, f"{long}\n".encode() * 1_500, "many.txt").json()
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        event = {"fn_index": button_index(http, "g-batch-start"), "session_hash": "s", "data": [file, "small_bert", ""]}
        http.post("/gradio_api/queue/join", json=event).raise_for_status()
        with (httpx.Client(base_url=server.url, timeout=60) as other,
              other.stream("GET", "/gradio_api/queue/data", params={"session_hash": "s"}) as stream):
            for line in stream.iter_lines():
                if "process_generating" in line:
                    break
            for _ in range(5):
                assert http.post("/predict", json={"descriptions": [long]}).status_code == 200
            assert Path(path).exists()
            begin = time.monotonic()
            assert server.stop(signal.SIGTERM) == 0
            assert time.monotonic() - begin < 20
    left = [found for found in (tmp_path / "uploads").rglob("*") if found.is_file()]
    assert not [found for found in left if found.stat().st_size]  # Gradio leaves an empty file of its own
    assert "widow" not in "".join(server.lines) and "Traceback" not in "".join(server.lines)
