"""Models that somebody else made, or that a disk damaged: refused with a sentence, and never run."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from conftest import PROGRAM, ROOT
from sklearn.preprocessing import FunctionTransformer

from genre_nb.core import find_folder, models_directory, resource_directory
from genre_nb.inference import available_models, load_classifier, read_card
from genre_nb.onnx_model import load_stored
from genre_nb.tfidf import skops_files

MODELS = resource_directory("models")
LINEAR, NETWORK = "naive_bayes", "neural_bag_of_words"


@pytest.fixture
def own(tmp_path, monkeypatch) -> Callable[..., Path]:
    "Copies a packaged model to be one's own, without its checksums unless asked for."
    monkeypatch.setenv("GENRE_NB_HOME", str(tmp_path))

    def copy(name: str, checksums: bool = False) -> Path:
        folder = models_directory() / name
        shutil.copytree(MODELS / name, folder)
        if not checksums:
            (folder / "SHA256SUMS").unlink(missing_ok=True)
        return folder

    return copy


def rewrite_card(folder: Path, **changes: object) -> None:
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    (folder / "card.json").write_text(json.dumps(card | changes), encoding="utf-8")


# ---- the models of the package ----


def test_every_file_of_every_model_is_pinned():
    "The card is left out: a word in it may be corrected without training again."
    for card in MODELS.glob("*/card.json"):
        files = {path.name for path in card.parent.iterdir()} - {"card.json", "SHA256SUMS"}
        if files:
            lines = (card.parent / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
            pinned = {line.partition("  ")[2]: line.partition("  ")[0] for line in lines}
            assert pinned == {name: hashlib.sha256((card.parent / name).read_bytes()).hexdigest() for name in files}


# ---- damaged files ----


@pytest.mark.parametrize(
    "name, file",
    [(LINEAR, "model.skops"), *((NETWORK, file) for file in ("model.onnx", "tokenizer.json", "network.json"))],
)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing"])
def test_a_damaged_file_is_named(own, name, file, damage):
    path = own(name, checksums=True) / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    halves = {"flip": bytes(content), "cut": path.read_bytes()[: len(content) // 2], "empty": b""}
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(halves[damage])
    told = f"{file} is missing" if damage == "missing" else f"{file} is not the file that was saved"
    with pytest.raises(ValueError, match=f"models/{name} can't be loaded: {told}.*Train it again, or install it again"):
        load_classifier(name)


@pytest.mark.parametrize(
    "name, file",
    [(LINEAR, "model.skops"), *((NETWORK, file) for file in ("model.onnx", "tokenizer.json", "network.json"))],
)
def test_half_a_file_is_refused_without_checksums_too(own, name, file):
    path = own(name) / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"models/{name} can't be loaded"):
        load_classifier(name)


def test_the_program_says_it_in_one_line(own, tmp_path):
    (own(LINEAR, checksums=True) / "model.skops").write_bytes(b"PK")
    result = subprocess.run([*PROGRAM, "predict", "-", "--model", LINEAR], input="A vampire.\n", capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("genre_nb: the model in ") and result.stderr.count("\n") == 1


# ---- files that want to run something ----


class Bomb:
    "Unpickling it makes a folder."

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_server_says_in_one_line_why_its_default_model_can_not_be_loaded(own):
    with open(own("linear_svm", checksums=True) / "model.skops", "ab") as stream:
        stream.write(b"!")
    run = subprocess.run([*PROGRAM, "serve", "--port", "0"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    [line] = [line for line in run.stderr.splitlines() if line]
    assert line.startswith("genre_nb: the model in ") and "linear_svm can't be loaded" in line and "Train it again" in line


@pytest.mark.parametrize("name, file", [(LINEAR, "model.skops"), (NETWORK, "model.onnx"), (NETWORK, "tokenizer.json")])
def test_a_pickle_under_another_name_is_not_opened(own, tmp_path, name, file):
    path, proof = own(name) / file, tmp_path / "it ran"
    path.write_bytes(pickle.dumps(Bomb(proof)))
    with pytest.raises(ValueError, match="can't be loaded"):
        load_classifier(name)
    assert not proof.exists()
    pickle.loads(path.read_bytes())  # the bomb is a real one
    assert proof.exists()


def test_a_skops_file_builds_no_type_that_is_not_ours(own):
    folder = own(LINEAR)
    skops_files().dump(FunctionTransformer(os.system), folder / "model.skops")
    with pytest.raises(ValueError, match="Untrusted types found in the file"):
        load_classifier(LINEAR)


def test_a_trusted_type_in_the_wrong_place_is_refused(own):
    from sklearn.svm import LinearSVC

    folder = own(LINEAR)
    skops_files().dump(LinearSVC(), folder / "model.skops")
    with pytest.raises(ValueError, match="holds a LinearSVC, not a TfidfClassifier"):
        load_classifier(LINEAR)


def test_a_network_reads_no_file_outside_its_folder(own, tmp_path):
    "ONNX files may keep weights in other files, and name them."
    folder = own(NETWORK)
    network = onnx.load(folder / "model.onnx")
    largest = max(network.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    (folder.parent / "secret").write_bytes(largest.raw_data)
    told = {"location": "../secret", "offset": "0", "length": str(len(largest.raw_data))}
    largest.ClearField("raw_data")
    largest.data_location = onnx.TensorProto.EXTERNAL
    for key, value in told.items():
        largest.external_data.add(key=key, value=value)
    (folder / "model.onnx").write_bytes(network.SerializeToString())
    with pytest.raises(ValueError, match="can't be loaded: .*escapes model directory"):
        load_classifier(NETWORK)


# ---- cards that lie ----


@pytest.mark.parametrize("name", ["../secret", "../../secret", "/etc", "a/../../secret", ".."])
def test_no_name_leads_out_of_the_folder_of_models(own, tmp_path, name):
    shutil.copytree(MODELS / LINEAR, tmp_path / "secret")
    with pytest.raises(ValueError, match="no saved model named"):
        load_classifier(name)
    with pytest.raises(ValueError, match="is not the name of something in models/"):
        find_folder("models", name)
    folder = own("ensemble")
    rewrite_card(folder, members=[{"model": name, "weight": 1.0}])
    with pytest.raises(ValueError, match="is not the name of something in models/"):
        load_classifier("ensemble")


def test_a_card_can_not_speak_for_another_model(own):
    rewrite_card(own(LINEAR), model="../../secret")
    with pytest.raises(ValueError, match=f"must name the model '{LINEAR}' of its folder"):
        read_card(LINEAR)


@pytest.mark.parametrize("storage", ["pickle", "../skops", "", None, ["skops"]])
def test_an_unknown_format_is_refused(own, storage):
    rewrite_card(own(LINEAR), format=storage)
    with pytest.raises(ValueError, match="can't load|must name"):
        load_classifier(LINEAR)


@pytest.mark.parametrize(
    "members",
    [None, {}, [], [{}], [{"model": "ensemble", "weight": 1.0}], [{"model": "nobody", "weight": 1.0}], [{"model": LINEAR}],
     [{"model": LINEAR, "weight": "much"}], [{"model": LINEAR, "weight": -1.0}], [{"model": LINEAR, "weight": float("nan")}]],
    ids=str,
)  # fmt: skip
def test_an_ensemble_of_nonsense_is_refused(own, members):
    rewrite_card(own("ensemble"), members=members)
    with pytest.raises(ValueError, match="the model in .*ensemble can't be loaded"):
        load_classifier("ensemble")


def test_checksums_name_files_of_their_own_folder_only(own):
    folder = own(LINEAR)
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  ../../../etc/passwd\n")
    with pytest.raises(ValueError, match="line 1: expected a checksum"):
        load_stored(folder, "skops")


def test_a_server_leaves_a_bad_card_out_and_serves_the_others(own):
    from genre_nb.service import usable_cards

    rewrite_card(own(LINEAR), model="../../secret")
    assert set(usable_cards()) == set(available_models()) - {LINEAR}


# ---- what loading leaves behind ----


def test_predicting_with_a_network_reports_nothing_to_anybody(tmp_path):
    "ONNX Runtime would otherwise leave an identifier and a queue of reports in the user's cache folder."
    call = f"from genre_nb.inference import load_classifier; load_classifier({NETWORK!r}).predict(['A horse.'])"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "XDG_", "GENRE_NB"))}
    environment |= {"HOME": str(tmp_path), "GENRE_NB_HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("CI", None)  # ONNX Runtime keeps quiet there anyway
    subprocess.run([sys.executable, "-c", call], cwd=ROOT or tmp_path, check=True, env=environment, timeout=300)
    assert not list(tmp_path.rglob("*"))
