"""What the README tells a reader to type can be typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from ernieq.cli import main

ROOT = Path(__file__).resolve().parent.parent


def readme_commands(program: str) -> list[list[str]]:
    """Arguments of every line in a shell block of the README that calls a program."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words[1:] for words in lines if words and words[0] == program]


def parse_without_running(arguments: list[str]) -> None:
    """Raise click's error if the command line does not know these arguments.

    Only parsed: no callback runs and no path needs to exist; option values are checked unless they name files.
    """
    name, *rest = arguments
    group_context = click.Context(main, info_name="ernieq")
    command = main.get_command(group_context, name)
    assert command is not None, f"the README names a command {name} that does not exist"
    context = click.Context(command, info_name=name, parent=group_context)
    values, left_over, _ = command.make_parser(context).parse_args(args=rest)
    assert left_over == [], f"{name} takes no {left_over}"
    for parameter in command.get_params(context):
        value = values.get(parameter.name or "")
        if isinstance(value, str) and not isinstance(parameter.type, click.Path | click.File):
            parameter.type.convert(value, parameter, context)


@pytest.mark.parametrize("arguments", readme_commands("ernieq"), ids=" ".join)
def test_every_command_line_of_the_readme_is_understood(arguments: list[str]) -> None:
    parse_without_running(arguments)


def test_an_option_that_no_command_has_would_be_found() -> None:
    with pytest.raises(click.NoSuchOption):
        parse_without_running(["verify", "somewhere", "--no-such-option"])


def test_every_command_stands_in_the_readme() -> None:
    told = {arguments[0] for arguments in readme_commands("ernieq")}
    assert set(main.list_commands(click.Context(main))) - told == set()


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(
        re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    told = {arguments[0] for arguments in readme_commands("make")}
    assert told
    assert told <= targets


def test_every_local_link_of_the_readme_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    local = [link for link in links if not link.startswith("http")]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []
