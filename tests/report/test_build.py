"""The whole page: self-contained, escaped, complete, and honest about what is missing."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest

from dist_siglip import report as build
from dist_siglip.errors import UserError
from dist_siglip.report import write_report
from dist_siglip.report.records import read_run
from dist_siglip.report.sections.comparison import make_origin
from tests.support.run_folder import CAPTIONS, write_benchmark, write_run

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>'
HOSTILE_NAME = "_<b>$x$_"
SECRET = "https://me:secret@host/a.tar?sig=12ab"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class _Page(HTMLParser):
    """Collects tags with attributes and text; checks that tags are balanced."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)

    def all_text(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "first")
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(run_dir):
    return _Page((run_dir / "report.html").read_text())


@pytest.fixture(scope="module")
def comparison(run_dir):
    """Two runs with hostile names and captions, side by side."""
    other = write_run(run_dir.parent / f"{HOSTILE_NAME}run", [HOSTILE, *CAPTIONS] * 10)
    (other / "config.yaml").write_text(f"note: {HOSTILE}\ndata:\n  global_batch_size: 64\n")
    (other / "provenance.json").write_text(json.dumps({"command": f"fit {SECRET}"}))
    write_benchmark(other, name=HOSTILE_NAME)
    return _Page(write_report(run_dir, other, out=run_dir.parent / "both.html").read_text())


def _origin(folder):
    return _Page(make_origin([read_run(folder)]).render()).all_text()


def test_page_refers_to_nothing_outside_itself(run_dir, page):
    content = (run_dir / "report.html").read_text().lower()
    assert not any(word in content for word in ("http:", "https:", "//www", "url(http", "@import"))
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "data", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), (tag, value)


def test_page_holds_every_section(page):
    headings = [tag for tag, _ in page.tags if tag == "h2"]
    text = page.all_text()
    for heading in (
        "At a glance",
        "Training",
        "Throughput",
        "Data health",
        "Retrieval",
        "Benchmarks",
        "Pairs that belong together",
        "Calibration",
        "Geometry",
        "The space, step by step",
        "Spectra",
        "Capacity",
        "How it was made",
    ):
        assert heading in text
    assert len(headings) == 13
    assert page.count("img") == 8
    # 3 of training, 1 speed, 2 retrieval, 1 + 3 pairs, 1 calibration, 4 geometry, 1 + 3 shapes, 2
    assert page.count("svg") == 21


def test_every_link_leads_to_a_section(page):
    sections = {attributes.get("id") for tag, attributes in page.tags if tag == "section"}
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert len(links) == 12
    assert {link[1:] for link in links} <= sections


def test_every_section_but_the_last_has_a_conclusion(page):
    verdicts = [a["class"].split()[1] for t, a in page.tags if "verdict" in a.get("class", "")]
    # In its section as a paragraph, and at a glance as a line.
    in_sections = [t for t, a in page.tags if "verdict" in a.get("class", "") and t == "p"]
    assert len(verdicts) == 2 * len(in_sections) >= 2 * 11
    assert "unknown" not in verdicts


def test_page_shows_the_numbers_of_the_evaluation(page):
    text = page.all_text()
    for number in ("0.623", "0.871", "0.938", "0.512", "-0.123", "0.345"):
        assert number in text
    assert "Gallery of 120 pairs with 6 distinct captions" in text
    assert "identical caption counts as a hit" in text
    assert "of training, median over logged steps 931" in text


def test_right_and_wrong_answers_are_told_by_word_and_sign(page):
    items = [attributes["class"] for tag, attributes in page.tags if tag == "li" and attributes]
    assert 8 <= len(items) < 8 * 5  # behind the first right answer stand other candidates
    assert 0 < items.count("right") <= 8
    text = page.all_text()
    assert text.count("✓ right") == items.count("right")
    assert text.count("✕ wrong") == items.count("wrong")


def test_ids_are_unique(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 0


def test_every_reference_inside_the_page_has_a_target(page):
    ids = {attributes.get("id") for _, attributes in page.tags}
    used = [a["href"][1:] for _, a in page.tags if a.get("href", "").startswith("#")]
    used += [
        value[5:-1]
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name == "clip-path"
    ]
    assert used
    assert set(used) <= ids


def test_colours_follow_the_page(run_dir):
    content = (run_dir / "report.html").read_text()
    assert "prefers-color-scheme: dark" in content
    assert "currentColor" in content
    assert "#010203" not in content


def test_captions_folder_names_and_settings_are_escaped(comparison):
    assert comparison.count("script") == 0
    assert all("onerror" not in attributes for _, attributes in comparison.tags)
    verdicts = [t for t, a in comparison.tags if "verdict" in a.get("class", "")]
    answers = [t for t, a in comparison.tags if a.get("class") in ("right", "wrong")]
    assert comparison.count("b") == len(verdicts) + len(answers)
    text = comparison.all_text()
    assert HOSTILE in text
    assert f"{HOSTILE_NAME}run: " in text
    images = [attributes for tag, attributes in comparison.tags if tag == "img"]
    assert any(attributes.get("alt") == HOSTILE for attributes in images)


def test_names_of_runs_are_no_mathematics(comparison):
    """A legend shows the name as it is, the dollars and the first underscore too."""
    assert f"{HOSTILE_NAME}run, validation" in comparison.all_text()


def test_passwords_in_settings_stay_behind(comparison):
    text = comparison.all_text()
    assert "https://host/a.tar?..." in text
    assert "secret" not in text


def test_runs_stand_side_by_side(comparison):
    text = comparison.all_text()
    assert "Runs first, _<b>$x$_run" in text
    assert "Settings that differ" in text
    assert text.count("On a sphere, step by step: ") == 2
    ids = [attributes["id"] for _, attributes in comparison.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_scripts_are_forbidden_by_policy(page):
    policies = [a["content"] for t, a in page.tags if a.get("http-equiv")]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_run_without_evaluation_still_has_a_page(tmp_path):
    folder = tmp_path / "young"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "train/loss": 2.5}\n')
    (folder / "report.html").write_text("old")
    page = _Page(write_report(folder).read_text())
    text = page.all_text()
    assert page.count("svg") == 1
    assert "not been evaluated" in text
    assert "evaluation/arrays.npz is not there" in text
    assert "no example images" in text
    assert "Neither scale nor bias" in text
    assert {path.name for path in folder.iterdir()} == {"metrics.jsonl", "report.html"}


@pytest.mark.parametrize("name", ["arrays.npz", "metrics.json", "examples.json"])
def test_damaged_parts_are_named(tmp_path, name):
    folder = write_run(tmp_path / "run")
    (folder / "evaluation" / name).write_bytes(b"\x00not this")
    assert f"evaluation/{name} cannot be read" in _origin(folder)


def test_pickled_arrays_are_not_opened(tmp_path):
    folder = write_run(tmp_path / "run")
    np.savez(folder / "evaluation/arrays.npz", image_features=np.array([{}], dtype=object))
    np.savez(folder / "evaluation/history/step=00000020.npz", image_features=np.array([{}]))
    text = _origin(folder)
    assert "arrays.npz cannot be read" in text
    assert "evaluation/history/step=00000020.npz cannot be used" in text


def test_same_files_give_the_same_page(run_dir):
    page = (run_dir / "report.html").read_bytes()
    assert write_report(run_dir, out=run_dir / "again.html").read_bytes() == page


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    folders = [tmp_path / side / "run" for side in ("a", "b")]
    assert build._names(folders) == ["a/run", "b/run"]
    with pytest.raises(UserError, match="named more than once"):
        build._names([tmp_path, tmp_path / "x" / ".."])


def test_several_runs_need_a_name_for_the_page(tmp_path):
    with pytest.raises(UserError, match=r"out .* must name the page"):
        write_report(tmp_path, tmp_path / "other")
    with pytest.raises(UserError, match=r"runs \(0\) must be 1 to 8"):
        write_report()


def test_missing_folder_and_missing_log_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="has no numbers"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
