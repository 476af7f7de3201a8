"""What the project's pages tell a reader to type: shell commands, snippets of Python, links, pictures."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import click

from ernieq.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name not in ("decisions.md", "format.md"))
SHELL = ("sh", "bash", "console")
_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
_SHELL_SYNTAX = re.compile(r"[|<>;&$`]")


@dataclass(frozen=True)
class Snippet:
    """A fenced block of a page: its language (in braces: a directive of the page builder), and its text."""

    page: Path
    language: str
    text: str


def snippets(page: Path) -> list[Snippet]:
    """All fenced blocks of a page, in order."""
    return [
        Snippet(page, language, text) for language, text in _FENCE.findall(page.read_text(encoding="utf-8"))
    ]


def command_lines(text: str) -> list[str]:
    """The commands of a shell block: lines that go on behind a backslash are joined, prompts are cut off."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").strip() for line in lines if line.strip() and not line.startswith("#")]


def needs_a_shell(line: str) -> bool:
    """Whether a line has pipes or the like outside of quotes."""
    return bool(_SHELL_SYNTAX.search(re.sub(r"'[^']*'|\"[^\"]*\"", "", line)))


def commands(page: Path, program: str) -> list[list[str]]:
    """Arguments of every line in a shell block of a page that calls a program, a pipe's parts one by one."""
    lines = [
        part
        for snippet in snippets(page)
        if snippet.language in SHELL
        for line in command_lines(snippet.text)
        for part in (line.split(" | ") if needs_a_shell(line) else [line])
    ]
    split = [shlex.split(re.split(r" >>? ", line)[0], comments=True) for line in lines]
    return [words[1:] for words in split if words and words[0] == program]


def parse_without_running(arguments: list[str]) -> None:
    """Raise click's error if the command line does not know these arguments.

    Only parsed: no callback runs and no path needs to exist; option values are checked unless they name files.
    """
    group_context = click.Context(main, info_name="ernieq")
    _, left_over, _ = main.make_parser(group_context).parse_args(args=list(arguments))
    if not left_over:
        return  # options of ernieq itself, such as --version
    name, *rest = left_over
    command = main.get_command(group_context, name)
    assert command is not None, f"a page names a command {name} that does not exist"
    context = click.Context(command, info_name=name, parent=group_context)
    values, left_over, _ = command.make_parser(context).parse_args(args=rest)
    assert left_over == [], f"{name} takes no {left_over}"
    for parameter in command.get_params(context):
        value = values.get(parameter.name or "")
        if isinstance(value, str) and not isinstance(parameter.type, click.Path | click.File):
            parameter.type.convert(value, parameter, context)


def links(page: Path) -> list[str]:
    """Targets of all links and pictures of a page that lie in the project, without their anchors."""
    found = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def pictures(page: Path) -> list[tuple[str, str]]:
    """Alternative text and target of every picture of a page."""
    return re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
