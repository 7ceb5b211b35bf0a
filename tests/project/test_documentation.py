"""What is written down is true: file tree, commands, configurations, example, imports."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dist_siglip import bench
from dist_siglip.cli import align, capacity, data, embed, lab, slurm
from dist_siglip.cli.parser import parser_of
from dist_siglip.cli.run import (
    average,
    calibrate,
    export,
    quickstart,
    report,
    rerank,
    search,
    testing,
    training,
)
from dist_siglip.cli.run.training import TrainingCLI
from dist_siglip.doctor import command as doctor_command
from tests.support.command import REPOSITORY, environment

PACKAGE = REPOSITORY / "dist_siglip"
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
# Every page but the log of changes, which names what there was.
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "slurm/README.md",
    *(path.relative_to(REPOSITORY).as_posix() for path in sorted(REPOSITORY.glob("docs/**/*.md"))),
)
# Commands that are one function each.
FUNCTIONS = {
    "align": align,
    "average": average,
    "capacity": capacity,
    "doctor": doctor_command,
    "embed": embed,
    "export": export,
    "report": report,
    "search": search,
}


def blocks(text, language):
    # Every block in turn: the end of one is no beginning.
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


def folder_tree():
    """Folders listed in docs/architecture.md, relative to the package, and what each is for."""
    page = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
    (tree,) = [block for block in blocks(page, "") if block.startswith("dist_siglip/\n")]
    parents, purposes = [], {}
    for line in tree.splitlines()[1:]:
        name, _, purpose = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[: depth - 1], name]
        purposes["".join(parents)] = purpose.strip()
    return purposes


def test_the_architecture_page_lists_every_folder_of_the_package_and_no_other():
    folders = {
        f"{path.parent.relative_to(PACKAGE).as_posix()}/"
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.parent != PACKAGE
    }
    purposes = folder_tree()
    assert set(purposes) == folders
    assert all(purposes.values())


def test_the_readme_is_read_in_ten_minutes():
    assert len(README.splitlines()) <= 220


def anchors_of(page):
    """Names of the headings of a page, as forges and the site make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page):
    folder = (REPOSITORY / page).parent
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", (REPOSITORY / page).read_text(encoding="utf-8")):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        file = (folder / name).resolve() if name else REPOSITORY / page
        if not file.exists() or (anchor and anchor not in anchors_of(file)):
            broken.append(target)
    assert broken == []


def test_the_start_page_and_the_navigation_of_the_site_have_every_page():
    start = (REPOSITORY / "docs/index.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\((\w+\.md)\)", start))
    navigation = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    shown = set(re.findall(r"- ([\w/]+\.md)$", navigation, flags=re.MULTILINE))
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert linked == {page for page in pages if "/" not in page} - {"index.md"}
    assert shown == pages | {"slurm.md", "contributing.md", "changelog.md"}


def test_the_layers_of_the_architecture_page_are_those_that_are_checked():
    page = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- layers -->\n```\n")[2].partition("```")[0].split()
    settings = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    layers = re.search(r'name = "Imports point down".*?^layers = \[(.*?)^\]', settings, re.M | re.S)
    checked = re.sub(r'[",()]', "", layers[1])  # those in brackets may be absent
    assert shown == checked.split()


FOLDERS = [path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]
NAMED_FILE = re.compile(
    r"`((?:dist_siglip|tests|configs|slurm|docs|\.ci)/[\w./-]+\.\w+)(?:::\w+)?`"
)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_is_there(page):
    """Paths from the root of the repository, and, in tables of the code, from the package."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    in_package = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w/]+\.py)`", text)
    if page == "docs/architecture.md":
        in_package += re.findall(r"`(\w+\.py)`", text)
    missing = [name for name in NAMED_FILE.findall(text) if not (REPOSITORY / name).exists()]
    assert missing + [name for name in in_package if not (PACKAGE / name).exists()] == []


def test_the_example_of_the_readme_runs():
    (example,) = blocks(README, "python")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d+\.\d torch\.Size\(\[1\]\)\n", done.stdout)


CONFIGURATIONS = [
    path
    for part in ("*", "stages/*")
    for path in sorted((REPOSITORY / "configs").glob(f"{part}.yaml"))
]


def documented_commands():
    """Every dist-siglip command of the pages and of the heads of the configurations."""
    texts = [(page, (REPOSITORY / page).read_text(encoding="utf-8")) for page in PAGES]
    commands = [
        (page, line)
        for page, text in texts
        for block in blocks(text, "bash")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    for path in CONFIGURATIONS:
        head = path.read_text(encoding="utf-8").split("\n\n")[0]
        comment = "\n".join(line.lstrip("# ") for line in head.splitlines() if line.startswith("#"))
        commands += [(path.name, line) for line in comment.replace("\\\n", " ").splitlines()]
    for source, line in commands:
        for part in line.split("#")[0].split("&&"):
            part = re.sub(r"^(srun|torchrun .*-m) dist[-_]siglip ", "dist-siglip ", part.strip())
            if not part.startswith(("dist-siglip ", "sbatch ")):
                continue
            words = shlex.split(part)
            if words[:1] == ["dist-siglip"]:
                yield pytest.param(words[1:], id=f"{source}:{' '.join(words[1:4])}")
            if words[:2] == ["sbatch", "slurm/train.sbatch"]:
                yield pytest.param(["fit", "--config", *words[2:]], id=f"{source}:sbatch")
            elif words[0] == "sbatch":
                assert any((REPOSITORY / word).is_file() for word in words if "sbatch" in word), (
                    line
                )


@pytest.mark.parametrize("words", list(documented_commands()))
def test_documented_commands_parse(words, monkeypatch):
    """The real parsers take them; nothing is built or run."""
    monkeypatch.chdir(REPOSITORY)
    # The one file a command names that only a run makes.
    words = ["configs/quickstart.yaml" if w.endswith("/config.yaml") else w for w in words]
    ran = []
    monkeypatch.setattr(TrainingCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(TrainingCLI, "_run_subcommand", lambda self, command: ran.append(command))
    if words[0] == "quickstart":
        assert quickstart.parser("quickstart").parse_args(words[1:]).out == "runs/quickstart"
    elif words[0] in FUNCTIONS:
        FUNCTIONS[words[0]].parser(words[0]).parse_args(words[1:])
    elif words[0] == "slurm":
        job, fit_options = slurm.parse(words[1], words[2:])
        assert job.render(fit_options).startswith("#!/bin/bash")
    elif words[0] in ("bench", "data", "lab"):
        subcommands = {"bench": bench, "data": data, "lab": lab}[words[0]].SUBCOMMANDS
        parser_of(words[0], subcommands, words[1])[1].parse_args(words[2:])
    elif words[0] == "rerank":
        rerank.run(words[0], words[1:])
        assert ran == [words[1]]
    else:
        runs = {"calibrate": calibrate, "test": testing}
        runs.get(words[0], training).run(words[0], words[1:])
        assert ran == [words[0]]


def test_every_test_that_proves_a_guarantee_exists():
    text = (REPOSITORY / "docs/guarantees.md").read_text(encoding="utf-8")
    proofs = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    for file, name in proofs:
        assert f"\ndef {name}(" in (REPOSITORY / file).read_text(encoding="utf-8"), name
    promises, faults = text.split("## Faults")
    assert len(re.findall(r"^\*\*\d+\. ", promises, flags=re.MULTILINE)) == 10
    rows = [line for line in faults.splitlines() if line.startswith("| ")][2:]
    assert all("::test_" in row for row in rows)


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=str)
def test_every_configuration_has_a_command_at_its_head(path):
    text = path.read_text(encoding="utf-8")
    assert str(path.relative_to(REPOSITORY)) in text.split("\n\n")[0]
    assert yaml.safe_load(text)["run_dir"] == f"runs/{path.stem}"


def modules():
    return sorted(
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
        if path.name != "__main__.py"
    )


@pytest.mark.e2e
def test_each_module_imports_alone(tmp_path):
    """A fresh interpreter per module would take minutes; a fresh module table takes seconds.

    What is ours is compiled once, also where the shell says that byte code is not to be kept.
    """
    script = (
        "import importlib, sys, torch, lightning\n"
        "sys.pycache_prefix, sys.dont_write_bytecode = sys.argv[1], False\n"
        "for name in sys.argv[2:]:\n"
        "    for loaded in [m for m in sys.modules if m.startswith('dist_siglip')]:\n"
        "        del sys.modules[loaded]\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), *modules()],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_source_file_is_short():
    lengths = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {path.name: n for path, n in lengths.items() if n > 500} == {}


def test_no_page_names_a_machine():
    unwanted = re.compile(r"/(?:wor" r"k|ro" r"ot|hom" r"e)/")
    pages = [REPOSITORY / page for page in PAGES] + list(REPOSITORY.glob("*.md"))
    assert [page for page in pages if unwanted.search(Path(page).read_text())] == []
