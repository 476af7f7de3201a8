"""What the README and the pages of docs/ tell a reader to type can be typed; their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from ernieq.cli import main
from tests.documents import PAGES, README, ROOT, commands, links, parse_without_running, pictures

DOCUMENTS = [README, *PAGES]
ALL_COMMANDS = [arguments for document in DOCUMENTS for arguments in commands(document, "ernieq")]


@pytest.mark.parametrize("arguments", ALL_COMMANDS, ids=" ".join)
def test_every_command_line_of_a_page_is_understood(arguments: list[str]) -> None:
    parse_without_running(arguments)


def test_an_option_that_no_command_has_would_be_found() -> None:
    with pytest.raises(click.NoSuchOption):
        parse_without_running(["verify", "somewhere", "--no-such-option"])


def test_every_command_stands_in_the_readme_or_a_page() -> None:
    told = {arguments[0] for arguments in ALL_COMMANDS}
    assert set(main.list_commands(click.Context(main))) - told == set()


def test_every_make_target_of_a_page_exists() -> None:
    targets = set(
        re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    told = {arguments[0] for document in DOCUMENTS for arguments in commands(document, "make")}
    assert told
    assert told <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_every_local_link_leads_somewhere(document: Path) -> None:
    assert [link for link in links(document) if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_every_picture_is_told_in_words(document: Path) -> None:
    assert [target for words, target in pictures(document) if len(words) < 20] == []


def test_the_reference_lists_every_public_package() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\.\. automodule:: ernieq\.(\w+)$", page, flags=re.MULTILINE))
    packages = {path.parent.name for path in (ROOT / "ernieq").glob("*/__init__.py")} - {"cli"}
    assert packages - listed == set()
