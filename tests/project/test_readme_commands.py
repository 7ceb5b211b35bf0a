"""The commands of the README do what it says: run here, run by .ci/run, or parsed."""

import re
import shlex
from collections.abc import Iterator

import pytest

from dist_siglip.data.handwriting import write_handwriting_shards
from tests.support.command import REPOSITORY
from tests.support.forked_runs import run_forked

# What is run here, in this order after a run of the quickstart, by its first words; each with the
# options that make it short and with what it leaves or says.
_SHORT = "--trainer.devices 1 --trainer.max_steps 2 --trainer.val_check_interval 2"
_SHORT += " --checkpoint.every_steps 2 --model.optim.warmup_steps 1"
RUN = {
    "fit --config configs/quickstart.yaml": (_SHORT, "runs/mine/report.html"),
    "data check": ("", ""),
    "doctor": ("--write_mib=1 --local_batch_size=64 --embed_dim=16", ""),
    "calibrate": ("--trainer.devices 1", ""),
    "validate": ("", "runs/quickstart/evaluation/metrics.json"),
    "test": ("", "runs/quickstart/benchmarks/handwriting_retrieval.json"),
    "report": ("", "runs/quickstart/report.html"),
    "embed": ("--workers 0", "embeddings/embed.json"),
    "search": ("", ""),
    "align": ("", ""),
    "capacity": ("", ""),
    "export": ("", "exports/quickstart/open_clip_model.safetensors"),
    "lab run": ("", "runs/lab/constructions.json"),
}
# What only the real parsers read, in tests/project/test_documentation.py, and why.
PARSED = {
    "fit --config configs/siglip_vit_b16.yaml": "needs GPUs; test_recipes.py shrinks it",
    "slurm submit": "needs a cluster; tests/slurm has one",
}
# What is run by .ci/run, word for word or in its longer form there.
BY_CI = {
    "pip install -e . -c constraints.txt": "pip install",
    'pip install -e ".[dev]" -c constraints.txt': '-e ".[dev]" -c constraints.txt',
    "pytest": "python -m pytest",
    "dist-siglip quickstart": "dist-siglip quickstart",
}


def readme_commands() -> Iterator[str]:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```bash\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            yield from (part.strip() for part in line.split(" #")[0].split("&&"))


def start_of(command: str) -> str:
    """The entry of RUN or PARSED that a command belongs to."""
    words = command.removeprefix("dist-siglip ")
    (start,) = [one for one in (*RUN, *PARSED) if f"{words} ".startswith(f"{one} ")]
    return start


def test_every_command_of_the_readme_is_run_or_parsed():
    by_ci = [command for command in readme_commands() if command in BY_CI]
    others = [start_of(command) for command in readme_commands() if command not in BY_CI]
    assert sorted(by_ci) == sorted(BY_CI)
    assert sorted(others) == sorted([*RUN, *PARSED])
    script = (REPOSITORY / ".ci/run").read_text(encoding="utf-8")
    assert all(words in script for words in BY_CI.values())


@pytest.mark.e2e
def test_the_commands_of_the_readme_run(tmp_path, monkeypatch):
    """All in one folder, as a reader would: later ones use what earlier ones leave."""
    for name in ("configs", "dist_siglip"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    write_handwriting_shards("runs/quickstart/data", num_train_pairs=600, num_val_pairs=40)
    done = run_forked("fit", "--config", "configs/quickstart.yaml", *_SHORT.split())
    assert done.returncode == 0, done.stderr
    (tmp_path / "runs/quickstart/report.html").unlink()
    commands = {start_of(c): c for c in readme_commands() if c not in BY_CI}
    for start, (options, leaves) in RUN.items():
        words = shlex.split(commands[start].removeprefix("dist-siglip "))
        done = run_forked(*words, *options.split())
        assert done.returncode == 0, f"{commands[start]}: {done.stderr}"
        assert (tmp_path / leaves).exists(), commands[start]
        assert done.stderr.strip(), commands[start]
