"""Configurations are read within bounds, from files only, and no key is lost; one line each."""

import os

import pytest

from dist_siglip.cli import EXIT_USER_ERROR, main
from dist_siglip.cli.parser import CommandParser
from dist_siglip.errors import UserError

BOMB = "a0: &a0 [1, 1]\n" + "\n".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))


@pytest.fixture
def parser():
    made = CommandParser(prog="test")
    made.add_argument("--config", action="config")
    made.add_argument("--name", type=str, default="")
    made.add_argument("--data.seed", type=int)
    return made


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"name: a\ndata: {seed: 1}\nname: b\n", r"key name stands twice \(lines 1 and 3\); keep"),
        (b"data:\n  seed: 1\n  seed: 1\n", r"key data\.seed stands twice \(lines 2 and 3\)"),
        (BOMB.encode(), "repeats more than 10,000 values by name"),
        (b"name: \xff", "is no text in UTF-8"),
        (b"name: " + b"[" * 100, "nested deeper"),
    ],
)
def test_a_configuration_that_must_not_be_read_is_named(parser, tmp_path, content, told):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=told) as error:
        parser.parse_args(["--config", str(path)])
    assert f"config ({path})" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_ends_with_code_2_and_one_line(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("data:\n  global_batch_size: 8\n  global_batch_size: 16\n")
    assert main(["fit", "--config", str(path)]) == EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert said == (
        f"dist-siglip: error: config ({path}): key data.global_batch_size stands twice (lines 2 "
        "and 3); keep one\n"
    )


def test_a_pipe_is_not_waited_for_unless_a_shell_made_it(parser, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a pipe, not a regular file"):
        parser.parse_args(["--config", str(tmp_path / "pipe")])
    reading, writing = os.pipe()
    os.write(writing, b"name: from a shell\n")
    os.close(writing)
    try:
        assert parser.parse_args(["--config", f"/dev/fd/{reading}"]).name == "from a shell"
    finally:
        os.close(reading)


def test_values_of_options_are_read_likewise(parser):
    with pytest.raises(UserError, match="value of an option: key a stands twice"):
        parser.parse_args(["--name", "{a: 1, a: 2}"])
    for value in ("a: b: c", "2001-99-99", "9" * 5000, "x\udcffy: z"):
        assert parser.parse_args(["--name", value]).name == value


def test_a_later_configuration_still_replaces_keys_of_an_earlier_one(parser, tmp_path):
    for number in (1, 2):
        (tmp_path / f"{number}.yaml").write_text(f"data: {{seed: {number}}}\n")
    given = ["--config", str(tmp_path / "1.yaml"), "--config", str(tmp_path / "2.yaml")]
    assert parser.parse_args(given).data.seed == 2
