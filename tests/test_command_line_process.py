"""The program as people run it: pipes, signals, terminals that know no Unicode, and input without end."""

import csv
import fcntl
import gzip
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import termios
import threading
from contextlib import suppress
from io import BufferedReader, BytesIO, RawIOBase, StringIO, TextIOWrapper
from pathlib import Path

import pytest

from genre_nb import __version__
from genre_nb.command_line import main
from genre_nb.core import resource_directory
from genre_nb.data import DownloadError, open_records

PROGRAM = Path(sysconfig.get_path("scripts")) / "genre_nb"
WESTERN = (
    "A lone gunslinger rides into a dusty frontier town to settle an old score with the sheriff and his ranch hands."
)
HORROR = "A vampire haunts a castle and drinks the blood of the terrified guests who lost their way in the night."
PLOTS = (WESTERN, HORROR)
PATIENCE = 120  # seconds until a hanging process is a failure; no promise about speed


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    "That of a fresh login: no Python settings, nothing of the developer's."
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GENRE_NB", "LC_", "LANG"))
    }
    return kept | {"GENRE_NB_HOME": str(tmp_path / "home"), "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture
def run(tmp_path, environment):
    "Run the program to its end in a folder of its own: run('predict', '-', stdin=…)."

    def run(*arguments: str | Path, stdin: str | bytes = b"", **changes: str) -> subprocess.CompletedProcess:
        stdin = stdin.encode() if isinstance(stdin, str) else stdin
        return subprocess.run(
            [PROGRAM, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            cwd=tmp_path,
            env=environment | changes,
            timeout=PATIENCE,
        )

    return run


@pytest.fixture
def call(tmp_path, monkeypatch):
    "The same as `run` without a process of its own: for what is the same there, and much faster."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GENRE_NB_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("GENRE_NB_DATA", raising=False)

    def call(*arguments: str | Path, stdin: str | bytes = b"") -> subprocess.CompletedProcess:
        content = stdin.encode() if isinstance(stdin, str) else stdin
        streams = {
            "stdin": TextIOWrapper(BufferedReader(BytesIO(content))),
            "stdout": TextIOWrapper(BytesIO()),
            "stderr": TextIOWrapper(BytesIO()),
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            try:
                code = main([str(argument) for argument in arguments])
            except SystemExit as end:
                code = end.code
        for stream in (streams["stdout"], streams["stderr"]):
            stream.flush()
        return subprocess.CompletedProcess(
            arguments, code, streams["stdout"].buffer.getvalue(), streams["stderr"].buffer.getvalue()
        )

    return call


@pytest.fixture
def start(tmp_path, environment):
    "Start the program with pipes; it is killed when the test ends. Signals work as in a terminal."
    started = []

    def start(*arguments: str | Path, **options) -> subprocess.Popen:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        process = subprocess.Popen(
            [sys.executable, "-c", AS_IN_A_TERMINAL, PROGRAM, *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            **pipes,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            with suppress(BrokenPipeError):
                pipe and pipe.close()


# A shell that runs pytest in the background makes it, and so its children, deaf to SIGINT: undo that before exec.
AS_IN_A_TERMINAL = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    "Wait for the end; the exit code and what was said on standard error."
    _, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, errors.decode()


def table(result: subprocess.CompletedProcess, delimiter: str = ",") -> list[dict[str, str]]:
    return list(csv.DictReader(StringIO(result.stdout.decode()), delimiter=delimiter))


def wait_for_output(process: subprocess.Popen) -> bytes:
    "The first line on standard output; a process that never says anything is killed, and the answer is then empty."
    alarm = threading.Timer(PATIENCE, process.kill)
    alarm.start()
    try:
        return process.stdout.readline()
    finally:
        alarm.cancel()


def feed(process: subprocess.Popen, rows: int) -> None:
    process.stdin.write(b"".join(f"{number} {PLOTS[number % 2]}\n".encode() for number in range(rows)))
    process.stdin.flush()


# ---- formats ----

JSON_LINES = "".join(json.dumps({"id": number, "plot": plot}) + "\n" for number, plot in enumerate(PLOTS))
INPUTS = {
    "lines": ("".join(plot + "\n" for plot in PLOTS), ()),
    "native": ("".join(f"{number} ::: Film (1931) ::: drama ::: {plot}\n" for number, plot in enumerate(PLOTS)), ()),
    "jsonl": (JSON_LINES, ()),
    "csv": ("id,plot\n" + "".join(f'{number},"{plot}"\n' for number, plot in enumerate(PLOTS)), ("--format", "csv")),
    "tsv": ("id\tplot\n" + "".join(f"{number}\t{plot}\n" for number, plot in enumerate(PLOTS)), ("--format", "tsv")),
}


def genres_of(result: subprocess.CompletedProcess, format: str) -> list[str]:
    if format == "jsonl":
        return [json.loads(line)["predicted_genre"] for line in result.stdout.splitlines()]
    return [row["predicted_genre"] for row in table(result, "\t" if format in ("tsv", "lines") else ",")]


@pytest.mark.parametrize("format", INPUTS)
def test_every_format_comes_through_standard_input(call, format):
    content, arguments = INPUTS[format]
    result = call("predict", *arguments, stdin=content)
    assert (result.returncode, result.stderr) == (0, b"")
    assert genres_of(result, format) == ["western", "horror"]


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_files_may_be_compressed_have_windows_line_ends_and_a_byte_order_mark(call, tmp_path, format):
    content = INPUTS[format][0].replace("\n", "\r\n").encode("utf-8-sig")
    (tmp_path / f"movies.{format}.gz").write_bytes(gzip.compress(content))
    result = call("predict", f"movies.{format}.gz")
    assert (result.returncode, result.stderr) == (0, b"")
    assert genres_of(result, format) == ["western", "horror"]


def test_the_columns_of_the_input_are_kept_in_place(call, tmp_path):
    (tmp_path / "movies.csv").write_text(f'year,"a ""quoted"" name",overview,genre\n1931,"x, y","{WESTERN}",drama\n')
    result = call("predict", "movies.csv", "--top-k", "2", "--explain")
    assert result.returncode == 0
    row = table(result)[0]
    assert list(row)[:4] == ["year", 'a "quoted" name', "overview", "genre"]
    assert (row["year"], row['a "quoted" name'], row["genre"], row["predicted_genre"]) == (
        "1931",
        "x, y",
        "drama",
        "western",
    )
    assert len(row["predicted_top"].split()) == 2 and row["predicted_words"]


@pytest.mark.parametrize(
    "content",
    [
        f'{{"description": "{WESTERN}", "a": 1}}\n{{"b": 2, "description": "{HORROR}"}}\n',
        f"1 ::: M (1931) ::: crime ::: {WESTERN}\n2 ::: Ran (1985) ::: {HORROR}\n",
    ],
    ids=["jsonl", "native"],
)
def test_records_of_different_shapes_never_shift_a_table(call, tmp_path, content):
    "Every row that is written has its values under their own names; what does not fit is reported."
    (tmp_path / "movies.txt").write_text(content)
    result = call("predict", "movies.txt", "--output", "out.csv")
    assert result.returncode in (0, 1, 3)
    if result.returncode != 1:
        rows = list(csv.DictReader((tmp_path / "out.csv").open(newline="")))
        listed = tmp_path / "out.csv.rejected.jsonl"
        rejected = listed.read_text().splitlines() if listed.exists() else []
        assert len(rows) + len(rejected) == 2
        assert [row["description"] for row in rows] == list(PLOTS)[: len(rows)]
        assert all(row["predicted_genre"] == genre for row, genre in zip(rows, ("western", "horror")))


class InPieces(RawIOBase):
    "A pipe whose writer is slow: each read gives the next piece."

    def __init__(self, *pieces: bytes):
        self.pieces = list(pieces)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        piece = self.pieces.pop(0) if self.pieces else b""
        buffer[: len(piece)] = piece
        return len(piece)


@pytest.mark.parametrize(
    "pieces, description",
    [
        ((b"1 ::", b": M (1931) ::: crime ::: A city.\n"), "A city."),
        ((b"\n" * 5000, b'{"description": "x"}\n'), "x"),
        ((b"\xef", b'\xbb\xbf{"descr', b'iption": "x"}\n'), "x"),
    ],
    ids=["native", "blank lines", "byte order mark"],
)
def test_a_slow_pipe_does_not_change_the_format(pieces, description):
    "The whole first line decides, however its bytes arrive."
    format, records = open_records(BufferedReader(InPieces(*pieces)))
    assert format == ("native" if b":::" in b"".join(pieces) else "jsonl")
    assert [record.fields["description"] for record in records] == [description]


# ---- exit codes ----


def test_the_version_is_the_packages(run):
    assert run("--version").stdout.decode() == f"genre_nb {__version__}\n"


def one_line(result: subprocess.CompletedProcess) -> str:
    "The single line that says what went wrong."
    assert b"Traceback" not in result.stderr
    lines = result.stderr.decode().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    "arguments, told",
    [
        (("predict", "nowhere.csv"), "nowhere.csv"),
        (("predict", "."), "directory"),
        (("predict", "--model", "oracle"), "linear_svm"),
        (("predict", "table.csv"), "the columns are: a, b"),
        (("predict", "table.csv", "--column", "c"), "no column 'c'"),
        (("predict", "plots.txt", "--output", "plots.txt/out.csv"), "plots.txt"),
        (("explain", WESTERN, "--model", "../../etc"), "no saved model"),
        (("doctor", "nowhere"), "genre_nb download"),
    ],
)
def test_a_failure_is_exit_1_with_one_line_that_helps(call, tmp_path, arguments, told):
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    (tmp_path / "plots.txt").write_text(WESTERN + "\n")
    result = call(*arguments)
    assert result.returncode == 1 and result.stdout == b""
    assert told in one_line(result)


@pytest.mark.parametrize(
    "arguments",
    [(), ("fly",), ("predict", "--top-k", "28"), ("explain", "x", "--genre", "heist"), ("serve", "--port", "http")],
)
def test_a_command_written_wrongly_is_exit_2_and_shows_the_usage(call, arguments):
    result = call(*arguments)
    assert result.returncode == 2 and result.stdout == b""
    assert result.stderr.startswith(b"usage: genre_nb")


@pytest.mark.parametrize(
    "arguments, code", [(("explain", WESTERN, "--model", "oracle"), 1), (("fly",), 2)], ids=["failed", "usage"]
)
def test_a_process_ends_with_the_same_codes(run, arguments, code):
    result = run(*arguments)
    assert result.returncode == code and result.stdout == b"" and b"Traceback" not in result.stderr


def test_rejected_rows_are_exit_3_and_listed_in_the_file_that_is_named(run, tmp_path):
    (tmp_path / "movies.jsonl").write_bytes(
        JSON_LINES.encode() + b'{"id": 3, "plot": ""}\n{"id": 4, "plot": 5}\n{"id"\n\xff\n' + JSON_LINES.encode()
    )
    result = run("predict", "movies.jsonl")
    assert result.returncode == 3 and len(result.stdout.splitlines()) == 4
    listed = tmp_path / "movies.jsonl.rejected.jsonl"
    assert listed.name in one_line(result)
    assert [json.loads(line)["line"] for line in listed.read_text().splitlines()] == [3, 4, 5, 6]


def test_a_bad_first_record_costs_one_row(call, tmp_path):
    result = call("predict", stdin='{"id": 1}\n' + JSON_LINES)
    assert result.returncode == 3 and len(result.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    "content", [b"", b"\n\n \n", b"\xef\xbb\xbf"], ids=["nothing", "blank lines", "a byte order mark"]
)
def test_an_empty_input_is_no_failure(call, content):
    result = call("predict", stdin=content)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


@pytest.mark.parametrize("name, cut", [("movies.csv.gz", 10), ("movies.csv.gz", 1000), ("movies.txt.gz", -4)])
def test_a_damaged_compressed_file_is_reported_not_raised(call, tmp_path, name, cut):
    rows = "".join(f"{number},{number * 7919 % 10007} {WESTERN}\n" for number in range(500))
    (tmp_path / name).write_bytes(gzip.compress(("id,description\n" + rows).encode(), mtime=0)[:cut])
    result = call("predict", name)
    assert result.returncode == 3 and "could not be used" in one_line(result)
    assert "compressed" in (tmp_path / f"{name}.rejected.jsonl").read_text()


# ---- encodings ----

LETTERS = "Ein Vampir – naïve 吸血鬼 🤠 " + HORROR
PLAIN_TERMINALS = {
    "ascii by name": {"PYTHONIOENCODING": "ascii"},
    "C locale": {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


def test_results_are_utf_8_whatever_the_terminal_is(run):
    "Input is UTF-8 by contract; output must be able to hold the input's own columns."
    result = run("predict", stdin=LETTERS + "\n", **PLAIN_TERMINALS["ascii by name"])
    assert (result.returncode, result.stderr) == (0, b"")  # no progress bar in a pipe, no warnings of libraries
    assert genres_of(result, "lines") == ["horror"] and LETTERS in result.stdout.decode("utf-8")


@pytest.mark.parametrize("terminal", PLAIN_TERMINALS)
@pytest.mark.parametrize("arguments", [("doctor",), ("--help",)], ids=lambda arguments: arguments[0])
def test_reports_are_printed_on_any_terminal(run, terminal, arguments):
    result = run(*arguments, **PLAIN_TERMINALS[terminal])
    assert result.returncode == 0 and b"Traceback" not in result.stderr and result.stdout


# ---- pipes and streams ----


def test_a_reader_that_leaves_early_is_no_error(start):
    "genre_nb predict big.txt | head -1"
    process = start("predict")
    writer = threading.Thread(target=feed_until_closed, args=(process, 20_000))
    writer.start()
    assert wait_for_output(process).startswith(b"description\tpredicted_genre")
    process.stdout.close()
    writer.join(PATIENCE)
    assert process.wait(PATIENCE) == 0 and process.stderr.read() == b""


def feed_until_closed(process: subprocess.Popen, rows: int) -> None:
    try:
        feed(process, rows)
        process.stdin.close()
    except BrokenPipeError:
        pass


@pytest.mark.parametrize("arguments", [("predict",), ("--version",), ("predict", "--help")], ids=" ".join)
def test_a_reader_that_never_reads_is_no_error(start, arguments):
    "Little output stays in Python's buffer and meets the closed pipe only at the very end."
    reading, writing = os.pipe()
    os.close(reading)
    process = start(*arguments, stdout=writing)
    os.close(writing)
    process.stdin.write(WESTERN.encode())
    process.stdin.close()
    assert process.wait(PATIENCE) == 0 and process.stderr.read() == b""


def test_predictions_come_out_before_the_input_ends(start):
    "20,000 rows in a stream: the second half is only sent when predictions of the first have been seen."
    process = start("predict")
    errors = threading.Thread(target=process.stderr.read)
    errors.start()
    writer = threading.Thread(target=feed_until_closed, args=(process, 0))
    first_half = threading.Thread(target=feed, args=(process, 10_000))
    first_half.start()
    assert wait_for_output(process) and wait_for_output(process)
    rest = []
    reader = threading.Thread(target=lambda: rest.extend(process.stdout))
    reader.start()
    first_half.join(PATIENCE)
    feed(process, 10_000)
    writer.start()
    for thread in (writer, reader, errors):
        thread.join(PATIENCE)
    assert process.wait(PATIENCE) == 0
    assert len(rest) == 20_000 - 1  # the header and one row were read before


def test_a_terminal_sees_progress(start):
    "Standard error is a terminal here; what is written to it is talk, never results."
    terminal, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # rows, columns
    process = start("predict", stderr=side)
    feed(process, 3)
    process.stdin.close()
    output = process.stdout.read()
    assert process.wait(PATIENCE) == 0 and len(output.splitlines()) == 4
    os.close(side)
    assert b"descriptions" in all_of(terminal)


def all_of(terminal: int) -> bytes:
    "What was written to a pseudo-terminal; on Linux its end is an error."
    seen = b""
    with open(terminal, "rb", buffering=0) as stream:
        try:
            while piece := stream.read(4096):
                seen += piece
        except OSError:
            pass
    return seen


# ---- interrupted ----


def test_control_c_ends_with_130_and_no_traceback(start):
    process = start("predict")
    feed(process, 1000)
    assert wait_for_output(process)
    drain = threading.Thread(target=process.stdout.read)
    drain.start()
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    errors = process.stderr.read().decode()
    assert "Traceback" not in errors and "stopped" in errors
    drain.join(PATIENCE)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda sent: sent.name)
def test_a_killed_run_leaves_the_old_output(start, tmp_path, sent):
    "Under the final name is always a whole file."
    (tmp_path / "out.csv").write_text("the old file\n")
    process = start("predict", "--output", "out.csv")
    feed(process, 1000)
    wait_until_writing(process, tmp_path, "out.csv")
    process.send_signal(sent)
    process.wait(PATIENCE)
    assert process.returncode != 0
    assert (tmp_path / "out.csv").read_text() == "the old file\n"
    if sent == signal.SIGINT:
        assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == [
            "out.csv"
        ]  # nothing half-written stays


def wait_until_writing(process: subprocess.Popen, folder: Path, name: str) -> None:
    "Until the temporary file holds something, or the process has ended."
    from time import monotonic, sleep

    end = monotonic() + PATIENCE
    while process.poll() is None and monotonic() < end:
        if any(path.stat().st_size for path in folder.glob(f".{name}.*.part")):
            return
        sleep(0.05)
    raise AssertionError(f"the process did not begin to write: {process.poll()}")


def test_a_failed_run_leaves_the_old_output_and_nothing_else(call, tmp_path):
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    (tmp_path / "out.csv").write_text("the old file\n")
    assert call("predict", "table.csv", "--output", "out.csv").returncode == 1
    assert (tmp_path / "out.csv").read_text() == "the old file\n"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == ["out.csv", "table.csv"]


def test_output_may_replace_its_own_input(call, tmp_path):
    "The file is read to its end before the new one takes its name."
    (tmp_path / "movies.csv").write_text(INPUTS["csv"][0])
    assert call("predict", "movies.csv", "--output", "movies.csv").returncode == 0
    rows = list(csv.DictReader((tmp_path / "movies.csv").open()))
    assert [row["predicted_genre"] for row in rows] == ["western", "horror"]


# ---- commands that work on a whole data set ----


def test_evaluate_scores_the_models_that_are_named(call):
    result = call("evaluate", "naive_bayes")
    lines = result.stdout.decode().splitlines()
    assert result.returncode == 0 and b"Testing on" in result.stderr and b"sample" in result.stderr
    assert lines[0].split()[:3] == ["model", "protocol", "rows"] and len(lines) == 4
    assert {line.split()[0] for line in lines[1:]} == {"naive_bayes"}
    unknown = call("evaluate", "oracle")
    assert unknown.returncode == 1 and b"no saved model named 'oracle'" in unknown.stderr


def test_preprocess_writes_tables_and_says_how_many_rows(call, tmp_path):
    result = call("preprocess", "--output", tmp_path / "processed")
    assert result.returncode == 0 and b"Preprocessing" in result.stderr
    assert re.search(rb"^train +301 rows in +\d+ out$", result.stdout, flags=re.M)
    assert (tmp_path / "processed" / "manifest.json").is_file()


def test_doctor_writes_its_findings_as_json(call, tmp_path):
    result = call("doctor", "--json", tmp_path / "findings.json")
    assert result.returncode == 0
    findings = json.loads((tmp_path / "findings.json").read_text(encoding="utf-8"))
    assert findings and not list(tmp_path.glob("*.part"))


def test_rows_that_can_not_be_used_are_named_and_change_the_exit_code(call, tmp_path):
    folder = shutil.copytree(resource_directory("sample"), tmp_path / "data")
    with (folder / "train_data.txt").open("a", encoding="utf-8") as stream:
        stream.write("this is no row\n")
    for command in ("doctor", "preprocess"):
        output = ("--output", tmp_path / "processed") if command == "preprocess" else ()
        result = call(command, *(("--data",) if command == "preprocess" else ()), folder, *output)
        assert result.returncode == 3, command
    assert b"train_data.txt" in result.stderr


def test_train_wants_names(call):
    result = call("train")
    assert result.returncode == 1 and b"name the models to train, or --all; there are: naive_bayes" in result.stderr


def test_a_download_that_fails_is_one_line(call, monkeypatch):
    def unreachable(*_):
        raise DownloadError("nobody answers")

    monkeypatch.setattr("genre_nb.data.download", unreachable)
    result = call("download")
    assert (result.returncode, result.stderr) == (1, b"genre_nb: nobody answers\n")
