"""Help pages that appear at once: laid out from the options that the source declares."""

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from dist_siglip.cli.help.declared_options import (
    REQUIRED,
    RUNS,
    Group,
    Option,
    module_of,
    options_of_function,
    options_of_run,
    subjects_of,
)
from dist_siglip.cli.help.source_reading import UnreadableError, find
from dist_siglip.errors import UserError

# Lightning's settings of a Trainer that most runs touch, and what they do here.
COMMON_TRAINER_OPTIONS = {
    "accelerator": "cpu, gpu, or auto for what there is.",
    "strategy": "auto, ddp, or a class path, such as ours for FSDP2.",
    "devices": "Ranks of each node: a number, GPUs as [0,1], or auto.",
    "num_nodes": "Nodes of the run.",
    "precision": "32-true (null), bf16-mixed, 16-mixed, ...",
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


def asked_page(command: str, module: str, summary: str, arguments: Sequence[str]) -> str | None:
    """Return the help page that a command line asks for.

    Args:
        command: one that there is.
        module: the module behind it.
        summary: one line about it.
        arguments: what follows it.

    Returns:
        None if no page is asked for, or the source cannot be read and the parser has to tell.
    """
    own = _own_words(arguments)
    if arguments and "-h" not in own and "--help" not in own:
        return None
    try:
        subjects = subjects_of(module)
        if not arguments and not subjects:
            return None
        if subjects and (not own or own[0] not in subjects):
            return _subject_page(command, subjects)
        if subjects:
            return _page((command, own[0]), module, subjects[own[0]])
        return _page((command,), module, summary)
    except UnreadableError:
        return None


def check_subject(command: str, module: str, arguments: Sequence[str]) -> None:
    """Refuse a word that is no subject of the command, before anything heavy is imported.

    Raises:
        UserError: with the subjects there are.
    """
    subjects = subjects_of(module)
    if subjects and arguments and not arguments[0].startswith("-") and arguments[0] not in subjects:
        raise UserError(f"{command} ({arguments[0]}) must be one of {', '.join(subjects)}")


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


def _subject_page(command: str, subjects: Mapping[str, str]) -> str:
    """Lay out the subjects of a command."""
    lines = [f"usage: dist-siglip {command} SUBJECT [options]", ""]
    lines += [f"  {name:<12}{text}" for name, text in subjects.items()]
    lines += ["", f"dist-siglip {command} SUBJECT --help lists the options of a subject.", ""]
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
        yield f"{name} [{name} ...]" if each.many else name


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
