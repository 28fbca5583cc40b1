"""Malformed files and odd texts: no exception escapes, and no row is lost without being reported."""

import csv
import gzip
import json
import random
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from genre_nb.core import GENRES
from genre_nb.data import (
    MAXIMUM_LINE_BYTES,
    Record,
    RejectedRow,
    Row,
    diagnose,
    load_data,
    read_frame,
    read_rows,
    stream_records,
)
from genre_nb.language import identify_languages
from genre_nb.text import repair_mojibake

HEADER = "id,title,genre,description"
NAMES = ("m.txt", "m.csv", "m.tsv", "m.jsonl", "m.txt.gz", "m")
FRAGMENTS = [
    b" ::: ",
    b":::",
    b",",
    b"\t",
    b'"',
    b'""',
    b"\n",
    b"\n",
    b"\r\n",
    b"\r",
    b"{",
    b"}",
    b"[",
    b":",
    b'{"id": 1',
    b'"title": "M"',
    b"1",
    b"2",
    b"M (1931)",
    b'"Harbour" (1996)',
    b"crime",
    b"Sci-Fi",
    b"A city hunts a man.",
    b" ",
    b"\\ud800",
    b"null",
    b"1e400",
    b"NaN",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\x00",
    b"\xc2\x85",
    b"\xe2\x80\xa8",
    b"\xd7\xa9",
    b"\xf0\x9f\xa4\xa0",
    HEADER.encode(),
    HEADER.encode() + b"\n",
    b"id,id\n",
    b"1,M,crime,A city\n",
    b"1 ::: M (1931) ::: crime ::: A city hunts a man.\n",
]
fragments = st.lists(st.sampled_from(FRAGMENTS), max_size=40).map(b"".join)
any_bytes = st.one_of(st.binary(max_size=300), fragments)
readable_fragments = st.lists(
    st.sampled_from([part for part in FRAGMENTS if part.decode("utf-8", "ignore").encode() == part]), max_size=40
).map(b"".join)
thorough = settings(
    max_examples=120, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


def outcomes(folder: Path, content: bytes, name: str, **options) -> list[Row | RejectedRow]:
    "What the parser makes of a file."
    path = folder / name
    path.write_bytes(content)
    return list(read_rows(path, **options))


def records(content: bytes, name: str = "-", **options) -> list[Record | RejectedRow]:
    return list(stream_records(BytesIO(content), name, **options))


def texts(content: bytes) -> list[str]:
    "The physical lines of a file without their ends, undecodable bytes as surrogates."
    lines = [line.decode("utf-8", "surrogateescape").rstrip("\r") for line in content.split(b"\n")]
    return [lines[0].removeprefix("\ufeff"), *lines[1:]]


def not_blank(content: bytes) -> list[int]:
    "The numbers of the lines that hold something."
    return [number for number, line in enumerate(texts(content), 1) if line.strip()]


def native_lines(count: int) -> bytes:
    words = random.Random(7)
    return b"".join(
        b"%d ::: Film %d (1931) ::: crime ::: A city hunts a man number %d.\n" % (n, n, words.randrange(10**9))
        for n in range(count)
    )


# ---- bytes of any kind ----


@pytest.mark.parametrize("name, labelled", [*((name, True) for name in NAMES), ("m.txt", False), ("m.csv", False)])
def test_no_exception_escapes_the_parser(folder, name, labelled):
    @thorough
    @given(any_bytes)
    @example(b"")
    @example(b"\xef\xbb\xbf")
    @example(b",,\n1,2,3\n")
    @example(b"\x1f\x8b")
    def holds(content):
        for outcome in outcomes(folder, content, name, labelled=labelled):
            assert isinstance(outcome, Row | RejectedRow)
            json.dumps(outcome._asdict(), ensure_ascii=False).encode()  # can be written to a report

    holds()


@pytest.mark.parametrize("name", ["m.txt", "m.csv", "m.jsonl"])
def test_whatever_was_read_becomes_a_table(folder, name):
    @settings(thorough, max_examples=60)
    @given(st.one_of(any_bytes, st.lists(st.text(max_size=30)).map(lambda rows: rows_of_texts(name, rows))))
    def holds(content):
        path = folder / name
        path.write_bytes(content)
        frame, rejected = read_frame(path)
        assert len(frame) + len(rejected) == len(outcomes(folder, content, name))

    holds()


def rows_of_texts(name: str, descriptions: list[str]) -> bytes:
    "A well-formed file with strange descriptions, escaped as the format asks."
    rows = [(str(number), f"Film {number} (1931)", "crime", text) for number, text in enumerate(descriptions, 1)]
    if name.endswith("csv"):
        lines = [HEADER] + [",".join('"' + value.replace('"', '""') + '"' for value in row) for row in rows]
    elif name.endswith("jsonl"):
        lines = [json.dumps(dict(zip(HEADER.split(","), row))) for row in rows]
    else:
        lines = [" ::: ".join(row) for row in rows]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


# ---- nothing is lost ----


@pytest.mark.parametrize("format, labelled", [("native", True), ("native", False), ("lines", True), ("jsonl", True)])
def test_every_line_is_a_row_or_a_rejection(folder, format, labelled):
    "Formats of one row a line: each line that is not blank is answered for exactly once, in order."

    @thorough
    @given(any_bytes)
    def holds(content):
        found = outcomes(folder, content, "m.txt", format=format, labelled=labelled)
        assert [outcome.line for outcome in found] == not_blank(content)

    holds()


def csv_spans(content: bytes, delimiter: str) -> Iterator[tuple[Record | RejectedRow, list[str]]]:
    "Each outcome of a CSV file with the lines from its first one to the next outcome's, without blank ones at the end."
    lines, found = texts(content), records(content, format="csv" if delimiter == "," else "tsv")
    starts = [outcome.line for outcome in found] + [len(lines) + 1]
    assert all(first < second for first, second in zip(starts, starts[1:])), "a line was reported twice or out of order"
    before_the_first = lines[1 : starts[0] - 1]
    assert not any(before_the_first), "lines after the header were skipped"
    for outcome, start, end in zip(found, starts, starts[1:]):
        span = lines[start - 1 : end - 1]
        while span and not span[-1]:
            span.pop()
        yield outcome, span


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_every_csv_line_belongs_to_one_record_or_is_rejected(delimiter):
    """CSV records may span lines, so the law is: outcomes' first lines rise strictly after the header, a good record
    is exactly what its lines say, and a rejection costs no other line."""

    @thorough
    @given(readable_fragments)
    @example(b'1,"open,x,y\n2,M,crime,good\n3,x",y,z,w,q\n4,M,crime,good\n')
    @example(b'1,"never closed\n2,M,crime,good\n')
    def holds(body):
        content = HEADER.replace(",", delimiter).encode() + b"\n" + body.replace(b",", delimiter.encode())
        for outcome, span in csv_spans(content, delimiter):
            if isinstance(outcome, Record):
                said = list(csv.reader((line + "\n" for line in span), delimiter=delimiter, strict=True))
                assert said == [list(outcome.fields.values())]
            elif not outcome.reason.startswith("undecodable"):
                assert len(span) == 1

    holds()


@pytest.mark.parametrize("name", ["m.csv", "m.tsv"])
def test_the_rules_of_our_data_lose_no_record(folder, name):
    "Checking the columns turns each record into a row or a rejection at the same place."

    @settings(thorough, max_examples=60)
    @given(readable_fragments)
    def holds(body):
        content = HEADER.encode() + b"\n" + body
        assert [outcome.line for outcome in outcomes(folder, content, name)] == [
            outcome.line for outcome in records(content, name)
        ]

    holds()


def test_a_stray_quotation_mark_costs_its_own_line_only(folder):
    body = '1,"open,x,y\n2,M,crime,Good.\n3,x",y,z,w,q\n4,M,crime,Good.\n'
    found = outcomes(folder, f"{HEADER}\n{body}".encode(), "m.csv")
    assert [outcome.id for outcome in found if isinstance(outcome, Row)] == ["2", "4"]
    assert [outcome.line for outcome in found if isinstance(outcome, RejectedRow)] == [2, 4]


@pytest.mark.parametrize("header", ['id,"title,genre,description', "x" * (MAXIMUM_LINE_BYTES + 10)])
def test_a_broken_csv_header_is_no_licence_to_eat_the_next_row(folder, header):
    rows = "1,M,crime,A city\n2,Up,comedy,A house\n3,Ran,drama,A king\n"
    found = outcomes(folder, f"{header}\n{rows}".encode(), "m.csv")
    assert sorted(outcome.line for outcome in found) == [1, 2, 3, 4]


@pytest.mark.parametrize("header", ["id,title,genre,description,,", "id,title,genre,description,note,note"])
def test_odd_csv_headers_still_give_rows(folder, header):
    "Spreadsheets write empty columns at the end; that is no reason to refuse a file."
    found = outcomes(folder, f"{header}\n1,M,crime,A city,x,y\n".encode(), "m.csv")
    assert [type(outcome) for outcome in found] == [Row]


# ---- compressed files ----

COMPRESSED = gzip.compress(native_lines(2000), mtime=0)
CUTS = [*range(1, 20), *range(20, len(COMPRESSED), len(COMPRESSED) // 40)]


@pytest.mark.parametrize("name", ["m.txt.gz", "m.csv.gz"])
def test_a_compressed_file_cut_anywhere_gives_its_first_rows_and_a_report(folder, name):
    whole = outcomes(folder, COMPRESSED, name)
    for cut in CUTS:
        found = outcomes(folder, COMPRESSED[:cut], name)
        assert isinstance(found[-1], RejectedRow) and "compressed" in found[-1].reason, f"cut at {cut}"
        kept = [outcome for outcome in found if isinstance(outcome, Row)]
        assert kept == [outcome for outcome in whole if isinstance(outcome, Row)][: len(kept)], f"cut at {cut}"


def test_a_compressed_file_with_flipped_bits_is_reported(folder):
    whole, choose = outcomes(folder, COMPRESSED, "m.txt.gz"), random.Random(1)
    for position in [*range(12), *(choose.randrange(len(COMPRESSED)) for _ in range(60))]:
        damaged = bytearray(COMPRESSED)
        damaged[position] ^= 1 << choose.randrange(8)
        found = outcomes(folder, bytes(damaged), "m.txt.gz")
        assert found == whole or any(
            "compressed" in outcome.reason for outcome in found if isinstance(outcome, RejectedRow)
        ), f"at {position}"


def test_a_file_that_only_claims_to_be_compressed_is_reported(folder):
    found = outcomes(folder, native_lines(3), "m.txt.gz")
    assert len(found) == 1 and isinstance(found[0], RejectedRow)


# ---- handmade horrors ----


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["m.txt", "m.csv", "m.jsonl"])
def test_a_file_in_another_encoding_gives_no_row_and_reports_every_line(folder, name, encoding):
    content = (HEADER + "\n" + native_lines(3).decode()).encode(encoding)
    found = outcomes(folder, content, name)
    assert found and all(isinstance(outcome, RejectedRow) for outcome in found)


@pytest.mark.parametrize("byte", [b"\xff", b"\xe9", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf8\x88\x80\x80\x80"])
@pytest.mark.parametrize("field", [b"id", b"Film", b"crime", b"city"])
def test_undecodable_bytes_cost_their_row_only(folder, byte, field):
    lines = native_lines(3).splitlines(keepends=True)
    lines[1] = b"id 1 ::: Film (1931) ::: crime ::: A city.\n".replace(field, field + byte)
    found = outcomes(folder, b"".join(lines), "m.txt")
    assert [type(outcome) for outcome in found] == [Row, RejectedRow, Row]
    assert found[1].line == 2


GOOD = {
    "m.txt": b"%d ::: M (1931) ::: crime ::: A city hunts.\n",
    "m.csv": b"%d,M (1931),crime,A city hunts.\n",
    "m.jsonl": b'{"id": %d, "title": "M (1931)", "genre": "crime", "description": "A city hunts."}\n',
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("ended", [True, False])
def test_a_huge_line_costs_itself_only(folder, name, ended):
    before = HEADER.encode() + b"\n" if name == "m.csv" else b""
    huge = b"x" * (3 * MAXIMUM_LINE_BYTES) + (b"\n" if ended else b"")
    after = GOOD[name] % 2 if ended else b""
    found = outcomes(folder, before + GOOD[name] % 1 + huge + after, name)
    wanted = [Row, RejectedRow, Row] if ended else [Row, RejectedRow]
    assert [type(outcome) for outcome in found] == wanted
    assert f"{MAXIMUM_LINE_BYTES:,}" in found[1].reason and found[1].line == found[0].line + 1


@pytest.mark.parametrize("name", GOOD)
def test_nul_bytes_are_answered_for(folder, name):
    before = HEADER.encode() + b"\n" if name == "m.csv" else b""
    odd = (GOOD[name] % 2).replace(b"city", b"ci\x00ty")
    found = outcomes(folder, before + GOOD[name] % 1 + odd + GOOD[name] % 3, name)
    assert len(found) == 3 and isinstance(found[0], Row) and isinstance(found[2], Row)


HORRIBLE_JSON = {
    "lists in lists": "[" * 100_000,
    "objects in objects": '{"a":' * 100_000,
    "a deep title": '{"id":"1","genre":"crime","description":"x","title":' + "[" * 970 + "]" * 970 + "}",
    "a deep column": '{"id":"1","genre":"crime","description":"x","title":"M","x":' + '{"a":' * 100_000 + "1" + "}" * 100_001,
    "a number too large for a float": '{"id": 1e400}',
    "a number of 100,000 digits": '{"id": %s}' % ("9" * 100_000),
    "not a number": '{"id": NaN, "title": Infinity}',
    "true as an ID": '{"id": true, "title": "M", "genre": "crime", "description": "x"}',
    "half a surrogate pair": r'{"id": "1", "title": "M", "genre": "crime", "description": "x \ud83d"}',
    "half a surrogate pair as a name": r'{"id": "1", "title": "M", "genre": "crime", "description": "x", "\udc00": 1}',
    "a list as genre": '{"id": "1", "title": "M", "genre": ["crime"], "description": "x"}',
    "an object as description": '{"id": "1", "title": "M", "genre": "crime", "description": {"en": "x"}}',
    "no object": '"a string"',
    "two values": '{"id": "1"} {"id": "2"}',
    "single quotes": "{'id': '1'}",
    "a comment": '{"id": "1" /* one */}',
}


@pytest.mark.parametrize("kind", HORRIBLE_JSON)
def test_json_that_can_not_be_used_is_one_rejection(folder, kind):
    content = GOOD["m.jsonl"] % 7 + HORRIBLE_JSON[kind].encode() + b"\n" + GOOD["m.jsonl"] % 8
    found = outcomes(folder, content, "m.jsonl")
    assert [type(outcome) for outcome in found] == [Row, RejectedRow, Row]
    assert found[1].line == 2 and len(found[1].reason) < 500


def test_nesting_of_any_depth_is_one_outcome(folder):
    "Between what JSON can read and what Python can print there must be no gap to fall into."
    for depth in range(900, 1010):
        for opening, inside, closing in (("[", "", "]"), ('{"a":', "1", "}")):
            line = (
                '{"id":"1","genre":"crime","description":"x","title":'
                + opening * depth
                + inside
                + closing * depth
                + "}"
            )
            assert len(outcomes(folder, line.encode(), "m.jsonl")) == 1


def test_a_name_given_twice_in_json_is_still_one_row(folder):
    found = outcomes(
        folder, b'{"id": 1, "title": "M", "genre": "war", "genre": "crime", "description": "x"}', "m.jsonl"
    )
    assert [outcome.genre for outcome in found] == ["crime"]


def test_an_id_that_comes_back_is_rejected_however_it_is_written(folder):
    lines = [
        f'{{"id": {name}, "title": "M", "genre": "crime", "description": "x"}}'
        for name in ("1", '"1"', '" 1 "', "01", '"01"')
    ]
    found = outcomes(folder, "\n".join(lines).encode(), "m.jsonl")
    assert [type(outcome) for outcome in found] == [Row, RejectedRow, RejectedRow, RejectedRow, Row]


# ---- whole folders ----


def hostile_folder(
    folder: Path, train: bytes, test: bytes = native_lines(1), solution: bytes = native_lines(1)
) -> Path:
    for name, content in {
        "train_data.txt": train,
        "test_data.txt": test.replace(b" ::: crime", b""),
        "test_data_solution.txt": solution,
    }.items():
        (folder / name).write_bytes(content)
    return folder


def test_a_folder_of_damaged_files_loads_and_says_what_is_wrong(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "catalogue.txt.gz").write_bytes(COMPRESSED[:3000])
    (tmp_path / "more" / "damaged.txt.gz").write_bytes(COMPRESSED[:15])
    (tmp_path / "more" / "pretended.txt.gz").write_bytes(b"not compressed")
    dataset = load_data(
        hostile_folder(
            tmp_path, native_lines(20) + b"\xff\xfe\n" + b"x" * 2_000_000 + b"\n21 ::: M ::: dramma ::: A.\n"
        )
    )
    assert len(dataset.train) == 20 and len(dataset.test) == 1
    assert len(dataset.rejected) >= 4
    assert {rejected.file for rejected in dataset.rejected} >= {"train_data.txt", "catalogue.txt.gz"}
    assert "rejected" in dataset.describe()


@pytest.mark.parametrize("train", [b"", b"\n\n", b"nothing of ours\n", b"\xff\xfe\x00", native_lines(1)])
def test_the_doctor_survives_any_patient(tmp_path, train):
    dataset = load_data(hostile_folder(tmp_path, train))
    diagnosis = diagnose(dataset, identify_languages, repair_mojibake)
    assert str(diagnosis) and json.dumps(diagnosis.to_dict())


def test_the_doctor_survives_without_any_row(tmp_path):
    dataset = load_data(hostile_folder(tmp_path, b"", b"", b""))
    assert str(diagnose(dataset, identify_languages, repair_mojibake))


# ---- odd texts through the shipped model ----

ALPHABETS = (
    (0x20, 0x7F),
    (0x00, 0x20),
    (0x80, 0x250),
    (0x300, 0x370),
    (0x370, 0x530),
    (0x590, 0x700),
    (0x900, 0xE00),
    (0x1100, 0x1200),
    (0x2000, 0x2070),
    (0x3040, 0x9FFF),
    (0xAC00, 0xD7A4),
    (0xD800, 0xE000),
    (0xE000, 0xF900),
    (0xFE00, 0xFE10),
    (0xFFF0, 0x10000),
    (0x1D400, 0x1D800),
    (0x1F1E6, 0x1F200),
    (0x1F300, 0x1FB00),
    (0xE0000, 0xE0080),
    (0x0, 0x110000),
)
INSERTS = (
    "\u200b",
    "\u200d",
    "\u202e",
    "\ufeff",
    "\x00",
    "\ud800",
    "\udfff",
    "\u0301" * 40,
    "👩‍👩‍👧‍👦",
    "🏴‍☠️",
    "ﷺ",
    "\r\n",
    "\x1b[31m",
    "<script>",
    "%s%n",
    "{}",
    "' --",
)


def odd_text(choose: random.Random) -> str:
    "Characters of one alphabet or of all, now and then words, and inserts that break things."
    low, high = choose.choice(ALPHABETS)
    characters = [chr(choose.randrange(low, high)) for _ in range(choose.choice((0, 1, 2, 5, 20, 80)))]
    words = choose.sample(
        ("vampire", "sheriff", "war", "documentary", "naïve", "don't", "CO-OP", "9/11", "a"), choose.randrange(4)
    )
    parts = [*characters, *(f" {word} " for word in words), *choose.sample(INSERTS, choose.randrange(3))]
    choose.shuffle(parts)
    return "".join(parts)


@pytest.fixture(scope="module")
def odd_texts() -> list[str]:
    choose = random.Random(42)
    return [odd_text(choose) for _ in range(10_000)]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    "The packaged model, not one that somebody trained here."
    from genre_nb.inference import load_classifier

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENRE_NB_HOME", str(tmp_path_factory.mktemp("home")))
        return load_classifier()


def test_the_odd_texts_are_odd(odd_texts):
    everything = "".join(odd_texts)
    assert len(set(everything)) > 20_000 and {"\ud800", "\u202e", "\x00", "🤠", ""} <= set(everything) | set(odd_texts)


def test_ten_thousand_odd_texts_get_probabilities(classifier, odd_texts):
    probabilities = classifier.predict_proba(odd_texts)
    assert probabilities.shape == (10_000, len(GENRES))
    assert np.isfinite(probabilities).all() and (probabilities >= 0).all()
    assert np.abs(probabilities.sum(axis=1) - 1).max() < 1e-6
    assert set(classifier.predict(odd_texts[:1000])) <= set(GENRES)


def test_an_odd_text_gets_the_same_probabilities_alone_and_in_company(classifier, odd_texts):
    some = odd_texts[::50]
    alone = np.vstack([classifier.predict_proba([text]) for text in some])
    assert np.abs(alone - classifier.predict_proba(some)).max() < 1e-6
    assert np.abs(alone - classifier.predict_proba(some[::-1])[::-1]).max() < 1e-6


def test_odd_texts_get_whole_predictions_and_explanations(classifier, odd_texts):
    "Language, warnings and the place of every word, not only the numbers."
    for text, prediction in zip(odd_texts[:300], classifier.classify_many(odd_texts[:300], explain=True)):
        assert prediction.genre in GENRES and repr(prediction)
        assert all(text[word.start : word.end] == word.word for word in prediction.explanation)
        json.dumps(prediction.to_dict())


@pytest.mark.parametrize(
    "text",
    [
        "a" * 1_000_000,
        "word " * 200_000,
        "\u0301" * 100_000,
        "🤠" * 100_000,
        "-" * 500_000,
        "don't" * 100_000,
        "\n" * 500_000,
    ],
    ids=["letters", "words", "accents", "emoji", "dashes", "apostrophes", "blanks"],
)
def test_a_very_long_text_is_answered(classifier, text):
    "A regular expression that backtracks would never come back here."
    assert abs(classifier.predict_proba([text]).sum() - 1) < 1e-6


def test_odd_texts_are_read_back_from_every_format(folder, odd_texts):
    "What was written as CSV or JSON Lines comes back as it was; texts that UTF-8 can't hold are reported."
    descriptions = [text for text in odd_texts[:1000] if text.strip()]
    for name in ("m.csv", "m.jsonl"):
        found = outcomes(folder, rows_of_texts(name, descriptions), name)
        read = {outcome.id: outcome.description for outcome in found if isinstance(outcome, Row)}
        for number, text in enumerate(descriptions, 1):
            if not set("\r\n") & set(text):
                storable = text.encode("utf-8", "ignore").decode() == text
                assert read.get(str(number), text.strip()) == text.strip() or not storable
                assert str(number) in read or not storable
        assert len(read) > 500
