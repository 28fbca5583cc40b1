"""Downloading against a server on this computer that behaves badly: cut connections, wrong files, no answer."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import pandas as pd
import pytest

from genre_nb import data
from genre_nb.command_line import main
from genre_nb.data import HUGGING_FACE_DATASET, ORIGINAL_FILES, DownloadError, download, load_data

constants = pytest.importorskip("huggingface_hub.constants")
PLACE = f"/datasets/{HUGGING_FACE_DATASET}/resolve/refs%2Fconvert%2Fparquet/default"
TRAIN, TEST = f"{PLACE}/train/0000.parquet", f"{PLACE}/test/0000.parquet"
TRAIN_ROWS, TEST_ROWS = 400, 300
CHUNK = 1000  # bytes; the library keeps whole chunks of an interrupted answer


# ---- the server ----


def parquet(rows: int, seed: str) -> bytes:
    "A table like the mirror's: strange titles, line breaks in texts, and long enough that half of it is something."
    noise = [hashlib.sha256(f"{seed}{row}".encode()).hexdigest() for row in range(rows)]
    table = pd.DataFrame(
        {
            "title": [f'"Série {row}" (19{row % 90 + 10})' for row in range(rows)],
            "genre": [("drama", "documentary", "sci-fi", "talk-show")[row % 4] for row in range(rows)],
            "text": [f"A story, \t number {row}\nof the code {code} ::: and more 🤠" for row, code in enumerate(noise)],
        }
    )
    content = BytesIO()
    table.to_parquet(content)
    return content.getvalue()


@dataclass
class Mirror:
    "What the server has, how it misbehaves, and what it was asked."

    files: dict[str, bytes]
    cuts: dict[str, int] = field(default_factory=dict)  # path -> how many answers break off half-way
    status: int = 200  # of every answer
    hangs: threading.Event | None = None  # set when an answer has begun that will never end
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    url: str = ""

    def times(self, method: str, path: str) -> int:
        return sum(asked[:2] == (method, path) for asked in self.asked)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def mirror(self) -> Mirror:
        return self.server.mirror

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        wanted = self.headers.get("Range")
        self.mirror.asked.append((self.command, self.path, wanted))
        content = self.mirror.files.get(self.path)
        if self.mirror.status != 200 or content is None:
            return self.refuse(404 if content is None else self.mirror.status)
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0123456789abcdef" * 2 + "01234567")
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if body:
            self.send(content[start:])

    def send(self, content: bytes) -> None:
        half = len(content) // 2
        if self.mirror.hangs:
            self.wfile.write(content[:half])
            self.wfile.flush()
            self.mirror.hangs.set()
            self.rfile.read()  # until the other side is gone
        elif self.mirror.cuts.get(self.path, 0) > 0:
            self.mirror.cuts[self.path] -= 1
            self.wfile.write(content[:half])
            self.close_connection = True
        else:
            self.wfile.write(content)

    def refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *ignored) -> None:
        "Say nothing."


@pytest.fixture(scope="module")
def tables() -> dict[str, bytes]:
    return {TRAIN: parquet(TRAIN_ROWS, "train"), TEST: parquet(TEST_ROWS, "test")}


@pytest.fixture
def mirror(tables, monkeypatch, tmp_path) -> Iterator[Mirror]:
    "A small Hugging Face on a free port of this computer, and the library pointed to it."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.mirror = Mirror(dict(tables), url=f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_library_to(server.mirror.url, monkeypatch, tmp_path)
    yield server.mirror
    server.shutdown()
    server.server_close()


def point_library_to(url: str, monkeypatch, tmp_path: Path) -> None:
    import huggingface_hub

    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "DOWNLOAD_CHUNK_SIZE": CHUNK,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_TOKEN_PATH": str(tmp_path / "no token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library waits between its attempts; the test need not
    monkeypatch.setattr(data, "FULL_ROWS", {"train": TRAIN_ROWS, "test": TEST_ROWS})
    huggingface_hub.close_session()


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "data"


def originals(folder: Path) -> list[str]:
    "The original files that are there, whole or not."
    return [name for name in ORIGINAL_FILES if (folder / name).exists()]


def visible(folder: Path) -> list[str]:
    "What a person sees in the folder: no hidden caches."
    return sorted(path.name for path in folder.glob("[!.]*")) if folder.exists() else []


# ---- from Hugging Face ----


def test_the_mirror_becomes_the_three_files_and_these_a_data_set(mirror, tables, folder):
    told = download(folder, source="huggingface")
    assert {line.split(":")[0] for line in told} == set(ORIGINAL_FILES) and all(
        "row count checked" in line for line in told
    )
    dataset = load_data(folder)
    assert (dataset.name, len(dataset.train), len(dataset.test), dataset.rejected, dataset.extra) == (
        "IMDb",
        TRAIN_ROWS,
        TEST_ROWS,
        [],
        {},
    )
    for part, frame in ((TRAIN, dataset.train), (TEST, dataset.test)):
        wanted = pd.read_parquet(BytesIO(tables[part]))
        assert frame["genre"].tolist() == wanted["genre"].tolist()
        assert frame["description"].tolist() == [" ".join(text.split()) for text in wanted["text"]]
        assert frame["is_series"].all() and frame["title"].iloc[3] == "Série 3"
    assert visible(folder) == sorted(ORIGINAL_FILES)


def test_the_test_file_holds_no_labels(mirror, folder):
    download(folder, source="huggingface")
    for line in (folder / "test_data.txt").read_text(encoding="utf-8").splitlines():
        assert line.split(" ::: ")[2].startswith("A story")


def test_an_interrupted_download_goes_on_where_it_was(mirror, tables, folder):
    "Both answers break off half-way; the rest is asked for by its range, not the whole again."
    mirror.cuts = {TRAIN: 1, TEST: 1}
    download(folder, source="huggingface")
    ranges = [wanted for method, path, wanted in mirror.asked if method == "GET" and path == TRAIN]
    assert ranges == [None, f"bytes={len(tables[TRAIN]) // 2 // CHUNK * CHUNK}-"]
    assert len(load_data(folder).train) == TRAIN_ROWS


def test_a_connection_that_always_breaks_is_told_and_leaves_nothing(mirror, folder):
    mirror.cuts = {TRAIN: 10_000}
    mirror.files[TRAIN] = mirror.files[TRAIN][:100]  # short, so that halving it soon gives no byte any more
    with pytest.raises(DownloadError) as told:
        download(folder, source="huggingface")
    assert "run the command again" in str(told.value)
    assert not originals(folder) and visible(folder) == []


def test_the_next_attempt_keeps_what_the_last_one_had(mirror, tables, folder):
    "The train part came through, the test part did not: only the latter is fetched again."
    mirror.files.pop(TEST)
    with pytest.raises(DownloadError):
        download(folder, source="huggingface")
    assert originals(folder) == []
    mirror.files[TEST] = tables[TEST]
    download(folder, source="huggingface")
    assert originals(folder) == list(ORIGINAL_FILES)
    assert mirror.times("GET", TRAIN) == 1


@pytest.mark.parametrize("difference", [-1, 1])
def test_a_mirror_with_another_number_of_rows_is_refused(mirror, folder, difference):
    mirror.files[TEST] = parquet(TEST_ROWS + difference, "test")
    with pytest.raises(DownloadError) as told:
        download(folder, source="huggingface")
    assert f"{TEST_ROWS + difference:,} rows" in str(told.value) and f"{TEST_ROWS:,}" in str(told.value)
    assert visible(folder) == []


@pytest.mark.parametrize(
    "content",
    [b"<html><body>Please log in to the hotel's network</body></html>", b"PAR1" + bytes(500) + b"PAR1", b""],
    ids=["a web page", "a broken table", "nothing"],
)
def test_something_that_is_no_table_is_refused(mirror, folder, content):
    mirror.files[TRAIN] = content
    with pytest.raises(DownloadError):
        download(folder, source="huggingface")
    assert visible(folder) == []


def test_a_table_with_other_columns_is_refused(mirror, folder):
    content = BytesIO()
    pd.DataFrame({"name": ["x"] * TRAIN_ROWS, "label": [1] * TRAIN_ROWS}).to_parquet(content)
    mirror.files[TRAIN] = content.getvalue()
    with pytest.raises(DownloadError):
        download(folder, source="huggingface")
    assert visible(folder) == []


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_an_answer_that_is_no_file_is_told_with_advice(mirror, folder, status):
    mirror.status = status
    with pytest.raises(DownloadError) as told:
        download(folder, source="huggingface")
    assert "--source kaggle" in str(told.value) and visible(folder) == []


def unused_url() -> str:
    "An address of this computer where nobody listens."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_without_a_network_the_advice_says_what_to_do(monkeypatch, tmp_path, folder, capsys):
    point_library_to(unused_url(), monkeypatch, tmp_path)
    assert main(["download", "--source", "huggingface", "--data", str(folder)]) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    for word in (
        "huggingface",
        "network",
        "--source kaggle",
        "by hand",
        *ORIGINAL_FILES,
        str(folder),
        "embedded sample",
    ):
        assert word in told
    assert visible(folder) == []


def test_files_that_were_there_survive_a_failed_download(mirror, folder):
    folder.mkdir()
    (folder / "train_data.txt").write_text("1 ::: M (1931) ::: crime ::: Mine.\n")
    mirror.status = 503
    with pytest.raises(DownloadError):
        download(folder, source="huggingface")
    assert (folder / "train_data.txt").read_text() == "1 ::: M (1931) ::: crime ::: Mine.\n"
    assert visible(folder) == ["train_data.txt"]


def test_a_killed_download_leaves_no_half_file_and_can_be_repeated(mirror, tables, folder, tmp_path):
    mirror.hangs = threading.Event()
    environment = os.environ | {
        "HF_ENDPOINT": mirror.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hub"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "GENRE_NB_HOME": str(tmp_path),
    }
    program = f"from genre_nb.data import download; download({str(folder)!r}, source='huggingface')"
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    assert mirror.hangs.wait(120)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert visible(folder) == []
    with pytest.raises(FileNotFoundError, match="genre_nb download"):
        load_data(folder)
    mirror.hangs = None
    download(folder, source="huggingface")
    assert len(load_data(folder).test) == TEST_ROWS


# ---- from Kaggle ----

LINE = b"1 ::: M (1931) ::: crime ::: A city hunts a man. \n"


@pytest.fixture
def kaggle(tmp_path, monkeypatch) -> Path:
    "A data set as kagglehub unpacks it, with checksums to match."
    folder = tmp_path / "kaggle" / "versions" / "1" / "Genre Classification Dataset"
    folder.mkdir(parents=True)
    for name in ORIGINAL_FILES:
        (folder / name).write_bytes(LINE.replace(b"\n", b"\r\n"))
    monkeypatch.setattr("kagglehub.dataset_download", lambda name: str(folder.parent))
    monkeypatch.setattr(data, "PUBLISHED_SHA256", {name: hashlib.sha256(LINE).hexdigest() for name in ORIGINAL_FILES})
    return folder


@pytest.mark.parametrize("wrong", ORIGINAL_FILES)
def test_one_wrong_checksum_keeps_all_three_files_away(kaggle, folder, wrong):
    "Train rows of one edition beside test rows of another would be worse than none."
    (kaggle / wrong).write_bytes(b"something else\n")
    with pytest.raises(DownloadError) as told:
        download(folder)
    assert wrong in str(told.value) and "checksum" in str(told.value)
    assert visible(folder) == []


def test_a_missing_file_is_named(kaggle, folder):
    (kaggle / "test_data_solution.txt").unlink()
    with pytest.raises(DownloadError, match="test_data_solution.txt"):
        download(folder)
    assert visible(folder) == []


def test_what_is_there_already_is_not_fetched_again(kaggle, folder, monkeypatch):
    download(folder)
    monkeypatch.setattr("kagglehub.dataset_download", lambda name: pytest.fail("fetched again"))
    assert all("already there" in line for line in download(folder))


def test_a_damaged_file_is_fetched_again(kaggle, folder):
    download(folder)
    (folder / "test_data.txt").write_bytes(LINE[:20])
    download(folder)
    assert (folder / "test_data.txt").read_bytes() == LINE


def test_the_real_kagglehub_without_a_network_gives_advice(folder, tmp_path):
    "Its own exceptions, not ones that we imagine: a process whose Kaggle is an address where nobody listens."
    environment = os.environ | {
        "KAGGLE_API_ENDPOINT": unused_url(),
        "KAGGLEHUB_CACHE": str(tmp_path / "cache"),
        "KAGGLE_CONFIG_DIR": str(tmp_path),
        "DISABLE_COLAB_CACHE": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "GENRE_NB_HOME": str(tmp_path),
    }
    program = (
        f"import sys; from genre_nb.command_line import main; sys.exit(main(['download', '--data', {str(folder)!r}]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "--source huggingface" in result.stderr and visible(folder) == []
