"""The documentation: it is built without the network, loads nothing from elsewhere, its links lead somewhere, its snippets work."""

import ast
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from genre_nb.core import checkout_directory

ROOT = checkout_directory()
if ROOT is None:
    pytest.skip("the documentation is only in a checkout", allow_module_level=True)
pytest.importorskip("sphinx", reason="needs the extra docs")

BUILD = """
import runpy, socket, sys

def refuse(*_, **__):
    raise OSError("the build of the documentation asked for the network")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
folder, output = sys.argv[1:]
sys.path.insert(0, folder)
sys.argv = ["build.py", output]
runpy.run_path(folder + "/build.py", run_name="__main__")
"""


def clean_environment(**settings: str) -> dict[str, str]:
    "The environment without the project's own settings, with the programs beside this Python first."
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GENRE_NB")}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"} | settings


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    "The site, built once, with no network."
    output = tmp_path_factory.mktemp("docs") / "site"
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    result = subprocess.run(
        [sys.executable, "-c", BUILD, str(ROOT / "docs"), str(output)],
        env=clean_environment(**proxies),
        capture_output=True,
        text=True,
        timeout=1800,  # half a minute of work, on a busy machine much longer
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return output


def test_nothing_is_left_beside_the_site(site):
    assert list(site.parent.iterdir()) == [site]


# ---- pages ----

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src", "embed": "src"}
LOADED |= {"object": "data", "link": "href", "use": "href"}


class Page(HTMLParser):
    "What a page loads, where its links lead, and what in it can be linked to."

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.ids |= {value for value in (found.get("id"), found.get("name") if tag == "a" else None) if value}
        if address := found.get(LOADED.get(tag, "")):
            self.loads.append(address)
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])


@cache
def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def pages(site: Path) -> list[Path]:
    return [path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts]


def is_external(address: str) -> bool:
    return bool(urlsplit(address).netloc)


def test_no_page_loads_anything_from_another_host(site):
    assert len(pages(site)) > 50
    for path in pages(site):
        assert not [address for address in page(path).loads if is_external(address)], path.relative_to(site)
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"""(?:url\(|@import)\s*["']?(?:https?:)?//""", text), path.relative_to(site)


def broken(path: Path, address: str, site: Path) -> bool:
    "Does a link of a page lead nowhere?"
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return False
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if not target.is_file() or site.resolve() not in target.parents:
        return True
    return bool(parts.fragment) and target.suffix == ".html" and unquote(parts.fragment) not in page(target).ids


def test_every_link_and_anchor_leads_somewhere(site):
    site = site.resolve()
    missing = {f"{path.relative_to(site)}: {link}" for path in pages(site) for link in page(path).links + page(path).loads
               if link != "#" and not link.startswith("data:") and broken(path, link, site)}
    assert not missing


def modules() -> list[str]:
    return sorted(path.stem for path in (ROOT / "genre_nb").glob("[!_]*.py"))


def exported(module: str) -> list[str]:
    "`__all__` of a module, read without importing it."
    tree = ast.parse((ROOT / "genre_nb" / f"{module}.py").read_text(encoding="utf-8"))
    lists = [node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
    return [name for found in lists for name in ast.literal_eval(found)]


@pytest.mark.parametrize("module", modules())
def test_every_exported_definition_is_in_the_reference(site, module):
    known, names = page(site / "reference" / f"{module}.html").ids, exported(module)
    assert names and not [name for name in names if f"genre_nb.{module}.{name}" not in known]
    assert (site / "_modules" / "genre_nb" / f"{module}.html").is_file()


def test_the_reference_shows_comments_of_parameters_and_leads_to_the_source(site):
    text = (site / "reference" / "core.html").read_text(encoding="utf-8")
    assert "how many genres to keep" in text and "genre names, in the order of" in text  # of a parameter, of what is returned
    assert any(link.startswith("../_modules/genre_nb/core.html#") for link in page(site / "reference" / "core.html").links)
    assert any(link.startswith("../chapters/00_core.html#cell-") for link in page(site / "reference" / "core.html").links)
    fields = (site / "reference" / "inference.html").read_text(encoding="utf-8")
    assert "in text order; None if it was not asked for" in fields  # of a field of a dataclass


def test_every_chapter_model_and_command_has_its_place(site):
    for notebook in (ROOT / "nbs").glob("[0-9]*.ipynb"):
        assert (site / "chapters" / f"{notebook.stem}.html").is_file()
    for card in (ROOT / "models").glob("*/card.json"):
        assert (site / "results" / f"{card.parent.name}.html").is_file()
    assert {"download", "predict", "serve"} <= page(site / "reference" / "program.html").ids


def test_chapters_show_outputs_and_hide_what_is_only_for_nbdev(site):
    for path in (site / "chapters").glob("[0-9]*.html"):
        text = path.read_text(encoding="utf-8")
        assert "#| " not in re.sub(r"<[^>]+>", "", text), path.name
    exploration = page(site / "chapters" / "02_eda.html")
    assert sum(address.startswith("../_images/") for address in exploration.loads) >= 10
    assert "<math" in (site / "chapters" / "02_eda.html").read_text(encoding="utf-8")


def test_the_search_index_knows_words_and_definitions(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert "most_frequent_genres" in index and '"calibr"' in index.replace("calibr:", '"calibr"')


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser():
    "Chromium without a network, or the reason why there is none."
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        if os.environ.get("GENRE_NB_BROWSER") == "required":
            pytest.fail("there is no chromium")
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_and_ask_nobody(site, browser, width):
    context = browser.new_context(viewport={"width": width, "height": 800}, offline=True)
    shown, asked = context.new_page(), []
    shown.on("request", lambda request: asked.append(request.url))
    for name in ("index", "chapters/06_evaluation", "reference/inference", "results/leaderboard", "how_to/deploy"):
        shown.goto((site / f"{name}.html").as_uri())
        assert shown.evaluate("document.documentElement.scrollWidth") <= width, name
    context.close()
    assert not [address for address in asked if not address.startswith(("file:", "data:", "blob:"))]


def test_light_and_dark(site, browser):
    context = browser.new_context(color_scheme="light", offline=True)
    shown = context.new_page()
    shown.goto((site / "index.html").as_uri())

    def background() -> str:
        return shown.evaluate("getComputedStyle(document.body).backgroundColor")

    light = background()
    shown.locator(".theme-switch-button:visible").first.click()
    shown.locator('[data-mode="dark"]:visible, [data-bs-theme-value="dark"]:visible').first.click()
    shown.wait_for_function("document.documentElement.dataset.theme == 'dark'")
    assert background() != light
    context.close()


def test_a_search_finds_a_chapter(site, browser):
    context = browser.new_context(offline=True)
    shown = context.new_page()
    shown.goto((site / "search.html").as_uri() + "?q=calibration")
    shown.wait_for_selector("#search-results li a")
    assert "06_evaluation.html" in " ".join(shown.locator("#search-results li a").evaluate_all("links => links.map(link => link.href)"))
    context.close()


# ---- snippets ----

BLOCK = re.compile(r"^% (run|file (?P<file>\S+))\n```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
HOW_TO = sorted(path for path in (ROOT / "docs").rglob("*.md") if BLOCK.search(path.read_text(encoding="utf-8")))
ADDRESS = "http://127.0.0.1:5000"


def blocks(path: Path) -> list[re.Match]:
    return list(BLOCK.finditer(path.read_text(encoding="utf-8")))


def run_block(language: str, code: str, folder: Path) -> str:  # what it printed
    "Run a snippet where its files are."
    program = {"python": [sys.executable, "-c"], "sh": ["bash", "-euo", "pipefail", "-c"], "js": ["node", "-e"]}[language]
    environment = clean_environment(GENRE_NB_HOME=str(folder / "home"), OMP_NUM_THREADS="1", PYTHONUTF8="1")
    result = subprocess.run([*program, code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{code}\n{result.stdout[-1500:]}{result.stderr[-1500:]}"
    return result.stdout


@pytest.mark.parametrize("path", HOW_TO, ids=lambda path: path.stem)
def test_snippets_work(path, tmp_path, start_server):
    "Python of a page is one program; commands run one by one."
    found = blocks(path)
    server = start_server("--no-demo") if any(ADDRESS in block["code"] for block in found if not block["file"]) else None
    programs: dict[str, str] = {}
    for number, block in enumerate(found):
        code = block["code"].replace(ADDRESS, server.url) if server else block["code"]
        if block["file"]:
            (tmp_path / block["file"]).write_text(code, encoding="utf-8")
        else:
            key = "python" if block["language"] == "python" else f"{block['language']} {number}"
            programs[key] = programs.get(key, "") + code
    for key, code in programs.items():
        language = key.split()[0]
        if language != "js" or shutil.which("node"):
            run_block(language, code, tmp_path)


def test_what_the_container_copies_is_enough_to_install(tmp_path):
    text = (ROOT / "docs" / "how_to" / "deploy.md").read_text(encoding="utf-8")
    container = next(block["code"] for block in BLOCK.finditer(text) if block["file"] == "Containerfile")
    for line in re.findall(r"^COPY (.+)$", container, re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            place = tmp_path / target / source if target == "./" else tmp_path / target
            place.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, place)
    run_block("sh", "python setup.py --quiet bdist_wheel && ls dist", tmp_path)
    assert len(list((tmp_path / "dist").glob("genre_nb-*.whl"))) == 1
