"""The options of every command, read from the source that declares them.

A command is a function, whose signature the parser takes, or a run, whose groups are the
constructors of model, data, Trainer and callbacks. ``tests/cli/test_help.py`` compares what is read
here with what the parsers say, for every command.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dist_siglip.cli.help.source_reading import (
    Found,
    Instance,
    Parameter,
    UnreadableError,
    class_of,
    description_of,
    find,
    kind_of,
    methods_of,
    parameters_of,
    value_of,
)

REQUIRED = object()


class Option(NamedTuple):
    """One option of a command line.

    Attributes:
        name: with dots between groups.
        kind: what it takes, in a word; empty if it takes nothing.
        default: ``REQUIRED`` if there is none.
        text: what it means.
        by_place: whether it is given by its place, without its name.
        many: whether several words are given by their place.
    """

    name: str
    kind: str
    default: Any
    text: str
    by_place: bool = False
    many: bool = False


class Group(NamedTuple):
    """Options that belong together.

    Attributes:
        name: the part of their names before the last dot; empty for those without.
        text: what they are about.
        options: in the order of the source.
        like: name of an earlier group of the same class, if there is one.
    """

    name: str
    text: str
    options: list[Option]
    like: str = ""


class Run(NamedTuple):
    """A command on a run: where its parts are declared.

    Attributes:
        cli: the class that adds options of its own.
        model: the Lightning module.
    """

    cli: tuple[str, str] = ("dist_siglip.cli.run.training", "TrainingCLI")
    model: tuple[str, str] = ("dist_siglip.training.module", "SigLipModule")


_RERANK = Run(
    cli=("dist_siglip.cli.run.rerank", "RerankCLI"),
    model=("dist_siglip.training.module.reranker", "RerankerModule"),
)
RUNS: Mapping[tuple[str, ...], Run] = {
    ("fit",): Run(),
    ("validate",): Run(),
    ("test",): Run(cli=("dist_siglip.cli.run.testing", "BenchmarkCLI")),
    ("calibrate",): Run(cli=("dist_siglip.cli.run.calibrate", "CalibrationCLI")),
    ("rerank", "fit"): _RERANK,
    ("rerank", "validate"): _RERANK,
}
_DATA = ("dist_siglip.training.datamodule", "ImageTextDataModule")
_TRAINER = ("lightning.pytorch.trainer", "Trainer")
# In place of Lightning's words, which say nothing of what these two do here.
_SEED = "Of weights, sample order and augmentation; true draws one."
_CHECKPOINT = "Checkpoint to take; null takes the newest of run_dir."


def subjects_of(module: str) -> dict[str, str]:
    """Return the subjects of a command and a line about each; none if it has none.

    Example:
        >>> list(subjects_of("dist_siglip.cli.slurm"))
        ['render', 'submit']
    """
    try:
        subjects = value_of(*find(module, "SUBJECTS"))
    except UnreadableError:
        return {}
    return {name: each if isinstance(each, str) else each[1] for name, each in subjects.items()}


def module_of(module: str, words: Sequence[str]) -> str:
    """Return the module of a command, or of its subject if that has another."""
    if len(words) == 1:
        return module
    module_of_subject, _ = value_of(*find(module, "SUBJECTS"))[words[1]]
    return str(module_of_subject)


def options_of_function(found: Found) -> tuple[str, list[Group]]:
    """Read the options of a command that is a function, or a dataclass.

    Returns:
        What it does; options without a group, then each group.
    """
    introduction, _ = description_of(found)
    groups = _groups("", found, {})
    try:
        added = list(_added(find(found.module, "parser")))
    except UnreadableError:
        added = []
    names = {each.name for each in added}
    options = [each for each in added if each.by_place]
    options += [each for each in groups[0].options if each.name not in names]
    options += [each for each in added if not each.by_place]
    return introduction, [groups[0]._replace(options=options), *groups[1:]]


def options_of_run(words: tuple[str, ...]) -> list[Group]:
    """Read the options of a command on a run: its own, then each group."""
    run = RUNS[words]
    cli = find(*run.cli)
    own = [Option("seed_everything", "INT", 0, _SEED)]
    for method in methods_of(cli, "add_arguments_to_parser"):
        own += _added(method)
    own.append(Option("ckpt_path", "TEXT", None, _CHECKPOINT))
    changed = value_of(*find("dist_siglip.cli.run.trainer_parts", "TRAINER_DEFAULTS"))
    groups = [
        Group("", "", own),
        *_groups("model", find(*run.model), {}),
        *_groups("data", find(*_DATA), {}),
    ]
    callbacks = value_of(*find("dist_siglip.cli.run.trainer_parts", "CONFIGURED"))
    for name, callback in callbacks.items():
        groups += _groups(name, callback, {})
    groups += _groups("trainer", find(*_TRAINER), changed)
    filled_in = set(_filled_in(cli))
    return [
        group._replace(options=[each for each in group.options if each.name not in filled_in])
        for group in groups
    ]


def _groups(prefix: str, found: Found, changed: Mapping[str, Any]) -> list[Group]:
    """Read a signature: its options, then a group for each parameter that is a dataclass.

    Args:
        prefix: name of the group.
        found: function or class.
        changed: defaults in place of those of the signature.
    """
    introduction, texts = description_of(found)
    options: list[Option] = []
    inner: list[Group] = []
    first_of: dict[str, str] = {}
    for parameter in parameters_of(found):
        name = f"{prefix}.{parameter.name}".lstrip(".")
        text = texts.get(parameter.name, "")
        group = class_of(found.module, parameter.annotation)
        if group is not None:
            default = _default_of(found.module, parameter)
            given = default.given if isinstance(default, Instance) else {}
            members = _groups(name, group, given)
            like = first_of.setdefault(ast.unparse(parameter.annotation or ast.Pass()), name)
            members[0] = members[0]._replace(text=text, like="" if like == name else like)
            inner += members
            continue
        default = changed.get(parameter.name, _default_of(found.module, parameter))
        kind = kind_of(found.module, parameter.annotation)
        by_place = parameter.by_place and default is REQUIRED and not prefix
        options.append(Option(name, kind, default, text, by_place))
    return [Group(prefix, introduction, options), *inner]


def _default_of(module: str, parameter: Parameter) -> Any:
    return REQUIRED if parameter.default is None else value_of(module, parameter.default)


def _calls(function: Found, method: str) -> Iterator[tuple[list[Any], dict[str, ast.expr]]]:
    """Yield the arguments of every call ``parser.METHOD(...)`` that a function makes by itself."""
    for statement in getattr(function.node, "body", []):
        match statement:
            case ast.Expr(value=ast.Call(func=ast.Attribute(attr=name)) as call) if name == method:
                words = [value_of(function.module, each) for each in call.args]
                yield words, {str(each.arg): each.value for each in call.keywords}


def _added(function: Found) -> Iterator[Option]:
    """Read the options that a function adds to a parser one by one."""
    for (name, *_), keywords in _calls(function, "add_argument"):
        constants = {
            key: value_of(function.module, keywords[key])
            for key in ("default", "action", "nargs", "help")
            if key in keywords
        }
        is_flag = constants.get("action") == "store_true"
        by_place = not name.startswith("--")
        yield Option(
            name=name.lstrip("-"),
            kind="" if is_flag else kind_of(function.module, keywords["type"]),
            default=REQUIRED if by_place else constants.get("default", False if is_flag else None),
            text=constants.get("help", ""),
            by_place=by_place,
            many=constants.get("nargs") == "+",
        )


def _filled_in(cli: Found) -> Iterator[str]:
    """Yield the settings that a command line takes from other settings."""
    for method in methods_of(cli, "add_arguments_to_parser"):
        for (_, target), _ in _calls(method, "link_arguments"):
            yield target
