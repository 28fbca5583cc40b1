"""`genre_nb train` as people run it: everything in small, what is finished, what is killed, what is out of time."""

import json
import os
import signal
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest

from genre_nb.onnx_model import load_stored

pytest.importorskip("torch")

PROGRAM = Path(sysconfig.get_path("scripts")) / "genre_nb"
PATIENCE = 600  # seconds until a hanging process is a failure; no promise about speed


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    "A home in which everything was trained in small, without a network."
    home = tmp_path_factory.mktemp("home")
    done = train(home, "--all", "--quick")
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout
    return home


def environment(home: Path) -> dict[str, str]:
    "That of somebody who has no data and no Hugging Face hub."
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GENRE_NB"))}
    return kept | {"GENRE_NB_HOME": str(home), "HF_HUB_OFFLINE": "1"}


def train(home: Path, *arguments: str) -> subprocess.CompletedProcess:
    "Run `genre_nb train` to its end."
    return subprocess.run(
        [PROGRAM, "train", *arguments],
        capture_output=True,
        text=True,
        env=environment(home),
        timeout=PATIENCE,
        cwd=home,
    )


def cards(home: Path) -> dict[str, dict]:
    "The card of each saved model."
    return {path.parent.name: json.loads(path.read_text()) for path in (home / "models").glob("*/card.json")}


def test_every_recipe_leaves_a_model_with_a_card_and_metrics(home):
    from genre_nb.training import RECIPES

    saved = {name for name, recipe in RECIPES.items() if recipe.saved}
    assert set(cards(home)) == saved
    for name in RECIPES:
        metrics = json.loads((home / "metrics" / f"{name}.json").read_text())
        assert set(metrics["protocols"]) == {"genres_27", "genres_26", "reference_6"}
    assert all(card["versions"]["genre_nb"] == card["version"] for card in cards(home).values())


def test_the_ensemble_names_its_members_and_answers(home):
    [first, second] = cards(home)["ensemble"]["members"]
    assert (first["model"], second["model"]) == ("linear_svm", "small_bert")
    assert abs(first["weight"] + second["weight"] - 1) < 1e-9
    story = "A sheriff rides into a lawless town to face the outlaws who killed his brother."
    asked = subprocess.run(
        [PROGRAM, "predict", "-", "--model", "ensemble"],
        input=story,
        capture_output=True,
        text=True,
        env=environment(home),
        timeout=PATIENCE,
    )
    assert asked.returncode == 0 and story in asked.stdout


def test_the_manifest_names_machine_data_and_cost(home):
    models = json.loads((home / "metrics" / "training_run.json").read_text())["models"]
    assert set(models) >= set(cards(home))
    for entry in models.values():
        assert entry["seconds"] > 0 and entry["peak_megabytes"] > 50 and entry["hardware"]["cores"] >= 1
        assert [len(source["sha256"]) for source in entry["data"]]


def test_the_leaderboard_has_every_model_and_protocol(home):
    lines = (home / "metrics" / "leaderboard.csv").read_text().splitlines()
    columns = lines[0].split(",")
    rows = [dict(zip(columns, line.split(","), strict=True)) for line in lines[1:]]
    for name in cards(home):
        assert {row["protocol"] for row in rows if row["model"] == name} == {"genres_27", "genres_26", "reference_6"}
    assert "| `ensemble` |" in (home / "metrics" / "leaderboard.md").read_text()


def test_what_is_finished_is_not_trained_again(home):
    before = (home / "models" / "linear_svm" / "model.skops").stat().st_mtime_ns
    assert "linear_svm: up to date" in train(home, "linear_svm", "--quick").stdout
    assert (home / "models" / "linear_svm" / "model.skops").stat().st_mtime_ns == before
    assert "up to date" not in train(home, "linear_svm", "--quick", "--balance", "class_weight").stdout


def test_a_time_budget_does_not_hide_what_is_finished(tmp_path):
    assert train(tmp_path, "naive_bayes").returncode == 0
    metrics = tmp_path / "metrics" / "naive_bayes.json"
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"training_seconds": 3600.0}))
    assert "naive_bayes: up to date" in train(tmp_path, "naive_bayes", "--time-budget", "5").stdout


def test_a_time_budget_leaves_out_what_takes_longer(tmp_path):
    assert train(tmp_path, "naive_bayes").returncode == 0
    metrics = tmp_path / "metrics" / "naive_bayes.json"
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"training_seconds": 3600.0}))
    done = train(tmp_path, "naive_bayes", "complement_naive_bayes", "--force", "--time-budget", "5")
    assert "naive_bayes: skipped: it takes about 60 min" in done.stdout
    assert "complement_naive_bayes: accuracy" in done.stdout and done.returncode == 0


def test_one_failure_does_not_stop_the_others(tmp_path):
    done = train(tmp_path, "ensemble", "naive_bayes")
    assert done.returncode == 1
    assert "ensemble: failed: the model 'linear_svm' learned from other data" in done.stdout  # that of the package
    assert "naive_bayes: accuracy" in done.stdout


def test_a_killed_run_leaves_whole_models_only_and_goes_on(tmp_path):
    command = [PROGRAM, "train", "naive_bayes", "linear_svm", "random_forest", "logistic_regression"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(tmp_path), cwd=tmp_path)
    running.stdout.readline()  # the first model is there
    time.sleep(0.3)
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=PATIENCE)
    left = [folder for folder in (tmp_path / "models").iterdir() if not folder.name.startswith(".")]
    assert "naive_bayes" in {folder.name for folder in left}
    for folder in left:  # each is whole: it has a card and answers
        storage = json.loads((folder / "card.json").read_text())["format"]
        assert load_stored(folder, storage).predict_proba(["A sheriff rides into town."]).shape == (1, 27)
    again = train(tmp_path, "naive_bayes", "linear_svm", "random_forest", "logistic_regression")
    assert again.returncode == 0 and "naive_bayes: up to date" in again.stdout
    assert {"naive_bayes", "linear_svm", "logistic_regression"} <= set(cards(tmp_path))
