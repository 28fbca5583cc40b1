"""Build the documentation: `python docs/build.py [FOLDER]`, by default into _docs/.

The pages come from what the project has: the notebooks with the outputs they keep, model cards, the leaderboard, the
program's own help, the package's docments. They are put together in a temporary folder, so none can go stale.
"""

import argparse
import ast
import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import nbformat
from docments_reference import as_rst
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell
from sphinx.cmd.build import build_main

from genre_nb.core import atomic_path
from genre_nb.evaluation import format_score

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
HIDDEN = re.compile(r"^#\| *(hide|default_exp)\b", re.MULTILINE)
LONGEST_VALUE = 400  # characters of a constant that the reference shows
DIRECTIVE = re.compile(r"^#\|.*\n?", re.MULTILINE)
QUOTED_NAME = re.compile(r"(?<![`\w])`([A-Za-z0-9_]+)`(?!`)")


# ---- what is there ----


@cache
def chapters() -> dict[str, str]:
    "Notebook without its ending, in reading order -> the module it exports."
    found = {}
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"), key=lambda path: path.stem.replace("_", " ")):
        match = re.search(r"#\| default_exp (\w+)", path.read_text(encoding="utf-8"))
        if match:
            found[path.stem] = match[1]
    return found


@cache
def exported_names() -> dict[str, str]:
    "Name of an exported definition that can't be mistaken for a word -> its full name; names that two modules export are left out."
    found: dict[str, list[str]] = {}
    for module in chapters().values():
        for name in import_module(f"genre_nb.{module}").__all__:
            found.setdefault(name, []).append(f"genre_nb.{module}.{name}")
    return {name: places[0] for name, places in found.items()
            if len(places) == 1 and ("_" in name.strip("_") or re.search("[A-Z]", name))}


# ---- notebooks ----


def page_of_notebook(path: Path, folder: str) -> NotebookNode:
    "A notebook as its readers see it: without hidden cells and directives, its names linked to the reference."
    notebook = nbformat.read(path, as_version=4)
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = link_names(cell.source, folder)
        elif HIDDEN.search(cell.source):
            continue
        elif "#| export" in cell.source:
            cells.append(new_markdown_cell(f"({cell_label(path.stem, cell.id)})="))
        cells.append(visible(cell))
    notebook.cells = cells
    return notebook


def visible(cell: NotebookNode) -> NotebookNode:
    "A cell without its directives; one whose input the README hides is shown by its outputs alone."
    if cell.cell_type == "code":
        cell.source = DIRECTIVE.sub("", cell.source)
        if "hide-input" in cell.metadata.get("tags", []):
            cell.metadata["tags"] = ["remove-input"]
    return cell


def cell_label(chapter: str, cell: str) -> str:
    "The name under which a cell can be linked to."
    return f"cell-{chapter}-{cell}".replace("_", "-")


def link_names(text: str, folder: str) -> str:
    "Markdown whose quoted names of chapters and definitions are links; blocks of code stay as they are."
    parts = re.split(r"(^```.*?^```)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else QUOTED_NAME.sub(lambda match: link_to(match, folder), part) for part in parts)


def link_to(match: re.Match, folder: str) -> str:
    "A quoted name, linked if it is a chapter's or a definition's."
    name = match[1]
    if name in chapters():
        return f"[`{name}`](/chapters/{name}.ipynb)"
    return f"{{py:obj}}`{name} <{exported_names()[name]}>`" if name in exported_names() else match[0]


def title_of(path: Path) -> str:
    "The title of a notebook."
    return nbformat.read(path, as_version=4).cells[0].source.splitlines()[0].removeprefix("# ")


def write_chapters(source: Path) -> None:
    "Every notebook, and the page that lists them."
    (source / "chapters").mkdir()
    entries = []
    for chapter in chapters():
        path = ROOT / "nbs" / f"{chapter}.ipynb"
        nbformat.write(page_of_notebook(path, "chapters"), source / "chapters" / path.name)
        entries.append(f"{chapter.split('_')[0]} {title_of(path)} <{chapter}>")
    write(source / "chapters" / "index.md", ["# Chapters", "The project as it is meant to be read, from the first to the last. Each chapter "
                                             "is a notebook: `make lab` opens them in JupyterLab.", toctree(entries, maxdepth=1)])


def write_home(source: Path) -> None:
    "The first page: the README's notebook, and where to go from it."
    notebook = page_of_notebook(ROOT / "nbs" / "index.ipynb", ".")
    picture = next(place for place, cell in enumerate(notebook.cells) if "](images/" in cell.source)
    notebook.cells.insert(picture + 1, new_markdown_cell((DOCS / "home.md").read_text(encoding="utf-8")))
    entries = ["Start <start/index>", "chapters/index", "How to <how_to/index>", "reference/index", "results/index", "changelog", "contributing", "security"]
    notebook.cells.append(new_markdown_cell(toctree(entries, hidden=True)))
    nbformat.write(notebook, source / "index.ipynb")
    shutil.copytree(ROOT / "nbs" / "images", source / "images")


# ---- pages of facts ----


def write_reference(source: Path) -> None:
    "One page a module, one for the program."
    folder = source / "reference"
    folder.mkdir()
    for chapter, module in chapters().items():
        (folder / f"{module}.rst").write_text(module_page(chapter, module), encoding="utf-8")
    write(folder / "program.md", list(program_page()))
    about = "Every exported definition, module by module, and every option of the program."
    write(folder / "index.md", ["# Reference", about, toctree(["program", *chapters().values()], maxdepth=1)])


def module_page(chapter: str, module: str) -> str:
    "reStructuredText for autodoc: each exported definition, with a link to the cell that explains it."
    name = f"genre_nb.{module}"
    exported = import_module(name).__all__
    parts = [f"{name}\n{'=' * len(name)}", f".. automodule:: {name}\n   :no-members:",
             f"Explained, with examples and tests, in the chapter :doc:`/chapters/{chapter}`."]
    parts += [definition_part(name, found, chapter) for found in definitions(chapter) if found.name in exported]
    return "\n\n".join(parts) + "\n"


class Definition(NamedTuple):
    "An exported definition in a notebook."

    name: str
    kind: str  # "function", "class" or "data"
    cell: str  # id of its cell
    comment: str  # behind a constant; "" for other kinds


def definitions(chapter: str) -> Iterator[Definition]:
    "What the exported cells of a chapter define, in reading order."
    for cell in nbformat.read(ROOT / "nbs" / f"{chapter}.ipynb", as_version=4).cells:
        if cell.cell_type == "code" and "#| export" in cell.source:
            lines = cell.source.splitlines()
            for node in ast.parse(cell.source).body:
                for name, kind in defined_names(node):
                    yield Definition(name, kind, cell.id, lines[node.end_lineno - 1].partition("  # ")[2] if kind == "data" else "")


def defined_names(node: ast.stmt) -> list[tuple[str, str]]:
    "(name, kind) of what a statement defines."
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return [(node.name, "function")]
        case ast.ClassDef():
            return [(node.name, "class")]
        case ast.Assign(targets=targets):
            return [(part.id, "data") for target in targets for part in ast.walk(target)
                    if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [(name, "data")]
    return []


def definition_part(module: str, found: Definition, chapter: str) -> str:
    "One definition in reStructuredText: for autodoc, except a constant, whose comment autodoc doesn't know."
    link = f"   :ref:`In chapter {chapter.split('_')[0]} <{cell_label(chapter, found.cell)}>`"
    if found.kind != "data":
        options = "\n   :members:" if found.kind == "class" else ""
        return f".. auto{found.kind}:: {module}.{found.name}{options}\n\n{link}"
    value = repr(getattr(import_module(module), found.name))
    shown = f"\n   :value: {value}" if len(value) <= LONGEST_VALUE else ""
    return f".. py:data:: {found.name}{shown}\n\n   {as_rst(found.comment)}\n\n{link}"


def program_page() -> Iterator[str]:
    "The help of `genre_nb` and of each of its commands."
    from genre_nb.command_line import build_parser

    parser = build_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    yield "# The program genre_nb"
    yield f"```text\n{parser.format_help()}```"
    for name, command in commands.choices.items():
        yield f"## {name}\n\n```text\n{command.format_help()}```"


def write_results(source: Path) -> None:
    "The leaderboard and the model cards."
    folder = source / "results"
    folder.mkdir()
    cards = sorted((ROOT / "models").glob("*/card.json"))
    names = [card.parent.name for card in cards]
    leaders = (ROOT / "metrics" / "leaderboard.md").read_text(encoding="utf-8")
    write(folder / "leaderboard.md", [re.sub(rf"`({'|'.join(names)})`", r"[`\1`](\1.md)", leaders)])
    for card in cards:
        write(folder / f"{card.parent.name}.md", list(card_page(json.loads(card.read_text(encoding="utf-8")))))
    about = "How good the models are, and where each of them comes from."
    write(folder / "index.md", ["# Results", about, toctree(["leaderboard"]),
                                toctree(names, caption="Model cards")])


def card_page(card: dict[str, Any]) -> Iterator[str]:
    "A model card in Markdown."
    yield f"# {card['model']}\n\n{card['summary']}"
    yield f"## Scores\n\nOn the test rows, with their 95 % intervals.\n\n{scores_table(card['metrics'])}"
    yield f"In {card['cross_validation']['folds']}-fold cross-validation of the training rows, all genres:"
    yield scores_table({"cross-validation": card["cross_validation"]})
    yield "## Each genre\n\nOn the test rows, all genres: what of its rows was found, and what of its answers was right."
    yield table(("genre", "rows", "recall", "precision", "F1"),
                [(genre, found["rows"], *(f"{found[score]:.2f}" for score in ("recall", "precision", "f1"))) for genre, found in card["per_genre"].items()])
    yield f"## What it is for\n\n{card['intended_use']}\n\n{card['limits']}"
    yield f"## What it learned from\n\n{card['data']}."
    yield table(("source", "rows", "weight", "sha256"),
                [(part["name"], f"{part['rows']:,}", part["weight"], f"`{part['sha256'][:16]}…`") for part in card["training_data"]])
    if "members" in card:
        yield "## Members\n\n" + table(("model", "weight"), [(f"[{part['model']}]({part['model']}.md)", part["weight"]) for part in card["members"]])
    yield f"## How it was made\n\n```sh\n{card['command']}\n```\n\n{card.get('note', '')}"
    yield table(("", ""), facts_of(card))
    yield f"## Licence\n\n{card['licence']}"


def facts_of(card: dict[str, Any]) -> list[tuple[str, Any]]:
    "(name, value) of what else a card says."
    calibration = card["calibration"]
    return [("version", card["version"]), ("file format", card["format"]), ("genres", f"{len(card['genres'])}: {', '.join(card['genres'])}"),
            ("calibration", f"{calibration['method']} {calibration['temperature']:.3f}, fitted on {calibration['fitted_on']}"),
            ("balance", card.get("balance", "none")), ("seed", card["seed"]),
            ("versions", ", ".join(f"{name} {number}" for name, number in card["versions"].items()))]


def scores_table(protocols: dict[str, dict[str, Any]]) -> str:
    "A Markdown table, one row a protocol."
    scores = ("accuracy", "macro_f1", "top_3_accuracy", "ece")
    rows = [(f"`{protocol}`", *(format_score(found[score]) for score in scores), f"{found['rows']:,}") for protocol, found in protocols.items()]
    return table(("", "accuracy", "macro-F1", "top 3 accuracy", "ECE", "rows"), rows)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    "A Markdown table."
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(value) for value in line) + " |" for line in lines)


# ---- Markdown ----


def toctree(entries: list[str], **options: Any) -> str:
    "A list of pages for Sphinx."
    settings = [f":{name}:" + ("" if value is True else f" {value}") for name, value in options.items()]
    return "\n".join(["```{toctree}", *settings, "", *entries, "```"])


def write(path: Path, paragraphs: list[str]) -> None:
    "Write a page."
    text = "\n\n".join(paragraphs) + "\n"
    path.write_text(re.sub(r"(?<=\d)–(?=\d)", "–\u2060", text), encoding="utf-8")  # an interval stays on one line


# ---- all of it ----


def write_sources(source: Path) -> None:
    "Everything that Sphinx reads."
    for folder in ("start", "how_to"):
        shutil.copytree(DOCS / folder, source / folder)
    for name in ("CHANGELOG", "SECURITY", "CONTRIBUTING"):
        shutil.copy(ROOT / f"{name}.md", source / f"{name.lower()}.md")
    write_home(source)
    write_chapters(source)
    write_reference(source)
    write_results(source)


def build(output: Path) -> int:
    "Build the pages; a warning, such as a link that leads nowhere, is an error. The exit code of Sphinx."
    with TemporaryDirectory(prefix="genre_nb_docs") as work, atomic_path(output) as pages:
        source, built = Path(work) / "source", Path(work) / "pages"  # MyST-NB leaves a folder beside what it builds
        source.mkdir()
        write_sources(source)
        code = build_main(["-q", "-W", "--keep-going", "-c", str(DOCS), "-d", f"{work}/doctrees", str(source), str(built)])
        if code:
            sys.exit(code)
        shutil.copytree(built, pages)
    print(f"{output / 'index.html'}")
    return code


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the documentation.")
    parser.add_argument("output", nargs="?", type=Path, default=ROOT / "_docs", help="default: _docs/")
    build(parser.parse_args().output)
