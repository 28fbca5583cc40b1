"""The files of the project; servers for the tests: one in this process, one as a process of its own. Nothing uses a fixed port or the network."""
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from genre_nb.core import checkout_directory

PROGRAM = [sys.executable, "-c", "import sys; from genre_nb.command_line import main; sys.exit(main(sys.argv[1:]))"]
START_SECONDS = 60
ROOT = checkout_directory()


def project_files() -> list[Path]:
    "The files that git tracks; of a checkout without git, those that are not ignored."
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0 and listed.stdout:
        return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    folders = (".ci", "data/sample", "docs", "genre_nb", "metrics", "models", "nbs", "tests")
    found = [*ROOT.glob("*"), ROOT / "data" / "README.md", *(path for name in folders for path in (ROOT / name).rglob("*"))]
    return [path for path in found if path.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)]


@dataclass
class RunningServer:
    "A `genre_nb serve` process."

    process: subprocess.Popen
    url: str
    lines: list[str] = field(default_factory=list)  # of standard error, as they come

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:  # exit code
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


def start_serving(*arguments: str) -> RunningServer:
    "Start `genre_nb serve` on a free port and wait until it says that it is ready."
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "True"}  # the package must switch it off itself
    process = subprocess.Popen([*PROGRAM, "serve", "--port", "0", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, encoding="utf-8", env=environment)
    server = RunningServer(process, "")
    threading.Thread(target=lambda: server.lines.extend(process.stderr), daemon=True).start()
    watchdog = threading.Timer(START_SECONDS, process.kill)
    watchdog.start()
    try:
        ready = process.stdout.readline()
    finally:
        watchdog.cancel()
    found = re.search(r"is ready: .*?(http://[\w.:\[\]]+:\d+)", ready)
    if found is None:
        process.kill()
        process.wait()
        pytest.fail(f"the server did not start: {ready!r} {''.join(server.lines)[-1500:]}")
    server.url = found[1]
    return server


@pytest.fixture
def start_server() -> Iterator[Callable[..., RunningServer]]:
    "Start servers that the test may stop itself."
    started: list[RunningServer] = []

    def start(*arguments: str) -> RunningServer:
        started.append(start_serving(*arguments))
        return started[-1]

    yield start
    for server in started:
        server.stop(signal.SIGKILL)


@pytest.fixture(scope="session")
def demo_server() -> Iterator[RunningServer]:
    "One server with the demo for all tests that only ask."
    server = start_serving()
    yield server
    server.stop(signal.SIGKILL)


@pytest.fixture(scope="session")
def api():
    "The API in this process, without the demo."
    from genre_nb.serving import create_app

    return create_app(demo=False)


@pytest.fixture(scope="session")
def client(api):
    from fastapi.testclient import TestClient

    return TestClient(api)
