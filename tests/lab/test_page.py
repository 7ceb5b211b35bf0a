"""The pages of the lab are what the lab wrote, and its verdicts follow from its numbers."""

import math
import re
import shutil
from pathlib import Path

import pytest

from dist_siglip.lab.experiments import EXPERIMENTS, PAPERS
from dist_siglip.lab.running import page_of, read_records, write_page
from tests.support.command import REPOSITORY

FOLDER = REPOSITORY / "docs/lab"
RECORDS = read_records(FOLDER)


def test_the_pages_are_what_the_records_say(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "lab", ignore=shutil.ignore_patterns("*.md"))
    shutil.copy(page_of(FOLDER), tmp_path / "lab.md")
    assert write_page(tmp_path / "lab").read_text() == page_of(FOLDER).read_text()
    written, kept = (
        {page.name: page.read_text() for page in folder.glob("*.md")}
        for folder in (tmp_path / "lab", FOLDER)
    )
    assert written == kept
    assert {Path(name).stem for name in written} == set(PAPERS)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_every_verdict_follows_from_its_numbers(record):
    assert not record.quick
    assert record.seed == 0
    assert record.is_sound
    for row in record.rows:
        assert math.isfinite(row.ours), row
        if row.published is None:
            assert row.verdict == "no published value", row
        elif not isinstance(row.published, str):
            is_close = abs(row.ours - row.published) <= (row.tolerance or 0)
            assert is_close == (row.verdict == "reproduced"), row


def test_every_drawing_of_the_pages_is_there_and_small():
    pages = [(FOLDER / f"{paper}.md").read_text() for paper in PAPERS]
    drawings = re.findall(r"!\[\w+\]\((\w+\.svg)\)", "".join(pages))
    assert sorted(drawings) == sorted(f"{record.name}.svg" for record in RECORDS)
    sizes = [(FOLDER / drawing).stat().st_size for drawing in drawings]
    assert max(sizes) < 300_000


def test_every_experiment_of_the_catalogue_is_on_the_page():
    assert [record.name for record in RECORDS] == list(EXPERIMENTS)
