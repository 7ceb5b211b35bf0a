"""YAML is read within bounds, and no key is lost."""

import random
from pathlib import Path

import pytest
import yaml

from dist_siglip.system import yaml_text
from dist_siglip.system.yaml_text import RefusedYamlError, check_yaml, load_yaml

CONFIGS = sorted(Path(__file__).parents[2].glob("configs/*.yaml"))


def bomb(levels, width=9):
    """A few hundred bytes that stand for width ** levels values."""
    lines = [f"a0: &a0 [{', '.join('1' * width)}]"]
    lines += [
        f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]"
        for level in range(1, levels)
    ]
    return "\n".join(lines)


def merges(levels, width=9):
    lines = ["a0: &a0 {k: 1}"]
    lines += [
        f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * width)}]}}"
        for level in range(1, levels)
    ]
    return "\n".join(lines)


@pytest.mark.parametrize("text", [bomb(9), bomb(300, 2), merges(9)])
def test_names_for_names_are_bounded(text):
    with pytest.raises(RefusedYamlError, match="repeats more than 10,000 values by name"):
        load_yaml(text)


@pytest.mark.parametrize("text", ["[" * 3000, "{a: " * 65, "- " * 5000, "a: &a [*a]", "a: *b"])
def test_depth_and_loops_are_refused(text):
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: 2\na: 3", r"key a stands twice \(lines 1 and 3\)"),
        ("a:\n  b:\n    c: 1\n    d: {}\n    c: 2", r"key a\.b\.c stands twice \(lines 3 and 5\)"),
        ("a:\n- x: 1\n- x: 1\n  x: 2", r"key a\.x stands twice \(lines 3 and 4\)"),
        ("a: {b: [1], b: {}}", r"key a\.b stands twice \(lines 1 and 1\)"),
        ("a: 1\n'a': 2", r"key a stands twice"),
        ("a: &x {k: 1}\nb: *x\n*x : 3\nb: 1", r"key b stands twice \(lines 2 and 4\)"),
    ],
)
def test_a_key_that_stands_twice_is_named(text, told):
    with pytest.raises(RefusedYamlError, match=told):
        check_yaml(text)


def test_what_is_sound_is_read_as_ever():
    texts = [path.read_text() for path in CONFIGS]
    texts += [
        "a: &x {k: 1, l: 2}\nb: {<<: *x, k: 3}\nc:\n  <<: *x\n  <<: {m: 1}",
        "a: {b: 1}\nc: {b: 1}\nd: [{b: 1}, {b: 1}]",
        "",
        "text",
        "{1: a, 2: b, null: c}",
        bomb(3),
        "classes:\n" + "\n".join(f"- a {n}" for n in range(50_000)),
    ]
    assert len(CONFIGS) > 5
    for text in texts:
        assert load_yaml(text) == yaml.load(text, Loader=yaml_text._LOADER)


@pytest.mark.parametrize(
    "text",
    ["a: 2001-99-99", "a: !!bool x", "a: !!int ''", "1" * 5000, "\0", "a: !!timestamp 1", "!x a"],
)
def test_a_value_that_is_not_what_it_looks_like_is_one_kind_of_error(text):
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)


def test_no_text_gets_past_the_reader():
    """Whatever is put together from YAML's own signs is read or refused."""
    draw = random.Random(6)
    signs = [
        "a",
        "1",
        ": ",
        "- ",
        "\n",
        "  ",
        "[",
        "]",
        "{",
        "}",
        ",",
        "&x ",
        "*x",
        "<<: ",
        "!!set ",
    ]
    signs += ["'", '"', "| ", "? ", "---\n", "%", "#", "!!float ", "0x", "1:2", ".inf", "\ud800"]
    outcomes = set()
    for _ in range(3000):
        text = "".join(draw.choices(signs, k=draw.randint(1, 30)))
        try:
            load_yaml(text)
        except yaml.YAMLError:
            outcomes.add("refused")
        else:
            outcomes.add("read")
    assert outcomes == {"refused", "read"}
