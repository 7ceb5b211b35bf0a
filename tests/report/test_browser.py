"""The page in a browser: nothing complains, everything is drawn, nothing is cut off.

One Chromium, the system's, is started for all of it. Without it, or without playwright, the tests
are skipped and say so.
"""

import os
import shutil

import pytest

from dist_siglip.report import write_report
from tests.support.run_folder import CAPTIONS, write_run

pytestmark = pytest.mark.e2e

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
LONG_NAME = "a-run-with-a-name-that-has-no-place-to-break-" * 3
LONG_CAPTION = "pneumonoultramicroscopicsilicovolcanoconiosis" * 4
BROKEN = """<!doctype html><body style="background: #fff"><p style="color: #bbb">pale</p>
<div style="width: 900px">wide</div>
<div class="scroll" style="overflow-x: auto"><p style="width: 800px">table</p></div>
<svg aria-label="empty" width="200" height="90"></svg>
<svg aria-label="small"><text style="font-size: 4px">small</text></svg>
<img src="gone.png"><script>console.error("a complaint")</script>"""
WIDTHS, SCHEMES = (1280, 390), ("light", "dark")

# What is wider than the window, unless a box around it scrolls or clips.
_TOO_WIDE = """() => {
  const hidden = (e) => { for (let p = e.parentElement; p; p = p.parentElement)
    if (getComputedStyle(p).overflowX !== 'visible' || p.tagName === 'svg') return true;
    return false; };
  return [...document.querySelectorAll('body *')]
    .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5 && !hidden(e))
    .map((e) => e.tagName + ' ' + e.className + ' ' + e.textContent.slice(0, 40));
}"""
# Boxes of which a part can be seen only by scrolling sideways.
_SCROLLS = """() => [...document.querySelectorAll('.scroll, pre')]
  .filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent.slice(0, 60))"""
# A drawing is drawn if its box has a size and something in it has a size too.
_NOT_DRAWN = """() => [...document.querySelectorAll('svg')].filter((svg) => {
  const box = svg.getBoundingClientRect();
  const marks = [...svg.querySelectorAll('path, use, image, text')];
  return box.width < 80 || box.height < 40 ||
    marks.filter((mark) => mark.getBoundingClientRect().width > 0).length < 5;
}).map((svg) => svg.getAttribute('aria-label'))"""
_LETTERS = """() => Math.min(...[...document.querySelectorAll('svg text')]
  .map((t) => t.getBoundingClientRect().height))"""
# Contrast of every text with the card or page behind it, as WCAG defines it.
_CONTRAST = """() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (c) => { const [r, g, b] = parse(c).map((v) => { v /= 255;
    return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (e) => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor; const p = parse(c);
    if (p.length < 4 || p[3] > 0.99) return c; } return 'rgb(255, 255, 255)'; };
  let worst = 99;
  const texts = 'p, li, td, th, h1, h2, h3, h4, b, small, figcaption, text';
  for (const e of document.querySelectorAll(texts)) {
    const style = getComputedStyle(e);
    const ink = e.tagName === 'text' ? style.fill : style.color;
    if (!ink.startsWith('rgb')) continue;
    const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
    worst = Math.min(worst, (a + 0.05) / (b + 0.05));
  }
  return worst;
}"""


@pytest.fixture(scope="module")
def all_looks(tmp_path_factory):
    """What a browser sees of two pages, in each width and scheme, and of a broken one."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine; apt-get install chromium")
    folder = tmp_path_factory.mktemp("pages")
    runs = [
        write_run(folder / "first"),
        write_run(folder / LONG_NAME, [LONG_CAPTION, *CAPTIONS] * 9),
    ]
    pages = {"one": write_report(runs[0]), "two": write_report(*runs, out=folder / "two.html")}
    broken = folder / "broken.html"
    broken.write_text(BROKEN)
    seen = {}
    with playwright.sync_playwright() as play:
        # Root has no sandbox, and a container little shared memory.
        options = ["--disable-dev-shm-usage", *(["--no-sandbox"] if os.getuid() == 0 else [])]
        browser = play.chromium.launch(executable_path=CHROMIUM, args=options)
        for name, path in pages.items():
            for width in WIDTHS:
                for scheme in SCHEMES:
                    seen[name, width, scheme] = _look(browser, path, width, scheme)
        seen["broken"] = _look(browser, broken, 390, "light")
        browser.close()
    return seen


@pytest.fixture(scope="module")
def looks(all_looks):
    return {key: look for key, look in all_looks.items() if key != "broken"}


def _look(browser, path, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url[:80]))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    look = {
        "complaints": complaints,
        "fetched": [url for url in requests if not url.startswith("data:")],
        "page_width": page.evaluate("document.documentElement.scrollWidth"),
        "too_wide": page.evaluate(_TOO_WIDE),
        "scrolls": page.evaluate(_SCROLLS),
        "drawings": page.evaluate("document.querySelectorAll('svg').length"),
        "not_drawn": page.evaluate(_NOT_DRAWN),
        "broken": page.evaluate("[...document.images].filter((i) => !i.naturalWidth).length"),
        "images": page.evaluate("document.images.length"),
        "letters": page.evaluate(_LETTERS),
        "contrast": page.evaluate(_CONTRAST),
        "background": page.evaluate("getComputedStyle(document.body).backgroundColor"),
    }
    page.close()
    return look


def _worst(looks, key, choose):
    return choose(look[key] for look in looks.values())


def test_the_browser_complains_of_nothing(looks):
    assert {key: look["complaints"] for key, look in looks.items() if look["complaints"]} == {}


def test_nothing_but_the_page_itself_is_fetched(looks):
    assert all(len(look["fetched"]) == 1 for look in looks.values())


def test_every_drawing_is_drawn(looks):
    assert [look["drawings"] for key, look in looks.items() if key[0] == "one"] == [21] * 4
    assert {key: look["not_drawn"] for key, look in looks.items() if look["not_drawn"]} == {}


def test_every_picture_is_shown(looks):
    assert _worst(looks, "images", min) == 8
    assert _worst(looks, "broken", max) == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window(looks, width):
    for key, look in looks.items():
        if key[1] == width:
            assert look["page_width"] <= width, key
            assert look["too_wide"] == [], key


def test_every_table_is_seen_whole(looks):
    assert {key: look["scrolls"] for key, look in looks.items() if look["scrolls"]} == {}


def test_letters_of_drawings_are_large_enough_on_a_phone(looks):
    assert _worst(looks, "letters", min) >= 8


def test_text_stands_out_from_its_background_in_both_schemes(looks):
    assert _worst(looks, "contrast", min) >= 4.5
    backgrounds = {key[2]: look["background"] for key, look in looks.items()}
    assert backgrounds["light"] != backgrounds["dark"]


def test_a_broken_page_is_seen_to_be_broken(all_looks):
    """The checks above would fail on it, each for its own reason."""
    look = all_looks["broken"]
    assert "a complaint" in look["complaints"]
    assert len(look["fetched"]) == 2
    assert look["page_width"] > 390
    assert "DIV  wide" in look["too_wide"]
    assert look["scrolls"] == ["table"]
    assert look["not_drawn"] == ["empty", "small"]
    assert look["broken"] == 1
    assert look["letters"] < 8
    assert look["contrast"] < 4.5
