"""Help pages that appear at once: options read from the source that declares them, and laid out.

A command is a function, whose signature the parser takes, or a run, whose groups are the
constructors of model, data, Trainer and callbacks. ``tests/cli/test_help.py`` compares what is read
here with what the parsers say, for every command.
"""

import ast
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from dist_siglip.cli.help_source import (
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
from dist_siglip.errors import UserError

REQUIRED = object()
_DATA = ("dist_siglip.training.datamodule", "ImageTextDataModule")
_TRAINER_CLASS = ("lightning.pytorch.trainer", "Trainer")
# In place of Lightning's words, which say nothing of what these two do here.
_SEED = "Of weights, sample order and augmentation; true draws one."
_CHECKPOINT = "Checkpoint to take; null takes the newest of run_dir."
# Lightning's settings of a Trainer that most runs touch, and what they do here.
COMMON_TRAINER_OPTIONS = {
    "accelerator": "cpu, gpu, or auto for what there is.",
    "strategy": "auto, ddp, or a class path, such as ours for FSDP2.",
    "devices": "Ranks of each node: a number, GPUs as [0,1], or auto.",
    "num_nodes": "Nodes of the run.",
    "precision": "bf16-mixed (null, if the GPU has it), 32-true, 16-mixed, ...",
    "logger": "Loggers beside ours, by class path.",
    "callbacks": "Callbacks beside ours, by class path.",
    "fast_dev_run": "Try one batch (true) or so many, and keep nothing.",
    "max_steps": "Optimizer steps of the run; fit needs at least 1.",
    "max_time": "Time limit as DD:HH:MM:SS.",
    "limit_val_batches": "Evaluation batches of a rank; null takes all.",
    "val_check_interval": "Steps between two evaluations.",
    "log_every_n_steps": "Steps between two lines of the log.",
    "gradient_clip_val": "Largest norm of all gradients together.",
    "deterministic": "true refuses operations whose result varies.",
}
_TRAINER = "Lightning's Trainer, as far as most runs set it; --help-all has the rest."
_GENERAL = (
    ("-c, --config FILE", "YAML or JSON with settings; of several, later ones count."),
    ("--print_config", "Print the settings that come out, and end."),
    ("-h, --help", "This page."),
    ("--help-all", "Every option at length, with types and classes."),
)
# Commands whose module does not hold the function of their name.
_ELSEWHERE = {
    ("doctor",): ("dist_siglip.doctor.command", "doctor"),
    ("slurm", "render"): ("dist_siglip.cli.slurm", "SlurmJob"),
    ("slurm", "submit"): ("dist_siglip.cli.slurm", "SlurmJob"),
}
_INDENT = 24  # of texts that stand beside options
_COLUMN = 42  # of texts in a page with a line for each option


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
    """A command on a run: where its parts are declared."""

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


def subcommands_of(module: str) -> dict[str, str]:
    """Return the subcommands of a command and a line about each; none if it has none.

    Example:
        >>> list(subcommands_of("dist_siglip.cli.slurm"))
        ['render', 'submit']
    """
    try:
        subcommands = value_of(*find(module, "SUBCOMMANDS"))
    except UnreadableError:
        return {}
    return {name: each if isinstance(each, str) else each[1] for name, each in subcommands.items()}


def module_of(module: str, words: Sequence[str]) -> str:
    """Return the module of a command, or of its subcommand if that has another."""
    if len(words) == 1:
        return module
    module_of_subcommand, _ = value_of(*find(module, "SUBCOMMANDS"))[words[1]]
    return str(module_of_subcommand)


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
    groups += _groups("trainer", find(*_TRAINER_CLASS), changed)
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
            default=REQUIRED
            if by_place and constants.get("nargs") != "*"
            else constants.get("default", False if is_flag else None),
            text=constants.get("help", ""),
            by_place=by_place,
            many=constants.get("nargs") in ("+", "*"),
        )


def _filled_in(cli: Found) -> Iterator[str]:
    """Yield the settings that a command line takes from other settings."""
    for method in methods_of(cli, "add_arguments_to_parser"):
        for (_, target), _ in _calls(method, "link_arguments"):
            yield target


def asked_page(command: str, module: str, summary: str, arguments: Sequence[str]) -> str | None:
    """Return the help page that a command line asks for.

    Returns:
        None if no page is asked for, or the source cannot be read and the parser has to tell.
    """
    own = _own_words(arguments)
    if arguments and "-h" not in own and "--help" not in own:
        return None
    try:
        subcommands = subcommands_of(module)
        if not arguments and not subcommands:
            return None
        if subcommands and (not own or own[0] not in subcommands):
            return _subcommand_page(command, subcommands)
        if subcommands:
            return _page((command, own[0]), module, subcommands[own[0]])
        return _page((command,), module, summary)
    except UnreadableError:
        return None


def check_subcommand(command: str, module: str, arguments: Sequence[str]) -> None:
    """Refuse a word that is no subcommand of the command, before anything heavy is imported."""
    subcommands = subcommands_of(module)
    if (
        subcommands
        and arguments
        and not arguments[0].startswith("-")
        and arguments[0] not in subcommands
    ):
        raise UserError(f"{command} ({arguments[0]}) must be one of {', '.join(subcommands)}")


def for_parser(arguments: Sequence[str]) -> list[str]:
    """Return arguments in which ``--help-all`` is the option by which a parser tells everything.

    Example:
        >>> for_parser(["render", "--help-all", "--", "--help-all"])
        ['render', '--help', '--', '--help-all']
    """
    own = _own_words(arguments)
    own = ["--help" if word == "--help-all" else word for word in own]
    return [*own, *arguments[len(own) :]]


def _own_words(arguments: Sequence[str]) -> list[str]:
    """Words before ``--``, behind which another command's options stand."""
    words = list(arguments)
    return words[: words.index("--")] if "--" in words else words


def _subcommand_page(command: str, subcommands: Mapping[str, str]) -> str:
    """Lay out the subcommands of a command."""
    lines = [f"usage: dist-siglip {command} SUBCOMMAND [options]", ""]
    lines += [f"  {name:<12}{text}" for name, text in subcommands.items()]
    lines += ["", f"dist-siglip {command} SUBCOMMAND --help lists the options of a subcommand.", ""]
    return "\n".join(lines)


def _page(words: tuple[str, ...], module: str, summary: str) -> str:
    """Lay out the page of a command."""
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 80), 120)
    if words in RUNS:
        return _run_page(words, summary, width)
    place = _ELSEWHERE.get(words) or (module_of(module, words), words[-1])
    introduction, groups = options_of_function(find(*place))
    return _function_page(words, introduction, groups, width)


def _function_page(
    words: Sequence[str], introduction: str, groups: Sequence[Group], width: int
) -> str:
    """Lay out all options of a function with their whole texts."""
    placed = [each for each in groups[0].options if each.by_place]
    required = [each for each in groups[0].options if each.default is REQUIRED]
    usage = [*_placed_words(placed)]
    usage += [f"--{each.name} {each.kind}" for each in required if not each.by_place]
    paragraphs = [" ".join(part.split()) for part in introduction.split("\n\n")]
    lines = textwrap.wrap(
        f"usage: {' '.join(['dist-siglip', *words, *usage])} [options]",
        width,
        subsequent_indent=" " * _INDENT,
        break_on_hyphens=False,
    )
    for paragraph in paragraphs:
        lines += ["", *textwrap.wrap(paragraph, width)]
    for group in groups:
        lines += ["", *textwrap.wrap(f"{group.name}: {group.text}" if group.name else "", width)]
        for option in group.options:
            lines += _entry(option, width)
    return "\n".join([*lines, ""])


def _placed_words(options: Sequence[Option]) -> Iterator[str]:
    for each in options:
        name = each.name.upper()
        more = f"{name} [{name} ...]" if each.many else name
        yield more if each.default is REQUIRED else f"[{name} ...]"


def _entry(option: Option, width: int) -> list[str]:
    """Lay out an option, its whole text and its default."""
    head = option.name.upper() if option.by_place else f"--{option.name} {option.kind}".rstrip()
    end = "required" if option.default is REQUIRED else f"default: {shown(option.default)}"
    text = f"{option.text} ({end})" if option.kind else option.text
    lines = textwrap.wrap(" ".join(text.split()), width - _INDENT, break_on_hyphens=False)
    lines = [" " * _INDENT + line for line in lines]
    head = f"  {head}"
    if len(head) <= _INDENT - 2:
        return [head.ljust(_INDENT) + lines[0].strip(), *lines[1:]]
    return [head, *lines]


def _run_page(words: Sequence[str], summary: str, width: int) -> str:
    """Lay out the options of a run in a line each."""
    groups = options_of_run(tuple(words))
    lines = [
        f"usage: dist-siglip {' '.join(words)} [--config FILE] [--OPTION VALUE ...]",
        "",
        f"{' '.join(words)}: {summary}.",
        "Each option stands with its default; in a YAML file its dots are levels.",
        "",
        *(_line(head, text, width) for head, text in _GENERAL),
    ]
    for root, members in groupby(groups, lambda group: group.name.partition(".")[0]):
        group, *inner = members
        options = group.options
        if root == "trainer":
            options = list(_common(options))
            group = group._replace(text=_TRAINER)
        if root:
            lines += ["", *textwrap.wrap(f"{root}: {_first_sentence(group.text)}", width)]
        lines += [_option_line(each, width) for each in options]
        for each in inner:
            if each.like:
                lines.append(_line(f"--{each.name}.*", f"As --{each.like}.*: {each.text}", width))
            else:
                lines += [_option_line(option, width) for option in each.options]
    return "\n".join([*lines, ""])


def _common(options: Sequence[Option]) -> Iterator[Option]:
    """Yield the options of the Trainer that most runs touch, in our words."""
    for each in options:
        name = each.name.partition(".")[2]
        if name in COMMON_TRAINER_OPTIONS:
            yield each._replace(text=COMMON_TRAINER_OPTIONS[name])


def _option_line(option: Option, width: int) -> str:
    default = "(required)" if option.default is REQUIRED else shown(option.default)
    head = f"--{option.name} {default}" if option.kind else f"--{option.name}"
    return _line(head, option.text, width)


def _line(head: str, text: str, width: int) -> str:
    """Lay out one line: an option, and of the first sentence as much as there is room for."""
    start = f"  {head}  ".ljust(_COLUMN)
    room = width - len(start)
    sentence = _first_sentence(text)
    if len(sentence) > room:
        sentence = sentence.partition("; ")[0]
    if len(sentence) > room:
        sentence = f"{sentence[: max(room - 3, 0)].rpartition(' ')[0]} ..."
    return (start + sentence).rstrip()


def _first_sentence(text: str) -> str:
    sentence, dot, _ = " ".join(text.split()).partition(". ")
    return sentence + dot.strip()


def shown(value: Any) -> str:
    """Write a default as YAML has it.

    Example:
        >>> shown(None), shown(True), shown(("jpg", "png")), shown(1e-8)
        ('null', 'true', '[jpg,png]', '1e-08')
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(shown, value))}]"
    return str(value) or '""'
