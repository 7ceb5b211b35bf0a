"""The search page in a browser: typed, clicked, dropped, by keys, in both schemes.

One Chromium, the system's, is started for all of it. Without it, or without playwright, the tests
are skipped and say so.
"""

import os
import time

import pytest

from tests.evaluation.search.test_server import EVIL, start
from tests.report.test_browser import _CONTRAST, _TOO_WIDE, CHROMIUM
from tests.support.shards import encode, picture

pytestmark = pytest.mark.e2e

# A file dropped onto the page, as a browser hands it over.
_DROP = """(content) => {
  const data = new DataTransfer();
  data.items.add(new File([Uint8Array.from(content)], 'a.png', { type: 'image/png' }));
  for (const kind of ['dragenter', 'dragover', 'drop'])
    document.body.dispatchEvent(
      new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
}"""
_READY = "document.querySelector('#status').textContent.includes(' best of ')"
_ROWS = """[...document.querySelectorAll('#pictures a')]
  .map((link) => Number(new URL(link.href).searchParams.get('row')))"""
_SHOWN = (
    "[...document.querySelectorAll('#pictures img')].every((i) => i.complete && i.naturalWidth)"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made, _ = start(tmp_path_factory.mktemp("page"))
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine; apt-get install chromium")
    with playwright.sync_playwright() as play:
        # Root has no sandbox, and a container little shared memory.
        options = ["--disable-dev-shm-usage", *(["--no-sandbox"] if os.getuid() == 0 else [])]
        opened = play.chromium.launch(executable_path=CHROMIUM, args=options, timeout=120_000)
        yield opened
        opened.close()


@pytest.fixture
def page(server, browser):
    opened = browser.new_page(viewport={"width": 1280, "height": 800})
    opened.set_default_timeout(60_000)
    complaints = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on(
        "request",
        lambda request: (
            complaints.append(request.url)
            if not request.url.startswith((server.url, "blob:"))
            else None
        ),
    )
    opened.complaints = complaints
    opened.goto(server.url)
    opened.wait_for_selector("#examples a")
    yield opened
    opened.close()


def until(page, expression):
    """Wait for an expression; playwright's own wait evaluates where the policy forbids it."""
    deadline = time.monotonic() + 60
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(50)


def rows_of(page):
    until(page, _READY)
    return page.evaluate(_ROWS)


def test_a_text_is_typed_and_its_pictures_are_seen(page, server):
    page.keyboard.type("pair number 4")  # the box has the focus
    page.keyboard.press("Enter")
    found = rows_of(page)
    assert found == [hit.row for hit in server.search.by_text("pair number 4", 24)]
    until(page, _SHOWN)
    assert "24 best of 25 pictures in" in page.inner_text("#status")
    page.click("#more")
    until(page, "document.querySelectorAll('#pictures a').length === 25")
    assert page.is_hidden("#more")
    assert page.complaints == []


def test_words_of_captions_stay_words(page):
    page.goto(f"{page.url}?row=9")
    assert 8 in rows_of(page)
    words = page.inner_text("#pictures a[href$='row=8'] .words")
    assert words == EVIL
    assert page.evaluate("document.images.length") == 25  # 24 found, and the one asked by
    assert page.title() == "index"
    assert page.complaints == []


def test_a_dropped_a_chosen_and_a_pasted_picture_find_themselves(page, tmp_path):
    content = encode(picture(9))
    page.evaluate(_DROP, list(content))
    assert rows_of(page)[0] == 9
    assert page.is_visible("#asked-picture")
    page.click("#clear")
    assert page.is_hidden("#asked")
    assert page.evaluate("document.activeElement.id") == "text"
    (tmp_path / "seventh.png").write_bytes(encode(picture(7)))
    page.set_input_files("#file", tmp_path / "seventh.png")
    assert rows_of(page)[0] == 7
    assert page.complaints == []


def test_keys_lead_through_the_pictures_and_back(page):
    page.click("#examples a")
    first = rows_of(page)
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    at = page.evaluate(
        "[...document.querySelectorAll('#pictures a')].indexOf(document.activeElement)"
    )
    columns = page.evaluate(
        "new Set([...document.querySelectorAll('#pictures a')].map((a) => a.offsetLeft)).size"
    )
    assert (at, columns > 2) == (1 + columns, True)
    page.keyboard.press("Enter")
    until(page, "location.search.startsWith('?row=')")
    similar = rows_of(page)
    assert first[at] not in similar
    page.go_back()
    until(page, "location.search.startsWith('?q=')")
    until(page, f"String({_ROWS}) === '{','.join(map(str, first))}'")
    page.focus("#pictures a")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "text"


def test_what_goes_wrong_is_said_on_the_page(page):
    page.evaluate(_DROP, [1, 2, 3])
    page.wait_for_selector("#status.bad")
    assert "picture cannot be decoded" in page.inner_text("#status")
    page.evaluate("about.most_bytes = 2")
    page.evaluate(_DROP, [1, 2, 3])
    until(page, "document.querySelector('#status').textContent.includes('larger than')")
    page.fill("#text", "a pair")
    page.press("#text", "Enter")
    assert len(rows_of(page)) == 24
    assert not page.query_selector("#status.bad")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_and_nothing_is_cut_off(server, browser, scheme):
    for width in (1280, 390):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.goto(f"{server.url}?q=pair%20number%204")
        until(page, _READY)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(_TOO_WIDE) == []
        assert page.evaluate(_CONTRAST) >= 4.5
        spans = _CONTRAST.replace("'p, li, ", "'span.words, span.from, button, label, kbd, ")
        assert page.evaluate(spans) >= 4.5
        page.close()
