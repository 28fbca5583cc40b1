"""The wheel, with no extra, in a clean environment away from the checkout, predicts; an editable install works, too."""

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution, distributions
from io import StringIO
from pathlib import Path

import pytest
from conftest import ROOT, project_files
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from genre_nb import __version__
from genre_nb.core import find_folder, resource_directory

pytestmark = pytest.mark.skipif(ROOT is None, reason="wheels are built from a checkout")
ABSENT = (
    "pandas",
    "torch",
    "fastai",
    "transformers",
    "matplotlib",
    "gradio",
    "fastapi",
    "pyarrow",
    "kagglehub",
    "nbdev",
    "IPython",
    "pytest",
)
PLOTS = {
    "western": "A lone gunslinger rides into a dusty frontier town to settle an old score with the sheriff.",
    "horror": "Something evil haunts an abandoned asylum and a vampire drinks the blood of its guests one by one.",
}

FRENCH = "Une femme revient dans son village natal après la guerre pour retrouver son frère disparu."


def run(*command: str | Path, folder: Path, **changes: str) -> subprocess.CompletedProcess:
    "A process that sees nothing of this one's settings; failing is a failure of the test."
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "GENRE_NB", "PIP", "VIRTUAL_ENV"))
    }
    environment = (
        kept
        | {
            "HOME": str(folder),
            "XDG_DATA_HOME": str(folder / "user"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_INDEX": "1",
        }
        | changes
    )
    result = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result


# ---- the wheel ----


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    "A copy of the project, so that nothing is written in the checkout and nothing ignored by git gets in."
    source = tmp_path_factory.mktemp("source")
    for path in project_files():
        (source / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, source / path.relative_to(ROOT))
    cache = source / "models" / "__pycache__"  # what importing leaves behind in a checkout; it must not travel
    cache.mkdir()
    (cache / "left.cpython-311.pyc").write_bytes(b"")
    return source


def build(kind: str, source: Path, output: Path) -> Path:
    "Build a \"wheel\" or an \"sdist\" offline, by the interface that pip and build call."
    program = f"from setuptools import build_meta; build_meta.build_{kind}({str(output)!r})"
    run(sys.executable, "-c", program, folder=source)
    return next(output.iterdir())


@pytest.fixture(scope="module")
def source_distribution(source, tmp_path_factory) -> Path:
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def contents(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel) -> list[str]:
    "The lines of the wheel's METADATA file."
    with zipfile.ZipFile(wheel) as archive:
        return (
            archive.read(next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA")))
            .decode()
            .splitlines()
        )


def test_the_wheel_holds_the_package_the_model_the_metrics_and_the_sample(contents):
    wanted = {f"genre_nb/{path.name}" for path in (ROOT / "genre_nb").glob("*.py")}
    wanted |= {
        "genre_nb/resources/models/linear_svm/card.json",
        "genre_nb/resources/metrics/linear_svm.json",
        *(f"genre_nb/resources/sample/{part}.txt" for part in ("train_data", "test_data", "test_data_solution")),
    }
    assert wanted <= contents


def test_every_saved_model_and_every_metric_travels(contents):
    for folder, place in (("models", "models"), ("metrics", "metrics"), ("data/sample", "sample")):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"genre_nb/resources/{place}/{path.relative_to(ROOT / folder).as_posix()}" in contents


def test_the_wheel_holds_no_notebooks_no_tests_and_no_rows_but_the_sample(contents):
    outside = {name for name in contents if not name.startswith(("genre_nb/", f"genre_nb-{__version__}.dist-info/"))}
    assert not outside
    assert not {
        name
        for name in contents
        if name.endswith((".ipynb", ".pyc", ".part", ".gz", ".parquet")) or "/test_" in name and "/sample/" not in name
    }
    data = {
        name for name in contents if name.endswith(".txt") and "/metrics/" not in name and ".dist-info/" not in name
    }
    assert data == {
        f"genre_nb/resources/sample/{part}.txt" for part in ("train_data", "test_data", "test_data_solution")
    }


def test_the_wheel_says_that_it_is_typed_and_carries_its_licences(contents, metadata):
    information = f"genre_nb-{__version__}.dist-info"
    assert {"genre_nb/py.typed", f"{information}/licenses/LICENSE", f"{information}/licenses/NOTICE"} <= contents
    assert "genre_nb/resources/models/LICENSES.md" in contents
    assert "License-Expression: Apache-2.0" in metadata and "Classifier: Typing :: Typed" in metadata


def test_the_wheel_is_small_enough_to_be_a_package(wheel):
    "15 MB is the limit of the shipped model; the rest of the package is small beside it."
    assert wheel.stat().st_size < 60e6


def test_the_metadata_says_what_settings_say(metadata):
    settings = dict(re.findall(r"^(\w+) = (.*)$", (ROOT / "settings.ini").read_text(encoding="utf-8"), flags=re.M))
    assert (
        f"Name: {settings['lib_name']}" in metadata
        and f"Version: {settings['version']}" in metadata
        and settings["version"] == __version__
    )
    assert f"Requires-Python: >={settings['min_python']}" in metadata
    base = {
        line.removeprefix("Requires-Dist: ")
        for line in metadata
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    }
    assert {Requirement(line).name for line in base} == {
        Requirement(part).name for part in settings["requirements"].split()
    }
    assert {line.removeprefix("Provides-Extra: ") for line in metadata if line.startswith("Provides-Extra: ")} == set(
        settings["extras"].split()
    )


def test_the_readme_travels_as_the_long_description(metadata):
    assert "Description-Content-Type: text/markdown" in metadata
    title = (ROOT / "README.md").read_text(encoding="utf-8").strip().splitlines()[0]
    assert title in metadata


def test_the_long_description_links_to_nothing_beside_it(metadata):
    "On a package index there is no nbs/images/."
    targets = re.findall(r"\]\(([^)]*)\)", "\n".join(metadata))
    assert targets and all(target.startswith(("https://", "http://", "#")) for target in targets)


def test_python_versions_are_told_once(metadata):
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    tried = re.search(r"^tried_pythons = (.*)$", settings, flags=re.M)[1].split()
    told = [line.rpartition(" ")[2] for line in metadata if re.match(r"Classifier: Programming Language :: Python :: 3\.", line)]
    assert told == tried and f"min_python = {tried[0]}\n" in settings


def test_constraints_fit_the_requirements_of_every_extra(metadata):
    "Else `make demo` or `make test` would find no version to install."
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}
    for line in (line.removeprefix("Requires-Dist: ") for line in metadata if line.startswith("Requires-Dist: ")):
        requirement = Requirement(line)
        pinned = pins.get(canonicalize_name(requirement.name))
        assert pinned is None or requirement.specifier.contains(pinned), f"{requirement} but constraints.txt has {pinned}"


# ---- the source distribution ----


def names_in(archive: Path) -> set[str]:
    "The files of a source distribution, without its top folder."
    with tarfile.open(archive) as opened:
        return {member.name.partition("/")[2] for member in opened.getmembers() if member.isfile()}


def test_the_source_distribution_holds_the_whole_project_and_nothing_else(source, source_distribution):
    ours = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    ours = {name for name in ours if not name.endswith(".pyc") and not name.startswith(("genre_nb.egg-info/", "build/"))}
    written = {name for name in names_in(source_distribution) if name.startswith("genre_nb.egg-info/")} | {"PKG-INFO"}
    assert names_in(source_distribution) == ours | written


def test_a_wheel_from_the_source_distribution_is_the_same(wheel, source_distribution, tmp_path):
    "Who builds from the archive gets what we built from the checkout, byte for byte."
    with tarfile.open(source_distribution) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    again = build("wheel", next((tmp_path / "unpacked").iterdir()), tmp_path / "wheel")
    assert contents_of(again) == contents_of(wheel)


def contents_of(wheel: Path) -> dict[str, str]:
    "The checksum of each file."
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


# ---- a clean environment ----
# Nothing may be downloaded here, so the environment is furnished from this one: the distributions that the wheel's base
# requirements name, and those that these need, are linked into an empty virtual environment. Whatever else is installed
# here is absent there.


def base_requirements(metadata: list[str]) -> dict[str, Distribution]:
    "Distribution name -> distribution, for the requirements without extras and everything below them."
    waiting = [
        Requirement(line.removeprefix("Requires-Dist: ")) for line in metadata if line.startswith("Requires-Dist: ")
    ]
    found: dict[str, Distribution] = {}
    seen = set()
    while waiting:
        requirement = waiting.pop()
        extras = {"", *requirement.extras}
        name = canonicalize_name(requirement.name)
        if (name, frozenset(extras)) in seen or not applies(requirement, {""}):
            continue
        seen.add((name, frozenset(extras)))
        found[name] = distribution(name)
        below = [Requirement(line) for line in found[name].requires or []]
        waiting += [without_extra(requirement) for requirement in below if applies(requirement, extras)]
    return found


def applies(requirement: Requirement, extras: set[str]) -> bool:
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)


def without_extra(requirement: Requirement) -> Requirement:
    "The requirement once its condition is known to hold."
    requirement.marker = None
    return requirement


def top_levels(found: Distribution) -> Iterator[str]:
    "What a distribution puts directly into site-packages."
    for path in {Path(file).parts[0] for file in found.files or []}:
        if path not in ("..", "__pycache__"):
            yield path


def furnish(site_packages: Path, wanted: dict[str, Distribution]) -> None:
    "Link distributions into another environment; folders shared with an unwanted one are linked file by file."
    unwanted = {
        part
        for other in distributions()
        if canonicalize_name(other.metadata["Name"]) not in wanted
        for part in top_levels(other)
    }
    for found in wanted.values():
        for part in top_levels(found):
            shared = part in unwanted
            for file in [Path(file) for file in found.files if Path(file).parts[0] == part] if shared else [Path(part)]:
                target = site_packages / file
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.exists() and (source := Path(found.locate_file(file))).exists():
                    target.symlink_to(source)


@pytest.fixture(scope="module")
def clean(tmp_path_factory, wheel, metadata) -> Path:
    "A virtual environment that holds the wheel and its base requirements."
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder)
    python = folder / "bin" / "python"
    site_packages = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).stdout.strip()
    )
    wanted = base_requirements(metadata)
    assert not {"pandas", "torch", "gradio", "matplotlib"} & set(wanted)
    furnish(site_packages, wanted)
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-compile", wheel, folder=folder)
    return folder


def files_of(environment: Path) -> dict[str, tuple[int, int]]:
    "Every file of the installed package with size and time of change."
    package = next(environment.glob("lib/python*/site-packages/genre_nb"))
    return {
        str(path.relative_to(package)): (path.stat().st_size, path.stat().st_mtime_ns) for path in package.rglob("*")
    }


@pytest.fixture
def python(clean, tmp_path):
    "Run a program in the clean environment, in a folder that has nothing to do with the checkout."
    return lambda program, **changes: run(
        clean / "bin" / "python", "-c", program, folder=tmp_path, **changes
    ).stdout.strip()


def test_the_clean_environment_is_clean(python):
    "Else the tests below would prove nothing."
    found = python(f"from importlib.util import find_spec; print([name for name in {ABSENT!r} if find_spec(name)])")
    assert found == "[]"
    assert str(ROOT) not in python("import sys, genre_nb; print(genre_nb.__file__, sys.path)")


def test_nothing_the_wheel_needs_is_missing(clean):
    run(sys.executable, "-m", "pip", "--python", clean / "bin" / "python", "check", folder=clean)


def test_three_lines_predict(python):
    lines = [
        "from genre_nb.inference import load_classifier",
        "classifier = load_classifier()",
        f"print(classifier.classify({PLOTS['horror']!r}).genre)",
    ]
    assert python("\n".join(lines)) == "horror"


@pytest.fixture(scope="module")
def session(clean, tmp_path_factory) -> dict:
    "One longer session in the clean environment: what it answered, and what it left behind."
    folder, before = tmp_path_factory.mktemp("session"), files_of(clean)
    program = f"""
import json
from genre_nb import core
from genre_nb.core import checkout_directory, resource_directory
from genre_nb.inference import available_models, load_classifier
classifier = load_classifier()
prediction = classifier.classify({PLOTS["western"]!r}, explain=True)
print(json.dumps({{
    "genre": prediction.genre,
    "word": max(prediction.explanation, key=lambda word: word.contribution).word,
    "warnings": [warning.code for warning in classifier.classify({FRENCH!r}).warnings],
    "models": available_models(),
    "explained": {{name: bool(load_classifier(name).classify({PLOTS["western"]!r}, explain=True).explanation)
                  for name in available_models()}},
    "checkout": checkout_directory(),
    "resources": [str(resource_directory(name)) for name in ("models", "metrics", "sample")],
    "places": [str(getattr(core, f"{{name}}_directory")()) for name in "home data models metrics processed".split()],
}}))
"""
    answer = json.loads(run(clean / "bin" / "python", "-c", program, folder=folder).stdout)
    return answer | {
        "folder": folder,
        "changed": before != files_of(clean),
        "left": [path for path in folder.rglob("*") if path.is_file()],
    }


def test_explanations_and_warnings_need_no_extra_either(session):
    assert session["genre"] == "western" and session["word"] in PLOTS["western"]
    assert session["warnings"] == ["other_language"]


def test_every_model_predicts_and_explains_without_an_extra(session):
    assert session["explained"] == dict.fromkeys(session["models"], True)


def test_resources_are_inside_the_installed_package(session, clean):
    for place in map(Path, session["resources"]):
        assert place.is_relative_to(clean) and place.parts[-3:-1] == ("genre_nb", "resources")
    ours = [path.parent.name for path in (ROOT / "models").glob("*/card.json")]
    assert session["models"] == sorted(ours, key=lambda name: (name != "linear_svm", name))
    assert session["checkout"] is None


def test_nothing_is_written_into_the_package_or_beside_it(session):
    "Downloads and training write to the user's folder, predictions nowhere: no cache, no log."
    assert all(Path(place).is_relative_to(session["folder"] / "user") for place in session["places"])
    assert not session["changed"] and session["left"] == []


def test_the_program_predicts_a_file(clean, tmp_path):
    (tmp_path / "movies.csv").write_text(
        "name,description\n" + "".join(f'{genre},"{plot}"\n' for genre, plot in PLOTS.items())
    )
    result = run(clean / "bin" / "genre_nb", "predict", "movies.csv", folder=tmp_path)
    assert result.stderr == ""
    assert [(row["name"], row["predicted_genre"]) for row in csv.DictReader(StringIO(result.stdout))] == [
        (genre, genre) for genre in PLOTS
    ]


def test_the_program_knows_its_version(clean, tmp_path):
    assert run(clean / "bin" / "genre_nb", "--version", folder=tmp_path).stdout == f"genre_nb {__version__}\n"


def test_a_missing_extra_is_named_with_the_command_that_brings_it(clean, tmp_path):
    for arguments, extra in ((("doctor",), "data"), (("serve", "--port", "0"), "serve")):
        result = subprocess.run(
            [clean / "bin" / "genre_nb", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        )
        assert (
            result.returncode == 1
            and f"pip install 'genre_nb[{extra}]'" in result.stderr
            and "Traceback" not in result.stderr
        )


def test_a_model_of_the_users_own_is_found(tmp_path, python):
    "GENRE_NB_HOME is read before the package."
    own = tmp_path / "home" / "models" / "mine"
    own.mkdir(parents=True)
    (own / "card.json").write_text('{"model": "mine", "version": "1", "format": "unknown"}')
    program = "from genre_nb.inference import available_models; print(available_models())"
    assert "mine" in python(program, GENRE_NB_HOME=str(tmp_path / "home")) and "mine" not in python(program)


# ---- what is installed together ----


def test_no_extra_overwrites_a_file_of_the_base_requirements(metadata):
    """pip lets two distributions write the same file, in silence; the later one wins. (fasttext-numpy2-wheel did so to
    fasttext-predict, and language identification was gone.)"""
    base = base_requirements(metadata)
    ours = {
        str(file): name
        for name, found in base.items()
        for file in found.files or []
        if str(file).endswith((".py", ".so"))
    }
    clashes = {
        f"{other.metadata['Name']} writes {ours[str(file)]}'s {file}"
        for other in distributions()
        if canonicalize_name(other.metadata["Name"]) not in base
        for file in other.files or []
        if str(file) in ours
    }
    assert not clashes


# ---- an editable install ----


def test_an_editable_install_reads_the_checkouts_own_folders(monkeypatch, tmp_path):
    "One way for both: importlib.resources finds models/, metrics/ and data/sample/ where they are edited."
    for name, folder in (("models", "models"), ("metrics", "metrics"), ("sample", "data/sample")):
        assert resource_directory(name) == ROOT / folder
    monkeypatch.setenv("GENRE_NB_HOME", str(tmp_path))
    assert find_folder("models", "linear_svm") == ROOT / "models" / "linear_svm"


def test_an_editable_install_works_from_any_folder(tmp_path):
    program = "from genre_nb import core; print(core.checkout_directory()); print(core.resource_directory('models'))"
    assert run(sys.executable, "-c", program, folder=tmp_path).stdout.split() == [str(ROOT), str(ROOT / "models")]


def test_the_program_is_installed_beside_the_interpreter(tmp_path):
    program = Path(sysconfig.get_path("scripts")) / "genre_nb"
    assert run(program, "--version", folder=tmp_path).stdout == f"genre_nb {__version__}\n"
