"""The networks that come with the package: small, without PyTorch, the same answer in any company, for any text."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from genre_nb.core import GENRES, resource_directory
from genre_nb.data import load_data
from genre_nb.inference import load_classifier

NETWORKS = sorted(
    card.parent.name
    for card in resource_directory("models").glob("*/card.json")
    if json.loads(card.read_text(encoding="utf-8"))["format"] == "onnx"
)
BATCH_TOLERANCE = 1e-4  # of a probability, alone and in a batch
ODD_TEXTS = [
    "",
    " ",
    "war",
    "zxqv qwrtp",
    "\N{PILE OF POO} \N{FAMILY}",
    "\u05d0\u05d1\u05d2 \u0633\u0644\u0627\u0645 \u202eabc",
    "\ud800 lone surrogate",
    "\x00\x01",
    "word " * 10_000,
    "a" * 20_000,
    "Ein Film über den Krieg.\nZweite Zeile.\r\n\tDritte.",
]

pytestmark = pytest.mark.skipif(not NETWORKS, reason="no network is stored in the package")


@pytest.fixture(scope="module", params=NETWORKS)
def classifier(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENRE_NB_HOME", str(tmp_path_factory.mktemp("home")))  # the packaged one
        yield load_classifier(request.param)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    "1,000 real descriptions where there are some, else those of the sample; and odd ones."
    dataset = load_data() if os.environ.get("GENRE_NB_DATA") else load_data(resource_directory("sample"))
    return [*dataset.test["description"].head(1000), *ODD_TEXTS]


def test_any_text_gets_probabilities(classifier):
    probabilities = classifier.predict_proba(ODD_TEXTS)
    assert probabilities.shape == (len(ODD_TEXTS), len(GENRES)) and list(classifier.classes_) == list(GENRES)
    assert np.isfinite(probabilities).all() and np.allclose(probabilities.sum(axis=1), 1)


def test_an_answer_does_not_depend_on_the_batch(classifier, texts):
    together = classifier.predict_proba(texts)
    alone = np.concatenate([classifier.predict_proba([text]) for text in texts])
    assert np.abs(together - alone).max() <= BATCH_TOLERANCE
    assert (together.argmax(axis=1) == alone.argmax(axis=1)).all()


def test_words_are_explained_and_what_is_cut_off_is_said(classifier):
    text = "A lone sheriff rides into a dusty frontier town to face the outlaw gang that robbed the bank."
    prediction = classifier.classify(text, explain=True)
    assert len(prediction.explanation) >= 15
    assert all(text[word.start : word.end] == word.word for word in prediction.explanation)
    assert "truncated" not in [warning.code for warning in prediction.warnings]
    assert "truncated" in [warning.code for warning in classifier.classify("word " * 10_000).warnings]
    for odd in ODD_TEXTS:
        assert all(np.isfinite(word.contribution) for word in classifier.explain(odd, "drama"))


def test_the_files_are_small(classifier):
    folder = resource_directory("models") / classifier.name
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size <= (26e6 if classifier.name == "small_bert" else 13e6)
    names = {"SHA256SUMS", "card.json", "model.onnx", "network.json", "tokenizer.json"}  # nothing that can run code
    assert {path.name for path in folder.iterdir()} == names


@pytest.mark.parametrize("name", NETWORKS)
def test_answers_come_without_the_training_libraries(name, tmp_path):
    program = (
        "import sys\n"
        "from genre_nb.inference import load_classifier\n"
        f"print(load_classifier({name!r}).classify('A sheriff hunts an outlaw across the desert.').genre)\n"
        "print(sorted({'torch', 'fastai', 'transformers', 'pandas', 'onnx'} & set(sys.modules)))"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "GENRE_NB"))}
    told = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"GENRE_NB_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    genre, loaded = told.stdout.split("\n")[:2]
    assert genre in GENRES and loaded == "[]"
