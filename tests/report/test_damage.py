"""Damaged records are named and left out, within bounds, and never end anything."""

import io
import json
import os
import random
import zipfile

import numpy as np
import pytest

from dist_siglip import report as build
from dist_siglip.errors import UserError
from dist_siglip.report import write_report
from dist_siglip.report.history import arrays_of, objects_of, printable
from dist_siglip.report.records import read_run
from tests.support.run_folder import write_run

FILES = (
    "metrics.jsonl",
    "config.yaml",
    "provenance.json",
    "bad_samples.jsonl",
    "skipped_steps.jsonl",
    "evaluation/metrics.json",
    "evaluation/examples.json",
    "evaluation/arrays.npz",
    "evaluation/history/step=00000040.npz",
    "benchmarks/handwriting.json",
)
HUGE = "9" * 400
ODD_JSON = (
    "Infinity",
    HUGE,
    "[" * 20_000,
    '{"a":' * 20_000,
    "[]",
    "null",
    '{"step": Infinity, "metrics": {"a": 1e999}}',
    f'{{"step": {HUGE}, "metrics": {{"a": {HUGE}}}, "world_size": {HUGE}}}',
    '{"step": true, "metrics": [], "captions": {}, "images": 3}',
    '{"step": "\\ud800", "captions": [[[]]], "images": [{"row": true}], "reason": ["\\ud800"]}',
    "\xff\x00",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run folder of few pairs: reading it is cheap."""
    return write_run(tmp_path_factory.mktemp("whole") / "run", captions=("one", "two") * 10)


@pytest.fixture
def run_dir(whole, tmp_path):
    """A folder of links to it; what a test changes it replaces."""
    copy = tmp_path / "run"
    for path in whole.rglob("*"):
        if path.is_file():
            place = copy / path.relative_to(whole)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    return copy


def read_or_refuse(run_dir):
    try:
        return read_run(run_dir)
    except UserError:
        return None


@pytest.mark.parametrize("name", FILES)
def test_odd_contents_are_left_out(run_dir, name):
    """Each is read as nothing, or as what is sound of it; only metrics.jsonl must be there."""
    sound = (run_dir / "metrics.jsonl").read_text()
    for text in ODD_JSON:
        content = text.encode("latin-1")
        (run_dir / name).write_bytes(
            sound.encode() + content if name == "metrics.jsonl" else content
        )
        record = read_run(run_dir)
        assert record.last_step == 60
        if name.startswith(("evaluation", "benchmarks")) and not text.startswith('{"step"'):
            assert any(name.rpartition("/")[2] in note for note in record.notes)


@pytest.mark.parametrize("name", [*FILES, "report.html"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_left_out_at_once(run_dir, name, kind):
    (run_dir / name).unlink(missing_ok=True)
    (os.mkfifo if kind == "pipe" else os.mkdir)(run_dir / name)
    if name == "metrics.jsonl":
        with pytest.raises(UserError, match=r"metrics\.jsonl"):
            read_run(run_dir)
    else:
        assert read_run(run_dir).last_step == 60


def test_any_flipped_byte_is_read_or_left_out(run_dir):
    """Damaged in turns, by a few bytes or a cut."""
    draw = random.Random(10)
    originals = {name: (run_dir / name).read_bytes() for name in FILES}
    outcomes = set()
    for number in range(100):
        name = FILES[number % len(FILES)]
        content = bytearray(originals[name])
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        if draw.random() < 0.2:
            del content[draw.randrange(len(content)) :]
        (run_dir / name).write_bytes(content)
        record = read_or_refuse(run_dir)
        outcomes.add("refused" if record is None else "named" if record.notes else "read")
        (run_dir / name).write_bytes(originals[name])
    assert {"named", "read"} <= outcomes
    assert read_run(run_dir).notes == []


def test_a_configuration_of_600_bytes_does_not_hold_the_report_up(run_dir):
    lines = ["a0: &a0 [" + ", ".join("1" * 9) + "]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    (run_dir / "config.yaml").write_text("\n".join(lines))
    assert len("\n".join(lines)) < 700
    record = read_run(run_dir)
    assert record.settings == {}
    assert "config.yaml cannot be read." in record.notes


def npz(**arrays):
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    return packed.getvalue()


def with_shape(shape):
    """An archive of an array whose header claims a shape."""
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}"
    header = header.encode().ljust(117) + b"\n"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    return packed.getvalue()


SHAPES = ("(9, 9)", "(2**62,)", f"({2**62},)", "(-1,)", "('a',)", "(" * 40)


@pytest.mark.parametrize("content", [b"", b"PK", *map(with_shape, SHAPES)])
def test_archives_that_claim_what_they_do_not_hold_are_refused(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(OSError, match=r"damaged|holds"):
        arrays_of(tmp_path / "a.npz")


def test_an_archive_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.npz").write_bytes(npz(a=np.zeros(1000)))
    assert arrays_of(tmp_path / "a.npz")["a"].shape == (1000,)
    monkeypatch.setattr("dist_siglip.report.history._MOST_ARRAY_BYTES", 8000)
    with pytest.raises(OSError, match="it says that it holds 8,128 bytes"):
        arrays_of(tmp_path / "a.npz")


def test_a_line_without_end_is_not_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("dist_siglip.report.history._MOST_LINE", 64)
    (tmp_path / "lines").write_text('{"a": 1}\n{"b": "' + "x" * 500 + '"}\n{"c": 2}')
    assert list(objects_of(tmp_path / "lines")) == [{"a": 1}, None, {"c": 2}]


@pytest.mark.parametrize(
    "name", ["a\x1b[31mb\nc", "<b>&\"'", "n" * 250, "$\\frac{1", "_\u202e\xa0"]
)
def test_odd_names_of_folders_are_shown_harmlessly(whole, tmp_path, name):
    place = tmp_path / name
    place.symlink_to(whole)
    shown = read_run(whole, name).name
    assert shown.isprintable()
    assert len(shown) < 210


def test_half_characters_in_names_reach_neither_page_nor_terminal(tmp_path, capsys):
    from dist_siglip.cli.run.report import report

    folder = tmp_path / os.fsdecode(b"run\xff")
    write_run(folder, captions=("one", "two") * 10, num_images=1)
    lines = [{"step": 1, "\ud800": 1.0, "<script>": 2.0}]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    assert report([str(folder)], None) == 0
    assert "\udcff" not in capsys.readouterr().out
    page = (folder / "report.html").read_bytes().decode()
    assert "<script>" not in page


def test_names_that_are_shown_alike_are_told_apart(tmp_path):
    folders = [tmp_path / os.fsdecode(b"run\xff"), tmp_path / os.fsdecode(b"run\xfe")]
    names = build._names(folders)
    assert len(set(names)) == 2
    assert all(printable(name) == name for name in names)


def test_a_section_that_fails_is_named_in_its_place(run_dir, monkeypatch, caplog):
    """Numbers that no section expects, all at once; the page is there, and the rest of it."""
    numbers = json.loads((run_dir / "evaluation/metrics.json").read_text())
    values = (-5.0, 7e99, "nan", "inf", 0)
    odd = {name: values[place % 5] for place, name in enumerate(numbers)} | {"step": 60}
    (run_dir / "evaluation/metrics.json").write_text(json.dumps(odd))
    arrays = dict(np.load(run_dir / "evaluation/arrays.npz"))
    odd_arrays = {
        name: array if name.endswith("features") else np.full((2, 3), 7, dtype=np.int8)
        for name, array in arrays.items()
    }
    np.savez(run_dir / "evaluation/arrays.npz", **odd_arrays)

    def fails(runs):
        raise ZeroDivisionError("by <b>")

    monkeypatch.setitem(build._SECTIONS, "shapes", fails)
    page = write_report(run_dir).read_text()
    assert (
        "This section is left out: its records cannot be used (ZeroDivisionError: by &lt;b&gt;)"
        in (page)
    )
    assert "section shapes of the report is left out" in caplog.text
    assert "How it was made" in page
