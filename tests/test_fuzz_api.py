"""Thousands of requests that nobody would think of: never a 5xx, always the documented shape.

GENRE_NB_FUZZ_EXAMPLES multiplies the number of cases (default 1: about 700 in all)."""
import json
import os
from urllib.parse import quote

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from genre_nb.serving import PredictAnswer, Problem

TIMES = int(os.environ.get("GENRE_NB_FUZZ_EXAMPLES", "1"))
JSON_HEADERS = {"Content-Type": "application/json"}
CAREFREE = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck), "database": None}

ROUTES = [("POST", "/predict"), ("GET", "/small_bert/get_probabilities"), ("GET", "/genres"), ("GET", "/models"), ("GET", "/health"),
          ("GET", "/metrics")]


@pytest.fixture(scope="session")
def document(api):
    return schemathesis.openapi.from_asgi("/openapi.json", api)


def test_every_documented_route_is_fuzzed(document):
    documented = {(operation.ok().method.upper(), operation.ok().path) for operation in document.get_all_operations()}
    assert documented == set(ROUTES)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_openapi_document_is_true(document, method, path, mode):
    "Requests as documented are answered as documented; others are refused as documented."
    takes_input = path in ("/predict", "/small_bert/get_probabilities")
    if mode is GenerationMode.NEGATIVE and not takes_input:
        return  # there is nothing to get wrong

    @given(document[path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=(25 if takes_input else 3) * TIMES, **CAREFREE)
    def ask(case):
        case.call_and_validate()

    ask()


def check(answer) -> None:
    "The answer has the shape that belongs to its status, and is no failure."
    assert answer.status_code in (200, 400, 413, 415, 422), (answer.status_code, answer.text)
    model = PredictAnswer if answer.status_code == 200 else Problem
    parsed = model.model_validate_json(answer.content)
    if model is Problem:
        assert len(parsed.detail) > 10 and "Traceback" not in parsed.detail
    else:
        assert all(0 <= one.probability <= 1 for one in parsed.predictions)


@given(st.binary(max_size=300))
@settings(max_examples=100 * TIMES, **CAREFREE)
def test_any_bytes(client, body):
    check(client.post("/predict", content=body, headers=JSON_HEADERS))


valid = json.dumps({"descriptions": ["A boat sinks — slowly.", "Two sisters meet."], "model": None, "top_k": 3, "explain": True},
                   ensure_ascii=False).encode()


@given(st.lists(st.tuples(st.integers(0, len(valid)), st.integers(0, 4), st.binary(max_size=4)), min_size=1, max_size=4))
@settings(max_examples=150 * TIMES, **CAREFREE)
def test_damaged_requests(client, damages):
    body = valid
    for position, cut, inserted in damages:
        body = body[:position] + inserted + body[position + cut:]
    check(client.post("/predict", content=body, headers=JSON_HEADERS))


any_text = st.text(st.characters(codec=None), max_size=60)  # lone surrogates too
any_value = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | any_text,
                         lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4), max_leaves=12)


@given(st.fixed_dictionaries({}, optional={
    "descriptions": st.lists(any_text, max_size=5) | any_value, "model": any_text | any_value, "top_k": st.integers(-3, 40) | any_value,
    "explain": st.booleans() | any_value, "topk": any_value}) | any_value)
@settings(max_examples=150 * TIMES, **CAREFREE)
def test_any_json(client, value):
    check(client.post("/predict", content=json.dumps(value), headers=JSON_HEADERS))  # NaN and Infinity as Python writes them


@given(st.lists(st.text(min_size=1, max_size=200), min_size=1, max_size=3), st.integers(1, 27))
@settings(max_examples=100 * TIMES, **CAREFREE)
def test_any_unicode_is_classified(client, descriptions, top_k):
    answer = client.post("/predict", json={"descriptions": descriptions, "top_k": top_k, "explain": True})
    check(answer)
    if all(description.strip() for description in descriptions):
        assert answer.status_code == 200
        for description, prediction in zip(descriptions, answer.json()["predictions"]):
            assert len(prediction["probabilities"]) == top_k
            assert all(description[word["start"]:word["end"]] == word["word"] for word in prediction["explanation"])


@given(st.text(max_size=300))
@settings(max_examples=100 * TIMES, **CAREFREE)
def test_reference_route(client, text):
    answer = client.get("/small_bert/get_probabilities", params={"processed_description": text})
    assert answer.status_code in (200, 422)
    if answer.status_code == 200:
        assert abs(sum(answer.json()["probabilities"].values()) - 1) < 1e-6


@given(st.text(max_size=80), st.dictionaries(st.from_regex(r"[A-Za-z-]{1,20}", fullmatch=True), st.from_regex(r"[ -~]{0,40}", fullmatch=True), max_size=3))
@settings(max_examples=100 * TIMES, **CAREFREE)
def test_any_path_and_headers(client, path, headers):
    ours = {name: value for name, value in headers.items() if name.lower() not in ("host", "content-length", "transfer-encoding")}
    assert client.get("/" + quote(path), headers=ours).status_code < 500


# The examples of the document

def examples_of(document) -> tuple[list[dict], dict[str, dict]]:
    "The requests and the answers that the document shows for /predict."
    operation = document.raw_schema["paths"]["/predict"]["post"]
    requests = [example["value"] for example in operation["requestBody"]["content"]["application/json"]["examples"].values()]
    requests += document.raw_schema["components"]["schemas"]["PredictRequest"]["examples"]
    answers = {status: answer["content"]["application/json"] for status, answer in operation["responses"].items()}
    return requests, {status: content["example"] for status, content in answers.items() if "example" in content}


def test_examples_of_requests_are_answered(document, client):
    requests, _ = examples_of(document)
    assert len(requests) == 4
    for request in requests:
        answer = client.post("/predict", json=request)
        assert answer.status_code == 200 and len(answer.json()["predictions"]) == len(request["descriptions"]), answer.text


def test_examples_of_refusals_are_what_is_answered(document, client):
    _, refusals = examples_of(document)
    from fastapi.testclient import TestClient

    from genre_nb.serving import create_app

    busy = TestClient(create_app(demo=False, queue_limit=0))
    asked = {
        "400": client.post("/predict", content=b"?", headers=JSON_HEADERS),
        "413": client.post("/predict", content=b"x" * 2_000_001, headers=JSON_HEADERS),
        "415": client.post("/predict", data={"descriptions": "a"}),
        "422": client.post("/predict", json={"descriptions": ["A boat sinks."], "top_k": 0}),
        "503": busy.post("/predict", json={"descriptions": ["A boat sinks."]}),
    }
    assert {status: answer.json() for status, answer in asked.items()} == refusals
    assert all(str(answer.status_code) == status for status, answer in asked.items())


def test_examples_of_answers_have_their_shape(document):
    schemas = document.raw_schema["components"]["schemas"]
    for example in schemas["PredictAnswer"]["examples"]:
        answer = PredictAnswer.model_validate(example)
        [word] = answer.predictions[0].explanation
        assert schemas["PredictRequest"]["examples"][0]["descriptions"][0][word.start:word.end] == word.word
    for name in ("GenresAnswer", "ModelAnswer", "ModelsAnswer", "HealthAnswer"):
        plain = [field for field, about in schemas[name]["properties"].items() if about.get("type") in ("string", "number", "object")]
        assert all("examples" in schemas[name]["properties"][field] for field in plain), name
