"""Measure a server under load: how soon it is ready, how fast it answers, whether its memory stays flat.

    python tests/load.py --seconds 600 --clients 32 --model small_bert --output metrics/serving.json

It starts `genre_nb serve` itself, on a free port, and asks it over real connections that stay open, each client sending
its next request when the last one is answered. Descriptions have 100 words and no two are the same. What it prints is
JSON: milliseconds, requests a second, statuses, resident memory of the process and its children. With `--output FILE` the
result is also written to a file, under the name of the model, beside what is in it. Run it on an idle machine.
"""
import argparse
import asyncio
import json
import platform
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAM = "import sys; from genre_nb.command_line import main; sys.exit(main(sys.argv[1:]))"
MEMORY_PARTS = 20  # the memory is read so many times
STALLED_HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
WORDS = """a young woman returns to the small town where her father was the sheriff and finds an old letter that changes what
she believed about the war his brother and the night of the fire while strangers arrive from the city with money guns and a
plan to take the valley detective murder love ghost music school family dog robot ship island king""".split()


# One connection and its requests

def request_of(path: str, body: dict | None = None) -> bytes:
    "A request that keeps its connection."
    if body is None:
        return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def prediction_request(model: str, seed: random.Random, explain: bool = False) -> bytes:
    "A description of 100 words that nobody has sent before."
    description = " ".join(seed.choices(WORDS, k=100))
    return request_of("/predict", {"descriptions": [description], "model": model, "explain": explain})


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    "Status, headers and the whole body of the next answer; one that is cut off raises IncompleteReadError."
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    return int(head[0].split()[1]), headers, await reader.readexactly(int(headers.get("content-length", 0)))


async def ask(port: int, request: bytes) -> tuple[int, dict[str, str], bytes]:
    "The answer to one request on a connection of its own."
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        return await read_answer(reader)
    finally:
        writer.close()


class Tally:
    "What the clients saw."

    def __init__(self):
        self.milliseconds: list[float] = []  # of answers with status 200
        self.outcomes: Counter = Counter()  # status, or what went wrong


async def client(port: int, model: str, number: int, until: float, tally: Tally) -> None:
    "Send one request after the other on one connection, until the time is over; a busy server is given the time it asks for."
    seed, connection = random.Random(number), None
    while time.perf_counter() < until:
        try:
            if connection is None:
                connection = await asyncio.open_connection("127.0.0.1", port)
            reader, writer = connection
            request, begin = prediction_request(model, seed), time.perf_counter()
            writer.write(request)
            status, headers, body = await read_answer(reader)
            taken = (time.perf_counter() - begin) * 1000
        except (OSError, asyncio.IncompleteReadError) as error:
            tally.outcomes[type(error).__name__] += 1
            connection = None
            continue
        right = status != 200 or json.loads(body)["model"] == model
        tally.outcomes[str(status) if right else "another model"] += 1
        if status == 200:
            tally.milliseconds.append(taken)
        elif status == 503:
            await asyncio.sleep(float(headers.get("retry-after", "1")))
        if headers.get("connection") == "close":
            connection = None
    if connection is not None:
        connection[1].close()


async def load(port: int, model: str, clients: int, seconds: float, memory: Callable[[], float]) -> tuple[Tally, list[float]]:
    "Let clients ask for some time; what they saw, and the memory along the way in megabytes."
    tally, readings, until = Tally(), [memory()], time.perf_counter() + seconds
    asking = [asyncio.create_task(client(port, model, number, until, tally)) for number in range(clients)]
    for _ in range(MEMORY_PARTS):
        await asyncio.sleep(seconds / MEMORY_PARTS)
        readings.append(memory())
    await asyncio.gather(*asking)
    return tally, readings


async def one_after_the_other(port: int, model: str, requests: int, seed: int, explain: bool = False) -> Tally:
    "One client, so many requests: what a single caller waits."
    tally, random_words = Tally(), random.Random(seed)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(requests):
        request, begin = prediction_request(model, random_words, explain), time.perf_counter()
        writer.write(request)
        status, _, _ = await read_answer(reader)
        tally.outcomes[str(status)] += 1
        tally.milliseconds.append((time.perf_counter() - begin) * 1000)
    writer.close()
    return tally


@contextmanager
def closing(writers: list[asyncio.StreamWriter]) -> Iterator[None]:
    "Close these connections in the end."
    try:
        yield
    finally:
        for writer in writers:
            writer.close()


async def beside_stalled(port: int, model: str, stalled: int, requests: int) -> tuple[Tally, Tally]:
    "What a single caller waits with and without connections that stop in the middle of a request, by turns."
    parts, alone, beside = 4, Tally(), Tally()
    for part in range(parts):
        found = await one_after_the_other(port, model, requests // parts, 2 * part)
        alone.milliseconds += found.milliseconds
        writers = [(await asyncio.open_connection("127.0.0.1", port))[1] for _ in range(stalled)]
        with closing(writers):
            for writer in writers:
                writer.write(STALLED_HEAD)
            found = await one_after_the_other(port, model, requests // parts, 2 * part + 1)
        beside.milliseconds += found.milliseconds
        beside.outcomes += found.outcomes
    return alone, beside


# The server

def start(arguments: list[str]) -> tuple[subprocess.Popen, int, float]:
    "Start `genre_nb serve`; the process, its port, and the seconds until it said that it is ready."
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, "serve", "--port", "0", *arguments], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    line = process.stdout.readline()
    seconds = time.perf_counter() - begin
    if "is ready" not in line:
        process.kill()
        raise SystemExit(f"the server did not start: {line!r}")
    return process, int(re.search(r"http://[\w.]+:(\d+)", line)[1]), seconds


def family_of(process: int) -> list[int]:
    "A process and all below it; Linux only."
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(one for child in children for one in family_of(int(child)))]


def memory_of(process: int) -> float:
    "Resident memory of a process and all below it, in megabytes; 0 where /proc does not tell."
    if not Path("/proc/self/status").exists():
        return 0.0
    texts = [Path(f"/proc/{one}/status").read_text() for one in family_of(process)]
    return round(sum(int(re.search(r"VmRSS:\s+(\d+)", text)[1]) for text in texts) / 1024, 1)


def training_libraries_in(process: int) -> list[str]:
    "Which training libraries a process has loaded; it should be none."
    maps = Path(f"/proc/{process}/maps")
    loaded = maps.read_text() if maps.exists() else ""
    return sorted(set(re.findall(r"/(torch|fastai|transformers|spacy)/", loaded)))


# The report

def percentiles(milliseconds: list[float]) -> dict[str, float]:
    "How long half, nine in ten and 99 in a hundred took at most."
    ranked = sorted(milliseconds)
    return {f"p{part}": round(ranked[min(len(ranked) * part // 100, len(ranked) - 1)], 2) for part in (50, 90, 99)} if ranked else {}


def growth(readings: list[float]) -> float:
    "By how many percent the last quarter's memory is above that of the second quarter; the first one is warming up."
    quarter = len(readings) // 4
    early, late = readings[quarter:2 * quarter], readings[-quarter:]
    return round((sum(late) / len(late)) / (sum(early) / len(early)) * 100 - 100, 2) if sum(early) else 0.0


async def measure(wanted: argparse.Namespace, process: int, port: int) -> dict:
    "Everything that is asked of a running server."
    at_start = memory_of(process)
    listed = [model["name"] for model in json.loads((await ask(port, request_of("/models")))[2])["models"]]
    await one_after_the_other(port, wanted.model, wanted.warm_up, 0)  # loads the model
    with_model = memory_of(process)
    single = await one_after_the_other(port, wanted.model, wanted.requests, 1)
    explained = await one_after_the_other(port, wanted.model, max(wanted.requests // 4, 1), 2, explain=True)
    alone, beside = await beside_stalled(port, wanted.model, wanted.stalled, wanted.requests)
    tally, readings = await load(port, wanted.model, wanted.clients, wanted.seconds, lambda: memory_of(process))
    return {
        "models": listed,
        "one_client": {"requests": wanted.requests, "milliseconds": percentiles(single.milliseconds), "statuses": dict(single.outcomes)},
        "one_client_explained": {"requests": max(wanted.requests // 4, 1), "milliseconds": percentiles(explained.milliseconds),
                                 "statuses": dict(explained.outcomes)},
        "beside_stalled_connections": {
            "connections": wanted.stalled, "milliseconds": percentiles(beside.milliseconds), "statuses": dict(beside.outcomes),
            "times_slower": round(percentiles(beside.milliseconds)["p50"] / percentiles(alone.milliseconds)["p50"], 2)},
        "load": {"clients": wanted.clients, "seconds": wanted.seconds, "milliseconds": percentiles(tally.milliseconds),
                 "requests_per_second": round(len(tally.milliseconds) / wanted.seconds, 1), "statuses": dict(tally.outcomes)},
        "memory_megabytes": {"ready": at_start, "model_loaded": with_model, "load_start": readings[0],
                             "load_middle": readings[len(readings) // 2], "load_end": readings[-1], "largest": max(readings),
                             "growth_percent": growth(readings)},
    }


def measured(wanted: argparse.Namespace) -> dict:
    "Start a server, measure it, stop it; the report."
    arguments = [*(["--no-demo"] if wanted.no_demo else []), *(["--workers", str(wanted.workers)] if wanted.workers > 1 else [])]
    process, port, ready_seconds = start(arguments)
    from genre_nb.core import hardware

    try:
        report = asyncio.run(measure(wanted, process.pid, port))
        libraries = training_libraries_in(process.pid)
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    finally:
        process.kill()
        process.wait()
    return {"model": wanted.model, "workers": wanted.workers, "demo": not wanted.no_demo, **hardware(),
            "python": platform.python_version(), "ready_seconds": round(ready_seconds, 2), **report,
            "training_libraries_loaded": libraries, "exit_code": code}


def write_report(report: dict, path: Path) -> None:
    "Put a report beside those of other models; the file appears only when it is complete."
    from genre_nb.core import atomic_path

    reports = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    name = report["model"] + (f"_{report['workers']}_workers" if report["workers"] > 1 else "")
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({**reports, name: report}, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    "The program; exit code 1 if any request failed in a way that was not meant."
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="of load (default: 60)")
    parser.add_argument("--clients", type=int, default=32, help="at the same time (default: 32)")
    parser.add_argument("--model", default="linear_svm", help="default: linear_svm")
    parser.add_argument("--requests", type=int, default=200, help="of a single client, before the load (default: 200)")
    parser.add_argument("--warm-up", type=int, default=20, help="requests that are not counted (default: 20)")
    parser.add_argument("--stalled", type=int, default=200, help="connections that stop in the middle of a request (default: 200)")
    parser.add_argument("--workers", type=int, default=1, help="processes of the server; more than one with --no-demo")
    parser.add_argument("--no-demo", action="store_true", help="serve the API alone")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the report there, beside those of other models")
    wanted = parser.parse_args(arguments)
    report = measured(wanted)
    print(json.dumps(report, indent=2))
    if wanted.output:
        write_report(report, wanted.output)
    statuses = {status for part in ("one_client", "one_client_explained", "beside_stalled_connections", "load") for status in report[part]["statuses"]}
    return 0 if statuses <= {"200", "503"} and report["exit_code"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
