"""On the real files (GENRE_NB_DATA): nothing rejected, nothing leaked, published scores reproduced."""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from genre_nb.core import GENRES, data_directory, resource_directory
from genre_nb.data import find_original, fingerprint, load_data, parse_title, read_rows, training_rows

needs_data = pytest.mark.skipif(
    not os.environ.get("GENRE_NB_DATA"), reason="GENRE_NB_DATA names no folder with the real files"
)
MODEL = "linear_svm"


@pytest.fixture(scope="module")
def dataset():
    return load_data()


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    "The committed scores of the shipped model on all 27 genres."
    results = json.loads((resource_directory("metrics") / f"{MODEL}.json").read_text(encoding="utf-8"))
    assert results["model"] == MODEL
    return results["protocols"]["genres_27"]


def value(score: float | Mapping[str, float]) -> float:
    "A score with or without its interval."
    return score["value"] if isinstance(score, Mapping) else score


# ---- the files ----


@needs_data
def test_every_row_of_the_real_files_is_read(dataset):
    assert not dataset.is_sample and dataset.rejected == []
    assert len(dataset.train) > 2000 and len(dataset.test) > 1000
    assert all(source.rows > 1000 for source in dataset.sources)
    assert set(dataset.train["genre"]) <= set(GENRES) and dataset.train["description"].str.len().min() > 0


@needs_data
def test_every_line_of_the_real_files_is_one_row(dataset):
    "Counted without our parser."
    for name, labelled in (("train_data.txt", True), ("test_data.txt", False), ("test_data_solution.txt", True)):
        path = find_original(data_directory(), name)
        lines = sum(bool(line.strip()) for line in path.open("rb"))
        assert sum(1 for _ in read_rows(path, "native", labelled)) == lines


@needs_data
def test_the_labels_joined_by_id_are_those_beside_the_descriptions(dataset):
    "The solution file repeats title and description; both ways to join must agree."
    rows = list(read_rows(find_original(data_directory(), "test_data_solution.txt"), "native"))
    assert dataset.test["id"].tolist() == [row.id for row in rows]
    assert dataset.test["genre"].tolist() == [row.genre for row in rows]
    assert dataset.test["description"].tolist() == [row.description for row in rows]


@needs_data
def test_years_are_years_and_titles_are_names(dataset):
    for frame in (dataset.train, dataset.test):
        years = frame["year"].dropna()
        assert years.between(1888, 2030).all()
        assert frame["title"].str.len().min() > 0
        assert not frame["title"].str.contains(r"\(\d{4}(?:/[IVX]+)?\)$|\(\?{4}", regex=True).any()
        assert all(parse_title(title).name == title for title in frame["title"].head(200))  # nothing left to take off


# ---- no leak ----


@needs_data
def test_no_training_row_repeats_a_test_description(dataset):
    rows = training_rows(dataset, dict.fromkeys(dataset.extra, 0.3))
    extra = rows[rows["source"] != "train"]
    tested = set(dataset.test["description"].map(fingerprint))
    assert not set(extra["description"].map(fingerprint)) & tested
    assert not extra["description"].map(fingerprint).duplicated().any()
    assert len(rows[rows["source"] == "train"]) == len(dataset.train) and (rows["weight"] > 0).all()


@needs_data
def test_reference_training_rows_repeat_no_test_description(dataset):
    "If this fails for another edition of the files, training_rows must leave such rows out."
    assert not set(dataset.train["description"].map(fingerprint)) & set(dataset.test["description"].map(fingerprint))


@needs_data
def test_the_card_says_what_the_model_learned_from(dataset):
    "The checksums in the card are those of the files at hand, as far as they are the same edition."
    card = json.loads((resource_directory("models") / MODEL / "card.json").read_text(encoding="utf-8"))
    told = json.dumps(card)
    train = next(source for source in dataset.sources if source.name == "train")
    if (
        len(dataset.test)
        != json.loads((resource_directory("metrics") / f"{MODEL}.json").read_text(encoding="utf-8"))["protocols"][
            "genres_27"
        ]["rows"]
    ):
        pytest.skip("another edition of the data than the shipped model was made from")
    assert train.sha256 in told


# ---- the published scores ----


@pytest.fixture(scope="module")
def probabilities(dataset, published, tmp_path_factory) -> np.ndarray:
    "Of the shipped model for the real test rows, columns in the order of `GENRES`."
    from genre_nb.inference import load_classifier

    if len(dataset.test) != published["rows"]:
        pytest.skip(f"the published scores are for {published['rows']:,} rows, these are {len(dataset.test):,}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "GENRE_NB_HOME", str(tmp_path_factory.mktemp("home"))
        )  # the packaged model, not one that somebody trained here
        classifier = load_classifier(MODEL)
    assert classifier.classes_.tolist() == list(GENRES)
    return classifier.predict_proba(dataset.test["description"].tolist())


@needs_data
def test_the_published_scores_come_out_again(dataset, published, probabilities):
    "Computed here with scikit-learn and by hand, not with the code that wrote them."
    truth = dataset.test["genre"].tolist()
    predicted = np.array(GENRES)[probabilities.argmax(axis=1)]
    places = np.array([GENRES.index(genre) for genre in truth])
    of_truth = probabilities[np.arange(len(truth)), places]
    again = {
        "accuracy": accuracy_score(truth, predicted),
        "macro_f1": f1_score(truth, predicted, labels=GENRES, average="macro", zero_division=0),
        "weighted_f1": f1_score(truth, predicted, labels=GENRES, average="weighted", zero_division=0),
        "top_3_accuracy": np.mean(
            [place in row for place, row in zip(places, np.argsort(-probabilities, axis=1, kind="stable")[:, :3])]
        ),
        "log_loss": -np.log(np.clip(of_truth, np.finfo(float).tiny, 1)).mean(),
        "ece": calibration_error(probabilities.max(axis=1), predicted == np.array(truth)),
    }
    assert {name: value(published[name]) for name in again} == pytest.approx(again, abs=1e-6)
    assert published["confusion_matrix"] == confusion_matrix(truth, predicted, labels=GENRES).tolist()


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    "Top-1 expected calibration error over bins of equal width."
    total = 0.0
    for number in range(bins):
        inside = (confidence > number / bins) & (confidence <= (number + 1) / bins)
        if inside.any():
            total += abs(right[inside].mean() - confidence[inside].mean()) * inside.mean()
    return total


# ---- without the real files ----


def test_the_shipped_model_keeps_its_promises(published):
    "What the README claims, from the committed scores: a change of the weights that loses this must not pass."
    assert value(published["accuracy"]) >= 0.545
    assert value(published["macro_f1"]) >= 0.25
    assert value(published["ece"]) <= 0.05
    assert published["accuracy"]["low"] < value(published["accuracy"]) < published["accuracy"]["high"]


def test_the_published_scores_agree_with_their_own_confusion_matrix(published):
    matrix = np.array(published["confusion_matrix"])
    assert list(published["genres"]) == list(GENRES) and matrix.sum() == published["rows"]
    assert value(published["accuracy"]) == pytest.approx(np.trace(matrix) / matrix.sum(), abs=1e-6)
    assert [published["per_genre"][genre]["support"] for genre in GENRES] == matrix.sum(axis=1).tolist()


def test_no_real_row_is_in_the_sample():
    "Own text only; with the real files at hand every description is compared with them."
    sample = load_data(resource_directory("sample"))
    ours = set(map(fingerprint, [*sample.train["description"], *sample.test["description"]]))
    if os.environ.get("GENRE_NB_DATA"):
        real = load_data()
        for frame in (real.train, real.test, *real.extra.values()):
            assert not ours & set(map(fingerprint, frame["description"]))
    assert len(ours) >= 27 * 16 - 1  # the documented duplicate
