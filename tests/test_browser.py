"""The demo in a real browser: headless Chromium, no network, light and dark, wide and narrow.

Skipped with a reason where Chromium or playwright is missing; GENRE_NB_BROWSER=required makes that a failure.
The screenshots go to a temporary folder that is printed (pytest -s)."""
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--no-first-run", "--disable-default-apps", "--disable-extensions"]
PLOTS = {
    "western": "A lone gunslinger rides into a dusty frontier town. The sheriff and his outlaws run the ranch where his brother was "
               "shot, and a widow begs him to stay for one last gunfight.",
    "horror": "Teenagers spend a night in an abandoned asylum where something evil is killing them one by one. Blood drips from "
              "the walls, and the ghost of a nurse haunts the survivors with terrifying screams.",
    "documentary": "This documentary follows fishermen, scientists and historians around the world. Through interviews and archival "
                   "footage the film examines how communities live with a changing climate.",
}
TELLING = {"western": {"gunslinger", "sheriff", "outlaws", "ranch"}, "horror": {"asylum", "evil", "ghost", "blood", "haunts"},
           "documentary": {"documentary", "film", "interviews", "footage"}}
HOSTILE = """<script>window.hacked = 1</script> the sheriff <img src=x onerror="window.hacked = 2"> of ${window.hacked = 3} """ \
          """{{constructor.constructor('window.hacked = 4')()}} rides & "saddles" a <b>horse</b> across the frontier"""


def find_chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name))), None)


def unavailable(reason: str) -> None:
    if os.environ.get("GENRE_NB_BROWSER") == "required":
        pytest.fail(f"the browser tests are required (GENRE_NB_BROWSER), but {reason}")
    print(f"browser tests skipped: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        unavailable("playwright is not installed (pip install 'genre_nb[dev]')")
    if (chromium := find_chromium()) is None:
        unavailable("there is no Chromium on this computer (apt-get install chromium)")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("screenshots")
    print(f"screenshots: {folder}")
    return folder


@pytest.fixture
def open_page(browser, demo_server):
    "Open pages that note requests to other hosts and errors; both are checked at the end of the test."
    contexts, requests, errors = [], [], []

    def open_at(path: str = "/", width: int = 1280, height: int = 900, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(demo_server.url + path)
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert requests and not [url for url in requests if not url.startswith((demo_server.url + "/", "data:", "blob:"))]
    assert not errors


def classify(page, text: str) -> None:
    page.locator("#g-description textarea").fill(text)
    page.locator("#g-classify").click()
    page.wait_for_function("text => (document.querySelector('.g-text')?.textContent ?? '') === text", arg=text)


def open_tab(page, name: str) -> None:
    "Choose a tab with the mouse; on a narrow window some are in a menu."
    tab = page.locator("#g-tabs [role=tab]:visible", has_text=name)
    menu = page.locator("#g-tabs .overflow-menu > button:visible")
    tab.or_(menu).first.wait_for()
    if not tab.count():
        menu.click()
        tab = page.locator("#g-tabs .overflow-dropdown button", has_text=name)
    tab.click()


@pytest.mark.parametrize("genre", PLOTS)
def test_a_plot_gets_its_genre_and_its_words(open_page, pictures, genre):
    page = open_page()
    classify(page, PLOTS[genre])
    assert page.locator(".g-verdict").inner_text().lower().startswith(genre)
    assert page.locator(".g-bars").first.locator(".g-bar").count() == 5
    assert page.locator('.g-bar[aria-pressed="true"]').get_attribute("data-genre") == genre
    words = {word.lower() for word in page.locator(".g-text mark.g-for").all_inner_texts()}
    assert words & TELLING[genre], words
    page.screenshot(path=pictures / f"{genre}.png", full_page=True)


def test_opens_with_a_classified_example(open_page):
    page = open_page()
    assert page.locator(".g-verdict").inner_text().startswith("Western")
    assert page.locator("#g-description textarea").input_value() == page.locator(".g-text").inner_text()
    assert page.title().startswith("genre_nb")
    assert page.locator("footer:visible").count() == 1  # ours, not Gradio's
    assert page.get_by_role("link", name="API documentation").get_attribute("href") == "/docs"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_fits_every_window(open_page, pictures, scheme, width):
    page = open_page(width=width, height=844, scheme=scheme)
    page.locator(".g-verdict").wait_for()
    page.get_by_text("All 27 genres").click()
    assert page.locator(".g-bar:visible").count() == 27
    page.wait_for_timeout(400)  # the bars have grown
    page.screenshot(path=pictures / f"{scheme}-{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(background[:3]) < 200) == (scheme == "dark")


def test_examples_and_other_genres(open_page):
    page = open_page()
    page.get_by_role("button", name="Ward Nine").click()
    page.wait_for_function("document.querySelector('.g-verdict').textContent.startsWith('Horror')")
    assert page.locator("#g-description textarea").input_value().startswith("Five students")
    page.locator("#g-description textarea").fill("Edited, but not classified yet.")
    page.get_by_text("All 27 genres").click()
    page.locator('.g-bar[data-genre="comedy"]').click()
    page.wait_for_function("document.querySelector('.g-text').dataset.genre === 'comedy'")
    assert page.locator(".g-text").inner_text().startswith("Five students")  # still about the text that was classified
    assert page.locator(".g-text mark.g-against").count() > 0
    assert page.locator('.g-bar[aria-pressed="true"]').count() == 1


SLOW = """() => {
  const direct = window.fetch
  window.fetch = async (...call) => { await new Promise(done => setTimeout(done, 700)); return direct(...call) }
}"""


def test_a_click_while_an_answer_is_on_its_way_is_not_lost(open_page):
    page = open_page()
    page.evaluate(SLOW)
    page.locator("#g-description textarea").fill(PLOTS["horror"])
    page.locator("#g-classify").click()
    page.wait_for_timeout(100)  # the answer needs seven times as long
    classify(page, PLOTS["documentary"])
    assert page.locator(".g-verdict").inner_text().startswith("Documentary")


def test_keyboard_is_enough(open_page):
    page = open_page()
    box = page.locator("#g-description textarea")
    box.focus()
    box.fill(PLOTS["documentary"])
    page.keyboard.press("Control+Enter")
    page.wait_for_function("document.querySelector('.g-verdict').textContent.startsWith('Documentary')")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset?.genre && document.activeElement.getAttribute('aria-pressed') === 'false'"):
            break
    genre = page.evaluate("document.activeElement.dataset.genre")
    page.keyboard.press("Enter")
    page.wait_for_function("genre => document.querySelector('.g-text').dataset.genre === genre", arg=genre)


def test_link_fills_in_the_description(open_page):
    page = open_page("/?description=A%20vampire%20haunts%20a%20village%20and%20drinks%20the%20blood%20of%20its%20frightened%20people.")
    page.wait_for_function("document.querySelector('.g-text')?.textContent.startsWith('A vampire haunts')")
    assert page.locator(".g-verdict").inner_text().startswith("Horror")
    assert page.locator("#g-description textarea").input_value().startswith("A vampire haunts")


def test_text_is_shown_and_never_run(open_page):
    page = open_page()
    classify(page, HOSTILE)
    assert page.locator(".g-text").inner_text() == HOSTILE
    assert page.locator(".g-text script, .g-text img, .g-text b").count() == 0
    page.locator('.g-bar[aria-pressed="false"]').first.click()
    page.wait_for_timeout(500)
    assert page.evaluate("window.hacked") is None


def test_warnings_and_clear_errors(open_page, pictures):
    page = open_page()
    classify(page, "Une femme revient dans son village natal après la guerre.")
    assert "French" in page.locator(".g-warnings").inner_text()
    page.locator("#g-description textarea").fill("A boat. " * 3_000)
    page.locator("#g-classify").click()
    page.locator(".g-error").wait_for()
    assert "24,000 characters" in page.locator(".g-error").inner_text() and page.locator(".g-verdict").count() == 0
    page.screenshot(path=pictures / "too-long.png", full_page=True)
    page.locator("#g-description textarea").fill("  ")
    page.locator("#g-classify").click()
    page.get_by_text("Paste or type a plot").wait_for()


def test_api_page_works_without_the_internet(open_page, pictures):
    page = open_page("/docs")
    page.locator(".opblock-post .opblock-summary-control").click()
    page.get_by_role("button", name="Execute").click()
    page.locator(".live-responses-table .response-col_status").get_by_text("200").wait_for()
    assert '"western"' in page.locator(".live-responses-table").inner_text()
    page.screenshot(path=pictures / "docs.png", full_page=True)


# ---- the other tabs ----

WINDOWS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]


@pytest.mark.parametrize(("width", "scheme"), WINDOWS)
def test_all_models_are_asked_about_the_same_text(open_page, pictures, width, scheme):
    page = open_page(width=width, height=844, scheme=scheme)
    classify(page, PLOTS["horror"])
    open_tab(page, "Compare models")
    page.locator(".g-compare .g-verdict").wait_for()
    assert page.locator("#g-compare-description textarea").input_value() == PLOTS["horror"]
    assert page.locator(".g-compare .g-verdict").inner_text().startswith("Horror")
    rows = page.locator(".g-compare tr[data-model]")
    assert rows.count() == page.evaluate("fetch('/models').then(answer => answer.json()).then(known => known.models.length)")
    assert all("ms" in text and "%" in text for text in rows.all_inner_texts())
    page.screenshot(path=pictures / f"compare-{scheme}-{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = page.locator("#g-compare-description textarea")
    box.fill(PLOTS["western"])
    box.press("Control+Enter")
    page.wait_for_function("document.querySelector('.g-compare .g-verdict').textContent.startsWith('Western')")
    open_tab(page, "Classify")
    assert page.locator("#g-description textarea").input_value() == PLOTS["western"]  # one text for the whole page


@pytest.mark.parametrize(("width", "scheme"), WINDOWS)
def test_scores_are_shown_without_a_plotting_library(open_page, pictures, width, scheme):
    page = open_page(width=width, height=844, scheme=scheme)
    open_tab(page, "How good is it?")
    page.locator(".g-scores").wait_for()
    measured = page.locator(".g-leaderboard tbody tr").count()
    assert measured >= 5 and "linear_svm" in page.locator(".g-leaderboard tr[aria-current]").inner_text()
    assert page.locator(".g-matrix tbody tr").count() == page.locator(".g-genres tbody tr").count() == 27
    assert page.locator(".g-plot circle").count() > 3
    page.screenshot(path=pictures / f"scores-{scheme}-{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not page.evaluate("""() => [...document.querySelectorAll('.g-scores .g-table')]
        .filter(table => table.offsetParent && table.scrollWidth > table.closest('.g-card').clientWidth).length""")
    before = page.locator(".g-scores .g-verdict").inner_text()
    page.get_by_role("radio", name="Six common ones").check()
    page.wait_for_function("document.querySelectorAll('.g-matrix tbody tr').length === 6")
    assert page.locator(".g-scores .g-verdict").inner_text() != before


CATALOGUE = """title,year,plot
=HYPERLINK("http://evil.example"),1931,A lone gunslinger rides into a dusty frontier town to face the sheriff and his outlaws.
Ward 9,1932,Something evil stalks the patients of an abandoned asylum and kills them one by one.
Nothing,1933,
<b>bold</b>,1934,"=1+1 sailors drown when their boat sinks in a storm, and a <script>widow</script> weeps."
broken,row
""".replace('=HYPERLINK("http://evil.example")', '"=HYPERLINK(""http://evil.example"")"')


def classify_file(page, content: str | bytes, name: str) -> None:
    "Upload a file on the tab Batch and start."
    if not page.locator("#g-batch-start").is_visible():
        open_tab(page, "Batch")
    file = {"name": name, "mimeType": "text/plain", "buffer": content if isinstance(content, bytes) else content.encode()}
    page.locator("#g-batch-file input[type=file]").set_input_files(file)
    page.locator("#g-batch-file").get_by_text(name.rpartition(".")[0][:12]).first.wait_for()
    page.locator("#g-batch-start").click()


def downloaded(page, link: str) -> tuple[str, str]:
    "Name and content of a download."
    with page.expect_download() as download:
        page.locator(link).click()
    return download.value.suggested_filename, Path(download.value.path()).read_text(encoding="utf-8")


@pytest.mark.parametrize(("width", "scheme"), WINDOWS)
def test_a_file_comes_back_with_genres(open_page, pictures, width, scheme):
    page = open_page(width=width, height=844, scheme=scheme)
    open_tab(page, "Batch")
    assert "2,000 rows" in page.locator(".g-limits").inner_text() and "1.5 MB" in page.locator(".g-limits").inner_text()
    classify_file(page, CATALOGUE, "catalogue.csv")
    page.locator(".g-batch").wait_for()
    page.screenshot(path=pictures / f"batch-{scheme}-{width}.png", full_page=True)
    assert page.locator(".g-batch .g-verdict").inner_text() == "3 rows classified"
    assert page.locator(".g-preview tbody tr").count() == 3 and "western" in page.locator(".g-preview").inner_text()
    assert page.locator(".g-rejected li").all_inner_texts() == [
        "Line 4: the plot is empty", "Line 6: not valid CSV: 2 fields where the header has 3"]
    assert page.locator(".g-batch script, .g-batch b").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    name, text = downloaded(page, ".g-primary")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert name == "catalogue.genres.csv" and [row["predicted_genre"] for row in rows[:2]] == ["western", "horror"]
    assert list(rows[0])[:3] == ["title", "year", "plot"] and len(rows[0]["predicted_top"].split()) == 3
    assert rows[0]["title"] == """'=HYPERLINK("http://evil.example")""" and rows[2]["plot"].startswith("'=1+1")
    assert rows[2]["title"] == "<b>bold</b>" and rows[0]["year"] == "1931"


@pytest.mark.parametrize(("content", "name", "told"), [
    ('{"plot": "A boat sinks in the storm."}\n{"plot": \n[1]\n{"plot": 3}\n', "movies.jsonl", ["Line 2: not JSON", "Line 3", "Line 4: the plot is no text"]),
    ("plot\nA boat sinks in the storm.\nEine M\xf6we schreit.\n".encode("latin-1"), "latin.csv", ["Line 3: undecodable characters"]),
    ("A boat sinks.\n" * 2_001, "many.txt", ["more than 2,000 rows"]),
    ("name,year\nDust,1931\n", "columns.csv", ["the columns are: name, year. Name one in the field Column"]),
], ids=["broken lines", "not UTF-8", "too many rows", "no description"])
def test_bad_files_say_what_is_wrong(open_page, content, name, told):
    page = open_page()
    classify_file(page, content, name)
    page.locator("#g-batch .g-batch, #g-batch .g-error").wait_for()
    shown = page.locator("#g-batch").inner_text()
    assert all(part in shown for part in told), shown


def test_a_file_that_is_too_large_is_refused(browser, demo_server):
    "Without `open_page`, because Gradio complains in the console about an upload that never began."
    page = browser.new_page()
    page.goto(demo_server.url)
    open_tab(page, "Batch")
    large = {"name": "large.txt", "mimeType": "text/plain", "buffer": b"A boat sinks.\n" * 120_000}
    page.locator("#g-batch-file input[type=file]").set_input_files(large)
    page.get_by_text("exceed the maximum allowed size of 1.5 Mb").first.wait_for()
    page.locator("#g-batch-start").click()
    page.get_by_text("Choose a file first").wait_for()
    page.close()


def test_a_file_can_be_stopped(open_page):
    page = open_page()
    open_tab(page, "Batch")
    page.locator("#g-batch-model input").click()
    page.get_by_role("option", name="small_bert").click()
    classify_file(page, (PLOTS["documentary"] + " ") * 3 + "\n" + (PLOTS["horror"] * 3 + "\n") * 900, "long.txt")
    page.locator("#g-batch progress").wait_for()
    page.locator("#g-batch-stop").click()
    page.get_by_text("Stopped. Nothing was kept.").wait_for(timeout=60_000)  # the portion at hand is finished first
    page.wait_for_timeout(1500)
    assert page.get_by_text("Stopped. Nothing was kept.").is_visible() and page.locator("#g-batch progress").count() == 0
    open_tab(page, "Classify")
    classify(page, PLOTS["western"])


EDITED = "A gunslinger comes to a small town, where the sheriff and a widow look for her lost children."


def test_an_edit_is_compared_with_the_text_before(open_page, pictures):
    page = open_page()
    classify(page, EDITED)
    assert page.locator(".g-change").count() == 0  # another text, not an edit of the example
    before = page.locator('.g-bar[data-genre="western"] .g-value').inner_text()
    classify(page, EDITED.replace("gunslinger", "teacher").replace("the sheriff", "her brother"))
    after = page.locator('.g-bar[data-genre="western"] .g-value').text_content()  # may be among those folded away
    changed = page.locator(".g-change")
    assert changed.locator("h3").inner_text() == "Compared with your previous text"
    western = changed.locator("li", has_text="western").inner_text()
    assert re.sub(r"\s+", " ", western) == f"western {before} → to {after}"
    page.screenshot(path=pictures / "edited.png", full_page=True)
    classify(page, PLOTS["horror"])
    assert page.locator(".g-change").count() == 0


def test_models_that_disagree_are_named(open_page, demo_server, pictures):
    page = open_page()
    asked = [{"descriptions": list(TORN), "model": model} for model in ("linear_svm", "small_bert")]
    linear, bert = ([one["genre"] for one in page.request.post(f"{demo_server.url}/predict", data=body).json()["predictions"]] for body in asked)
    differing = [(text, *genres) for text, *genres in zip(TORN, linear, bert) if genres[0] != genres[1]]
    same = [text for text, *genres in zip(TORN, linear, bert) if genres[0] == genres[1]]
    assert differing and same
    text, first, second = differing[0]
    classify(page, text)
    warning = page.locator(".g-warnings", has_text="The models disagree").inner_text()
    assert f"linear_svm says {first}" in warning and f"small_bert says {second}" in warning
    page.screenshot(path=pictures / "disagree.png", full_page=True)
    classify(page, same[0])
    assert page.get_by_text("The models disagree").count() == 0


TORN = (
    "A boy and his talking fox set out across the mountains to bring the lost king his crown.",
    "A retired boxer trains a girl from the docks for one last fight against the man who ruined him.",
    "Two sisters quarrel over a house by the sea and an old love, until a letter from the war arrives.",
    "A detective falls for the widow of the man whose death he investigates, and laughs himself out of a job.",
    PLOTS["western"],
    PLOTS["documentary"],
)


@pytest.mark.parametrize(("width", "scheme"), WINDOWS)
def test_examples_for_programs_work_when_pasted(open_page, demo_server, pictures, width, scheme):
    page = open_page(width=width, height=844, scheme=scheme)
    open_tab(page, "API")
    page.locator(".g-api").wait_for()
    page.screenshot(path=pictures / f"api-{scheme}-{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator('.g-api a[href="/docs"]').is_visible()
    page.wait_for_function(f"document.querySelector('.g-base').textContent === '{demo_server.url}'")
    if (width, scheme) != WINDOWS[0]:
        return
    terminal, *programs = page.locator(".g-code code").all_inner_texts()
    for program in programs:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert done.stdout.startswith("western 0.9"), done.stdout + done.stderr
    if shutil.which("curl"):
        done = subprocess.run(["sh", "-c", terminal], capture_output=True, text=True, timeout=60)
        assert json.loads(done.stdout)["predictions"][0]["genre"] == "western", done.stdout + done.stderr
    page.locator(".g-copy").first.click()
    page.get_by_role("button", name="Copied").wait_for()


def test_tabs_are_reached_with_the_keyboard(open_page):
    page = open_page()
    page.locator("#g-tabs [role=tab]:visible").first.wait_for()
    page.locator("#g-tabs [role=tab]:visible", has_text="Classify").focus()
    seen = []
    for _ in range(5):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.textContent.trim()"))
        page.keyboard.press("Enter")
        if seen[-1] == "API":
            break
    assert seen == ["Compare models", "Batch", "How good is it?", "API"]
    page.locator(".g-api").wait_for()


BUSY = """
import sys
from genre_nb.inference import load_classifier
from genre_nb.serving import Server
server = Server(port=0)
server.start()
server.web_server.config.app.state.service.queue.limit = 0
print(server.url, flush=True)
sys.stdin.read()
server.stop()
"""


def test_a_full_server_answers_politely(browser, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        page = browser.new_page()
        page.goto(process.stdout.readline().strip())
        page.locator(".g-verdict").first.wait_for()
        page.locator("#g-description textarea").fill(PLOTS["horror"])
        page.locator("#g-classify").click()
        page.locator("#g-result").get_by_text("The server is busy").wait_for()
        open_tab(page, "Compare models")
        page.locator("#g-compared").get_by_text("The server is busy").wait_for()
        page.close()
    finally:
        process.communicate("", timeout=60)
