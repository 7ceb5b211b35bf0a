"""The whole page: self-contained, escaped, complete, and honest about what is missing."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest

from dist_siglip.errors import UserError
from dist_siglip.report import write_report
from tests.support.run_folder import CAPTIONS, write_run

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>'
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


def _report(folder):
    return _Page(write_report(folder).read_text())


def test_page_refers_to_nothing_outside_itself(run_dir, page):
    content = (run_dir / "report.html").read_text().lower()
    assert not any(word in content for word in ("http:", "https:", "//www", "url(http", "@import"))
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "data", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), (tag, value)


def test_page_holds_every_section(page):
    text = page.all_text()
    for heading in (
        "In numbers",
        "Loss",
        "Scale and bias",
        "Both modalities",
        "Positive and negative pairs",
        "Images and their first five captions",
        "How it was made",
    ):
        assert heading in text
    assert page.count("svg") == 4
    assert page.count("img") == 8


def test_headline_shows_the_numbers_of_the_evaluation(page):
    text = page.all_text()
    for number in ("0.623", "0.871", "0.938", "0.512", "-0.123", "0.345"):
        assert number in text
    assert "Gallery of 120 pairs with 6 distinct captions" in text
    assert "identical caption counts as a hit" in text
    assert "pairs per second of training, median over logged steps 931" in text


def test_right_and_wrong_answers_are_told_by_word_and_sign(page):
    items = [attributes["class"] for tag, attributes in page.tags if tag == "li"]
    assert len(items) == 8 * 5
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


def test_captions_folder_names_and_config_are_escaped(tmp_path):
    folder = write_run(tmp_path / "<b>run", [HOSTILE, *CAPTIONS] * 10)
    (folder / "config.yaml").write_text(f"note: {HOSTILE}\n")
    page = _report(folder)
    assert page.count("script") == 0
    assert page.count("b") == len([t for t, a in page.tags if t == "li"])  # only right and wrong
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert HOSTILE in page.all_text()
    assert any(attributes.get("alt") == HOSTILE for tag, attributes in page.tags if tag == "img")


def test_scripts_are_forbidden_by_policy(page):
    policies = [a["content"] for t, a in page.tags if a.get("http-equiv")]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_run_without_evaluation_still_has_a_page(tmp_path):
    folder = tmp_path / "young"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "train/loss": 2.5}\n')
    page = _report(folder)
    text = page.all_text()
    assert page.count("svg") == 1
    assert "not been evaluated" in text
    assert "evaluation/arrays.npz is not there" in text
    assert "no example images" in text
    assert "Neither scale nor bias" in text


@pytest.mark.parametrize("name", ["arrays.npz", "metrics.json", "examples.json"])
def test_damaged_parts_are_named(tmp_path, name):
    folder = write_run(tmp_path / "run")
    (folder / "evaluation" / name).write_bytes(b"\x00not this")
    assert f"evaluation/{name} cannot be read" in _report(folder).all_text()


def test_pickled_arrays_are_not_opened(tmp_path):
    folder = write_run(tmp_path / "run")
    np.savez(folder / "evaluation/arrays.npz", image_features=np.array([{}], dtype=object))
    assert "arrays.npz cannot be read" in _report(folder).all_text()


def test_last_logged_evaluation_stands_in_for_a_missing_one(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "evaluation/metrics.json").unlink()
    text = _report(folder).all_text()
    assert "0.800" in text  # val/image_to_text_recall@1 of the last step
    assert "n/a" in text  # what that line does not hold


def test_not_a_number_is_shown_as_such(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / "evaluation/metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"margin": "nan"}))
    assert "worst negative pair n/a" in _report(folder).all_text()


def test_writing_again_replaces_the_page_and_leaves_nothing_else(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "report.html").write_text("old")
    before = {path.name for path in folder.iterdir()}
    assert write_report(folder).read_text() != "old"
    assert {path.name for path in folder.iterdir()} == before


def test_same_files_give_the_same_page(tmp_path):
    folder = write_run(tmp_path / "run")
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


def test_missing_folder_and_missing_log_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="has no numbers"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
