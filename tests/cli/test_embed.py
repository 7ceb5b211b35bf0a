"""``embed`` as a user calls it."""

import json
import subprocess
import sys

import numpy as np
import pytest

from dist_siglip.cli import main
from tests.support.command import REPOSITORY, environment, write_settings
from tests.support.embedding import COUNTS, load_rows
from tests.support.forked_runs import run_forked, warm_python
from tests.support.processes import LIMIT_SECONDS
from tests.support.shards import write_shards
from tests.training.module.test_trained import run_of

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SRUN = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")


@pytest.fixture
def words(tmp_path):
    """Shards, a run and a folder: the start of a command."""
    write_shards(tmp_path / "shards", COUNTS)
    run, _ = run_of(tmp_path, "clip")
    shards, out = tmp_path / "shards", tmp_path / "out"
    return ["embed", str(shards), f"--out={out}", f"--run_dir={run}", "--workers=0"]


def test_the_report_as_json_and_as_a_table(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main([*words, "--json=true"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pairs_per_second"] > 0
    assert (report["shards"], report["kept"], report["samples"]) == (4, 0, 25)
    assert load_rows(tmp_path / "out", "img_emb").dtype == np.float16
    assert main(words) == 0
    assert "embedded into" in capsys.readouterr().out


@pytest.mark.parametrize("names", [TORCHRUN, SRUN])
def test_the_ranks_of_a_launcher_share_the_shards(words, tmp_path, capsys, monkeypatch, names):
    assert main([*words, f"--out={tmp_path / 'one'}"]) == 0
    capsys.readouterr()
    for rank in range(2):
        for name, value in zip(names, (rank, 2, rank, 2), strict=True):
            monkeypatch.setenv(name, str(value))
        assert main([*words, "--json=true"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["shards"], report["kept"]) == (2, 0)
    for name in ("img_emb", "text_emb"):
        expected = load_rows(tmp_path / "one", name)
        assert (load_rows(tmp_path / "out", name) == expected).all()


@pytest.mark.e2e
def test_torchrun_and_one_process_write_the_same_file(words, tmp_path):
    words += ["--format=parquet", "--dtype=float32"]
    assert main([*words, f"--out={tmp_path / 'one'}"]) == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "dist_siglip", *words],
        capture_output=True,
        text=True,
        env={**environment(), "PYTHON_EXEC": str(warm_python())},
        cwd=REPOSITORY,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    name = "embeddings.parquet"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.e2e
def test_rows_of_a_run_are_the_features_of_its_last_evaluation(tmp_path):
    settings = write_settings(tmp_path, max_steps=4, val_check_interval=4)
    done = run_forked("fit", "--config", settings)
    assert done.returncode == 0, done.stderr
    shards, out = sorted((tmp_path / "data").glob("val*.tar")), tmp_path / "out"
    words = [json.dumps([str(shard) for shard in shards]), f"--out={out}", "--dtype=float32"]
    assert main(["embed", *words, f"--run_dir={tmp_path / 'run'}"]) == 0
    found = np.load(tmp_path / "run" / "evaluation" / "arrays.npz")
    order = np.argsort(found["sample_ids"])
    for name, rows in (("img_emb", "image_features"), ("text_emb", "text_features")):
        embedded = load_rows(out, name, (1,) * len(shards))
        np.testing.assert_allclose(embedded, found[rows][order], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device=abacus"], r"device (abacus) cannot be used; give auto, cpu, cuda"),
        (["--local_batch_size=0"], "local_batch_size (0) must be at least 1"),
        (["--format=pickle"], "format"),
        (["--dtype=float64"], "dtype"),
        (["--model=ViT-B-32"], "name either run_dir"),
        (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
        (["--cache.max_gib=0"], "cache.max_gib (0.0) must be in (0, 1000000000]"),
        (["--outt=x"], "configuration key (outt) is unknown; did you mean out?"),
        (["--shards=x"], "shards is given by its place: leave out --shards"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(words, capsys, options, message):
    assert main([*words, *options]) == 2
    complaint = capsys.readouterr().err
    assert message in complaint
    assert [line for line in complaint.splitlines() if "error:" in line] == [
        complaint.splitlines()[-1]
    ]


def test_a_folder_without_an_option_or_shards_that_are_missing_are_one_line(words, capsys):
    for command in (["embed", words[1], words[3]], ["embed", "none-{0..3}.tar", *words[2:]]):
        assert main(command) == 2
        assert "error:" in capsys.readouterr().err.splitlines()[-1]


def test_bad_samples_show_in_the_report(words, tmp_path, capsys):
    with (tmp_path / "shards" / "00002.tar").open("r+b") as shard:
        content = shard.read()
        shard.seek(content.index(b"\x89PNG"))
        shard.write(b"\0" * 8)
    assert main([*words, "--max_bad_fraction=0.5", "--json=true"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["left_out"] == 1
    assert "skipped '00002.tar/000008': picture cannot be decoded" in captured.err
