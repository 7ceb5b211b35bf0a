"""Help pages say what the parsers say, of every option, and import nothing that takes time."""

import ast
import re
import subprocess
import sys
from argparse import SUPPRESS
from typing import Literal, get_args, get_origin

import pytest
from jsonargparse import ActionConfigFile

from dist_siglip.cli import _COMMANDS, main
from dist_siglip.cli.help import (
    _ELSEWHERE,
    COMMON_TRAINER_OPTIONS,
    REQUIRED,
    RUNS,
    Option,
    _subcommand_page,
    asked_page,
    module_of,
    options_of_function,
    options_of_run,
    subcommands_of,
)
from dist_siglip.cli.help_source import UnreadableError, find, kind_of, value_of
from tests.support.command import environment, run_command
from tests.support.parsers import command_lines, parser_of_command

COMMANDS = command_lines()
RERANK = ("rerank", "fit")


def declared(words):
    """All options that a page of a command is laid out from."""
    if words in RUNS:
        groups = options_of_run(words)
    else:
        module = _COMMANDS[words[0]][0]
        place = _ELSEWHERE.get(words) or (module_of(module, words), words[-1])
        groups = options_of_function(find(*place))[1]
    return [option for group in groups for option in group.options]


def parsed(words):
    """All options of the parser of a command, but help, files, and what is taken from elsewhere."""
    return [
        action
        for action in parser_of_command(words)._actions
        if action.default != SUPPRESS and not isinstance(action, ActionConfigFile)
    ]


def facts_of_option(option):
    is_required = option.default is REQUIRED
    return {
        "default": None if is_required else _plain(option.default),
        "required": is_required,
        "by_place": option.by_place,
        "many": option.many,
        "text": " ".join(option.text.split()),
        "choices": option.kind if option.kind.startswith("{") else "",
    }


def facts_of_action(action):
    typehint = getattr(action, "_typehint", None)
    choices = get_args(typehint) if get_origin(typehint) is Literal else ()
    choices = ("true", "false") if typehint is bool else choices
    by_place = not action.option_strings
    return {
        "default": _plain(action.default),
        "required": action.required,
        "by_place": by_place,
        "many": by_place and action.nargs in ("+", "*"),
        "text": " ".join((action.help or "").split()),
        "choices": f"{{{','.join(map(str, choices))}}}" if choices else "",
    }


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def differences(options, actions):
    """What pages and parser say differently, by the name of the option."""
    ours = {option.name: facts_of_option(option) for option in options}
    theirs = {action.dest: facts_of_action(action) for action in actions}
    # Lightning's words for these say nothing of what they do here.
    for facts in (ours, theirs):
        for name in ("seed_everything", "ckpt_path"):
            if name in facts and "seed_everything" in facts:
                facts[name]["text"] = ""
    found = {}
    for name in ours.keys() | theirs.keys():
        left, right = ours.get(name, {}), theirs.get(name, {})
        # A type that is more than one Literal has choices in our pages alone.
        keys = [key for key in left.keys() | right.keys() if left.get(key) != right.get(key)]
        keys = [key for key in keys if key != "choices" or right.get("choices")]
        if keys:
            found[name] = {key: (left.get(key), right.get(key)) for key in keys}
    return found


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_page_says_what_the_parser_says(words):
    options = declared(words)
    assert differences(options, parsed(words)) == {}
    assert all(option.text for option in options)


def test_a_page_that_says_something_else_is_noticed():
    words = ("quickstart",)
    options, actions = declared(words), parsed(words)
    steps = next(option for option in options if option.name == "steps")
    others = [option for option in options if option is not steps]
    assert differences([*others, steps._replace(default=5)], actions)["steps"] == {
        "default": (5, None)
    }
    assert "steps" in differences(others, actions)
    assert "stops" in differences([*options, Option("stops", "INT", 1, "of a bus.")], actions)
    assert "steps" in differences([*others, steps._replace(text="of stairs.")], actions)


def test_pages_and_mistyped_commands_import_nothing_heavy():
    """One process for all of them."""
    script = (
        "import sys\n"
        "from dist_siglip.cli import _COMMANDS, main\n"
        "from dist_siglip.cli.help import subcommands_of\n"
        "assert main(['--help']) == 0 and main(['--version']) == 0\n"
        "for command, (module, _) in _COMMANDS.items():\n"
        "    assert main([command, '--help']) == 0\n"
        "    for subcommand in subcommands_of(module):\n"
        "        assert main([command, subcommand, '--help']) == 0\n"
        "assert main(['fti']) == main(['data', 'chekc']) == main(['rerank', 'ftt']) == 2\n"
        "assert main(['slurm', 'rander']) == main(['bench']) == main([]) == 2\n"
        "heavy = {'torch', 'lightning', 'numpy', 'jsonargparse', 'open_clip', 'yaml', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert said == [
        "dist-siglip: error: there is no command 'fti'; did you mean fit?",
        "dist-siglip: error: data (chekc) must be one of index, check, stats, plan, pack",
        "dist-siglip: error: rerank (ftt) must be one of fit, validate",
        "dist-siglip: error: slurm (rander) must be one of render, submit",
    ]
    assert "dist-siglip 0." in done.stdout
    assert done.stdout.count("usage: dist-siglip") == 2 + len(COMMANDS) + 6


@pytest.mark.parametrize("words", RUNS, ids=" ".join)
def test_the_page_of_a_run_has_a_line_for_each_option(words, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines = page(words).splitlines()
    assert len(lines) <= 175
    assert max(map(len, lines)) <= 100
    names = [line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")]
    like = "model.text_tower."
    own = [option.name for option in declared(words) if not option.name.startswith("trainer.")]
    common = {f"trainer.{name}" for name in COMMON_TRAINER_OPTIONS}
    assert {name for name in own if not name.startswith(like)} <= set(names)
    assert {name for name in names if name.startswith("trainer.")} == common
    assert sum(name.startswith(like) for name in names) == (words[0] != "rerank")
    assert "  --data.global_batch_size 256" in "\n".join(lines)


def test_the_page_of_a_subject_has_the_line_of_the_subject():
    assert "\nrerank fit: train a head that re-ranks, or go on with a run.\n" in page(RERANK)


def page(words):
    return asked_page(words[0], *_COMMANDS[words[0]], [*words[1:], "--help"])


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_page_is_as_wide_as_the_terminal_within_bounds(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    for words in (("capacity",), ("fit",)):
        widest = max(map(len, page(words).splitlines()))
        assert widest <= min(max(columns, 80), 120)


def test_a_page_shows_texts_kinds_and_defaults(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = page(("embed",))
    assert text.startswith("usage: dist-siglip embed SHARDS --out TEXT [options]\n\nWrite an ")
    assert "\n  --out TEXT            folder of the embeddings. (required)\n" in text
    assert "\n  --dtype {float16,float32,int8,binary}\n" in text
    assert "(default: [jpg,jpeg,png,webp])" in " ".join(text.split())
    assert "\ncache: copies of remote shards.\n  --cache.folder TEXT" in text
    assert "Args:" not in text


def test_help_is_asked_for_anywhere_but_behind_two_dashes():
    slurm = ("slurm", *_COMMANDS["slurm"])
    assert "--sweep" in asked_page(*slurm, ["render", "x.yaml", "--nodes", "2", "-h"])
    assert asked_page(*slurm, ["render", "x.yaml", "--run_dir", "r", "--", "--help"]) is None
    assert asked_page(*slurm, ["--help"]) == _subcommand_page("slurm", subcommands_of(slurm[1]))
    assert asked_page("fit", *_COMMANDS["fit"], ["--model.model", "ViT-B-32"]) is None
    assert asked_page("fit", *_COMMANDS["fit"], []) is None


def test_the_parser_tells_what_no_page_can(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        main(["capacity", "--help-all"])
    assert end.value.code == 0
    assert "type: float | null" in capsys.readouterr().out

    def refuse(*_):
        raise UnreadableError("packed away")

    monkeypatch.setattr("dist_siglip.cli.help.find", refuse)
    assert page(("capacity",)) is None
    with pytest.raises(SystemExit):
        main(["capacity", "--help"])
    assert "type: float | null" in capsys.readouterr().out


def test_the_installed_command_shows_its_pages():
    done = run_command("fit", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: dist-siglip fit [--config FILE]")


@pytest.mark.parametrize(
    "text", ["max(1, 2)", "nowhere", "[x for x in (1,)]", "1 @ 2", "DistSiglip.none"]
)
def test_what_is_no_constant_is_refused(text):
    with pytest.raises(UnreadableError):
        value_of("dist_siglip.cli.help", ast.parse(text, mode="eval").body)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("dist_siglip.cli.help", "no_such"),
        ("dist_siglip.no_such", "a"),
        ("no_such_package", "a"),
    ],
)
def test_what_is_not_there_is_refused(module, name):
    with pytest.raises(UnreadableError, match=re.escape(module.split(".")[0])):
        find(module, name)


@pytest.mark.parametrize(
    ("annotation", "kind"),
    [
        ("int | str | None", "INT|TEXT"),
        ("'Sequence[float]'", "[NUMBER,...]"),
        ("Literal['a', 1] | Literal['b']", "{a,1,b}"),
        ("Option", "CLASS"),
        ("dict[str, int]", "VALUE"),
    ],
)
def test_types_are_told_in_a_word(annotation, kind):
    node = ast.parse(annotation, mode="eval").body
    assert kind_of("dist_siglip.cli.help", node) == kind
