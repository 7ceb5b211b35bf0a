"""Every number that a command line takes has a range, and none outside gets past the parser."""

import inspect
import math
import re
from functools import cache

import pytest
from jsonargparse import Namespace

from dist_siglip import evaluation as benchmarks
from dist_siglip import losses, objectives
from dist_siglip.cli import main
from dist_siglip.cli.ranges import _INIT_ARGUMENTS, RANGES, check_ranges, range_of
from dist_siglip.errors import UserError
from dist_siglip.training import callbacks, strategies
from tests.support.parsers import command_lines, parser_of_command

_NUMBER = re.compile(r"\b(int|float|timedelta)\b")


def _leaves(parser):
    """(dotted name, default) of what may be a number."""
    for action in parser._actions:
        if _NUMBER.search(str(getattr(action, "_typehint", None) or action.type)):
            yield action.dest, action.default


@cache
def numeric_settings():
    """Every numeric setting of every command line, with its defaults."""
    found = {}
    for words in command_lines():
        for name, default in _leaves(parser_of_command(words)):
            found.setdefault(name, []).append(default)
    return found


def test_every_number_of_every_command_line_has_a_range_that_holds_its_default():
    settings = numeric_settings()
    assert len(settings) > 100
    without = sorted(name for name in settings if range_of(name) is None)
    assert without == []
    for name, defaults in settings.items():
        for default in defaults:
            numbers = default if isinstance(default, list | tuple) else [default]
            for number in numbers:
                if isinstance(number, int | float) and not isinstance(number, bool):
                    assert range_of(name).holds(number), (name, number)


def test_no_range_is_of_a_setting_that_is_not_there():
    groups = ("data.datacompdr.", "model.curation.")
    of_optional_groups = {name for name in RANGES if name.startswith(groups)}
    assert len(of_optional_groups) == 5
    found = set(RANGES) - set(numeric_settings()) - of_optional_groups
    of_lists = {f"model.teachers.{name}" for name in ("dim", "scale", "bias")}
    assert found == {"data.train_sources.weight"} | of_lists


def test_every_number_of_a_class_path_has_a_range():
    own = {
        name
        for module in (losses, objectives, benchmarks, callbacks, strategies)
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if cls.__module__.startswith("dist_siglip.")
        and (hasattr(cls, "forward") or hasattr(cls, "evaluate") or hasattr(cls, "setup"))
        for name, parameter in inspect.signature(cls).parameters.items()
        if _NUMBER.search(str(parameter.annotation))
    }
    grouped = {name.rpartition(".")[2] for name in RANGES}
    adapters = {"num_modalities", "start_logit"}  # a module of towers, no setting of a loss
    assert own - set(_INIT_ARGUMENTS) - grouped - adapters == set()


def _outside(allowed):
    yield from (math.nan, math.inf, -math.inf, 1e400)
    if math.isfinite(allowed.low):
        yield allowed.low - 1
        if "(" in allowed.opens:
            yield allowed.low
    if math.isfinite(allowed.high):
        yield allowed.high * 2
        yield 10**400
        if ")" in allowed.opens:
            yield allowed.high


@pytest.mark.parametrize("name", RANGES)
def test_what_is_out_of_range_is_refused_in_one_line(name):
    allowed = RANGES[name]
    for value in _outside(allowed):
        if value in allowed.also:
            continue
        settings = Namespace()
        settings[name] = value
        with pytest.raises(UserError) as caught:
            check_ranges(settings)
        message = str(caught.value)
        assert message.startswith(f"{name} (")
        assert "must be" in message
        assert "\n" not in message
        assert len(message) < 200
    for value in (*allowed.also, None, True, "auto"):
        settings = Namespace()
        settings[name] = value
        check_ranges(settings)


def test_numbers_in_lists_and_in_classes_of_ours_are_looked_at_and_those_of_others_are_not():
    chunk = {"class_path": "dist_siglip.losses.SigLipLoss", "init_args": {"chunk_rows": 0}}
    for settings, words in (
        (Namespace(crop_scale=(0.5, 1.5)), r"crop_scale\[1\] \(1.5\) must be in \(0, 1\]"),
        (Namespace(world_sizes=[1, 0]), r"world_sizes\[1\] \(0\) must be at least 1"),
        (Namespace(model=Namespace(loss=chunk)), r"init_args.chunk_rows \(0\) must be at least 1"),
        (Namespace(data=Namespace(train_sources=[{"weight": -1.0}])), r"weight \(-1.0\)"),
    ):
        with pytest.raises(UserError, match=words):
            check_ranges(settings)
    theirs = {"class_path": "other.Loss", "init_args": {"chunk_rows": 0, "decay": 7}}
    check_ranges(Namespace(model=Namespace(loss=theirs)))


FIT = ["fit", "--model.model=ViT-B-32", "--data.train_shards=none.tar"]
COMMANDS = {
    "clip": ([*FIT, "--trainer.gradient_clip_val=-1"], "0 or null turns clipping off"),
    "cache": ([*FIT, "--data.cache.max_gib=.inf"], r"max_gib \(inf\) must be in \(0, 1000000000\]"),
    "seed": ([*FIT, "--seed_everything=-1"], r"seed_everything \(-1\)"),
    "huge": ([*FIT, f"--trainer.max_steps={10**30}"], r"max_steps \(1000.*\) must be"),
    "list": ([*FIT, "--trainer.max_steps=[]"], "max_steps"),
    "name": (
        [*FIT, "--data.captions.weights={{a.b: -1}}"],
        r"weights.a.b \(-1.*\) must be above 0",
    ),
    "digits": ([*FIT, "--config={digits}"], "4300 digits"),
    "nest": ([*FIT, "--config={nest}"], "nest"),
    "command": (
        ["capacity", "--dimension=0", "--margin=.1"],
        r"dimension \(0\) must be at least 1",
    ),
    "subject": (["bench", "plan", "--nic_gb_s=.nan"], r"nic_gb_s \(nan\) must be above 0"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_ends_with_one_line_and_code_2(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").write_text(f"trainer: {{max_steps: {'9' * 6000}}}")
    (tmp_path / "nest").write_text("".join(f"{'  ' * depth}a:\n" for depth in range(1500)))
    arguments, words = COMMANDS[case]
    before = sorted(tmp_path.iterdir())
    assert main([word.format(digits="digits", nest="nest") for word in arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(words, line), line
    assert sorted(tmp_path.iterdir()) == before
