"""The commands of each guide run in their order, as a reader would run them, on small things.

What a reader has (photos, shards, published weights) is made small under its name; longer words are
replaced in the command, and options that make a run short come last. All other options are those
of the page.
"""

import json
import re
import shlex
import signal
from io import BytesIO
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from dist_siglip.data.handwriting import write_handwriting_shards
from dist_siglip.models import build_dual_encoder
from tests.support.command import REPOSITORY
from tests.support.forked_runs import run_forked, start
from tests.support.shards import photo
from tests.support.text_towers import WORDS, write_bert
from tests.support.tiny_models import ARCHITECTURES, TIMM, network_of, write_config
from tests.training.module.test_trained import run_of

GUIDES = REPOSITORY / "docs/guides"
UNITS = WORDS[1:7]
pytestmark = pytest.mark.e2e
SHORT = (
    "--trainer.devices 1 --trainer.accelerator cpu --trainer.precision 32-true"
    " --trainer.max_steps 2 --trainer.val_check_interval 2 --checkpoint.every_steps 2"
    " --data.global_batch_size 8 --data.val_local_batch_size 8 --data.workers_per_rank 0"
    " --model.optim.warmup_steps 1 --collapse_alarm.action warn"
)


def blocks(page, language):
    text = (GUIDES / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


def commands(page):
    """Every command of a page, in turn."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            yield line.split(" #")[0].strip()


def follow(page, replaced, options):
    """Run the commands of a page; return what each said, by its first words.

    Args:
        page: name of the guide.
        replaced: words of the page and what stands for them here.
        options: further ones, by the first word of the command, or the first two.
    """
    said = {}
    for command in commands(page):
        words = shlex.split(command.removeprefix("dist-siglip "))
        assert command.startswith("dist-siglip "), command
        words = [replaced.get(word, word) for word in words]
        begin = " ".join(words[:2])
        if "--serve" in words:
            visit(words)
            continue
        done = run_forked(*words, *options.get(begin, options.get(words[0], "")).split())
        assert done.returncode == 0, f"{command}: {done.stderr}"
        said[begin] = done.stderr
    return said


def visit(words):
    """Serve as a command says, at a free port, until the page and an answer have come."""
    run = start([*words, "--port", "0"], Path("served.txt"))
    try:
        assert run.wait_until(lambda: "(Ctrl-C ends)" in run.said()), run.said()
        (url,) = re.findall(r"serving .* at (http://127\.0\.0\.1:\d+/) ", run.said())
        with urlopen(url, timeout=60) as answer:
            assert "Picture search" in answer.read().decode()
        with urlopen(f"{url}search?text=fox&k=3", timeout=60) as answer:
            found = json.load(answer)["pictures"]
        assert len(found) == 3
        with urlopen(url.rstrip("/") + found[0]["picture"], timeout=60) as answer:
            assert Image.open(BytesIO(answer.read())).size == (60, 48)
        run.signal(signal.SIGINT)
        assert run.wait() == [0], run.said()
    finally:
        run.kill()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with the configurations, and a small model with weights."""
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "tiny.json", ARCHITECTURES["clip"])
    torch.manual_seed(1)
    weights = network_of(ARCHITECTURES["clip"]).state_dict()
    kept = {name: value for name, value in weights.items() if not name.startswith("logit_")}
    save_file(kept, tmp_path / "weights.safetensors")
    return tmp_path


def write_photos(folder, *, languages=False):
    """Write photos/ and the tables train.csv and val.csv."""
    (folder / "photos").mkdir()
    for table, numbers in (("train", range(20)), ("val", range(20, 30))):
        lines = ["image,en,de" if languages else "image,caption"]
        for number in numbers:
            photo(60, 48, seed=number).save(folder / f"photos/{number}.jpg")
            words = f"{UNITS[number % 6]} fox {UNITS[number // 6]}"  # of write_bert's vocabulary
            second = f",the {words}" if languages else ""
            lines.append(f"{number}.jpg,{words}{second}")
        (folder / f"{table}.csv").write_text("\n".join(lines) + "\n")


def evaluated_steps(run: Path) -> list[int]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "val/loss" in line]


def test_own_photos(here):
    write_photos(here)
    replaced = {"ViT-B-16-SigLIP": "tiny.json", "webli": "weights.safetensors"}
    tiny = "--model.model tiny.json --model.pretrained weights.safetensors"
    said = follow("photos.md", replaced, {"fit": f"{SHORT} {tiny}", "embed": "--workers 0"})
    assert evaluated_steps(here / "runs/photos") == [0, 2]  # the published model's own comes first
    assert "20 of 20 samples" in said["data stats"]
    assert (here / "runs/photos/report.html").stat().st_size > 0
    assert (here / "exports/photos/open_clip_model.safetensors").exists()
    assert (here / "embeddings/embeddings.parquet").exists()


def test_a_search_page(here):
    pytest.importorskip("faiss", reason="faiss is not installed")
    write_photos(here)
    packed = run_forked("data", "pack", "train.csv", "shards/train", "--images", "photos")
    assert packed.returncode == 0, packed.stderr
    (here / "made").mkdir()
    run, _ = run_of(here / "made", "clip")
    (here / "runs").mkdir()
    run.rename(here / "runs/photos")
    given = {"photos/2024/IMG_0412.jpg": "photos/7.jpg"}
    said = follow("search.md", given, {"embed": "--workers 0"})
    assert "recall@10" in said["embed shards/train"]
    metrics = json.loads((here / "found/metrics.json").read_text())
    assert (metrics["rows"]["dtype"], metrics["index"]["kind"]) == ("int8", "flat")
    asked = run_forked("search", "found", "photos/7.jpg", "--json", "true")
    answer = asked.stderr[asked.stderr.index("[\n") :]
    (first, *_), *_ = [each["pictures"] for each in json.JSONDecoder().raw_decode(answer)[0]]
    assert first["caption"] == f"{UNITS[1]} fox {UNITS[1]}"  # of photos/7.jpg


def test_a_published_siglip2(here):
    shards = write_handwriting_shards(
        here / "data/train", num_train_pairs=40, num_val_pairs=16, image_size=32
    )
    assert shards.train
    (here / "data/val").mkdir()
    for path in (here / "data/train").glob("val-*.tar"):
        path.rename(here / "data/val" / path.name)
    task = {"class_path": "dist_siglip.evaluation.PairMetrics"}
    task["init_args"] = {"shards": "data/val", "loading": {"workers_per_rank": 0}}
    (here / "tasks.yaml").write_text(yaml.safe_dump([task]))
    replaced = {
        "/data/train": "data/train",
        "/data/val": "data/val",
        "ViT-B-16-SigLIP2": "tiny.json",
        "configs/benchmarks/published.yaml": "tasks.yaml",
    }
    tiny = "--model.model tiny.json --model.pretrained weights.safetensors"
    tiny += " --model.calibration_pairs 16 --model.optim.cooldown_steps 1"
    options = {"fit": f"{SHORT} {tiny}", "test": "--trainer.accelerator cpu --trainer.devices 1"}
    options["data plan"] = "--global_batch_size 8"
    follow("finetune_siglip2.md", replaced, options)
    assert evaluated_steps(here / "runs/tuned") == [0, 2]
    assert (here / "wise.safetensors").exists()
    assert (here / "runs/wise/benchmarks").is_dir()
    assert (here / "exports/tuned/model.safetensors").exists()


def test_a_multilingual_text_tower(here):
    write_photos(here, languages=True)
    (block,) = blocks("lit_multilingual.md", "json")
    content = json.loads(block)
    towers = content["model_cfg"]
    write_bert(here / "bert")
    towers["embed_dim"] = 64
    shown = towers["vision_cfg"]
    assert set(shown) - {"timm_model_pretrained"} == set(TIMM)  # pretrained weights are on the hub
    towers["vision_cfg"] = {**TIMM, "image_size": 160}  # its own size: open_clip has no other
    towers["text_cfg"] |= {"hf_model_name": str(here / "bert"), "context_length": 10}
    (here / "towers.json").write_text(json.dumps(content))
    built = build_dual_encoder(str(here / "towers.json"))
    assert built.mean == (0.5, 0.5, 0.5)
    weights = built.encoder.clip.state_dict()
    start = {name: value for name, value in weights.items() if not name.startswith("logit_")}
    save_file(
        {name: value.contiguous() for name, value in start.items()}, here / "start.safetensors"
    )
    tiny = "--model.pretrained start.safetensors"
    options = {"fit": f"{SHORT} {tiny}", "test": "--trainer.accelerator cpu --trainer.devices 1"}
    follow("lit_multilingual.md", {}, options)
    results = sorted(path.stem for path in (here / "runs/multilingual/benchmarks").glob("*.json"))
    assert results == ["english", "german"]
    tuned = build_dual_encoder("local-dir:exports/multilingual").encoder.clip.state_dict()
    moved = {name for name in start if not torch.equal(start[name], tuned[name])}
    assert moved
    assert not [name for name in moved if name.startswith("visual.")]
