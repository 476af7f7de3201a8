"""Every command and snippet of docs/ runs: the tutorial, then each other page beside what it has left.

Commands run in this process, made quick as those of the README are; those with pipes run in a shell, where a
script called ``ernieq`` makes them quick. What can't run in a test stands in ``NOT_RUN``, with its reason.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ernieq.cli import main
from ernieq.convert import read_recipe
from tests.documents import PAGES, ROOT, SHELL, Snippet, command_lines, needs_a_shell, snippets
from tests.e2e.quick import THREADS, prepared, write_sources

TUTORIAL = ROOT / "docs" / "tutorial.md"
# Part of a line -> why it does not run here. A line of ernieq's is still parsed (tests/test_documents.py).
NOT_RUN = {
    "make install": "is how these tests were set up",
    ".venv/bin/activate": "names the environment that these tests run in",
    "pip install torch": "fetches torch from the network",
    "pip install vllm": "fetches vLLM from the network; make test-vllm does",
    "vllm serve": "needs vLLM, which make test-vllm serves with",
    "curl http://localhost:8000": "asks that server",
    ">> ~/.bashrc": "writes to the user's home",
}
SCRIPT = """#!{python}
import sys
from pathlib import Path

sys.path.insert(0, {root!r})
from ernieq.cli import main
from tests.e2e.quick import prepared

main(prepared(sys.argv[1:], Path({place!r})), prog_name="ernieq")
"""


def reason_not_to_run(line: str) -> str | None:
    return next((reason for part, reason in NOT_RUN.items() if part in line), None)


def run_command(arguments: list[str], place: Path) -> None:
    """Run a command of ernieq's in this process."""
    result = CliRunner().invoke(main, prepared(arguments, place), catch_exceptions=False)
    assert result.exit_code == 0, f"ernieq {' '.join(arguments)}: {result.output}"
    assert result.stdout.strip(), f"ernieq {' '.join(arguments)} prints nothing"


def run_in_shell(line: str, place: Path) -> None:
    """Run a line with pipes or redirections."""
    script = place / "bin" / "ernieq"
    script.parent.mkdir(exist_ok=True)
    script.write_text(SCRIPT.format(python=sys.executable, root=str(ROOT), place=str(place)))
    script.chmod(0o755)
    environment = {**os.environ, "PATH": f"{script.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        cwd=place,
        env={**environment, "OMP_NUM_THREADS": str(THREADS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{line}: {done.stderr}"


def run_line(line: str, place: Path) -> None:
    if reason_not_to_run(line):
        return
    if needs_a_shell(line):
        run_in_shell(line, place)
        return
    program, *arguments = shlex.split(line, comments=True)
    assert program == "ernieq", f"{line!r} is no command of ernieq's, and NOT_RUN does not say why it can't run"
    run_command(arguments, place)


def run_snippet(snippet: Snippet, place: Path, names: dict[str, object]) -> None:
    """Run a snippet: commands, or Python in the page's own namespace; write a recipe where commands find it."""
    if snippet.language in SHELL:
        for line in command_lines(snippet.text):
            run_line(line, place)
    elif snippet.language == "python":
        exec(compile(snippet.text, str(snippet.page), "exec"), names)
    elif snippet.language == "toml":
        (place / "recipe.toml").write_text(snippet.text)
        read_recipe(place / "recipe.toml", None, {})
    else:
        known = snippet.language == "text" or snippet.language.startswith("{")
        assert known, f"{snippet.page.name} has a block of {snippet.language!r}"


def run_page(page: Path, place: Path) -> None:
    names: dict[str, object] = {"__name__": page.stem}
    before = Path.cwd()
    os.chdir(place)
    try:
        for snippet in snippets(page):
            run_snippet(snippet, place, names)
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tutorial was followed."""
    place = tmp_path_factory.mktemp("tutorial")
    write_sources(place)
    run_page(TUTORIAL, place)
    return place


def test_the_tutorial_leaves_what_it_tells_of(followed: Path) -> None:
    assert {path.name for path in followed.iterdir()} >= {
        "ernieq-nano-2bit",
        "ernieq-nano-2bit-decoded",
        "ernieq-nano-5mb",
        "completion.json",
    }


@pytest.mark.parametrize("page", [page for page in PAGES if page != TUTORIAL], ids=lambda page: page.stem)
def test_every_command_and_snippet_of_a_page_runs(page: Path, followed: Path, tmp_path: Path) -> None:
    for name in ("hub", "words.txt", "ernieq-nano-2bit"):
        (tmp_path / name).symlink_to(followed / name)
    run_page(page, tmp_path)


def test_every_reason_not_to_run_is_needed() -> None:
    lines = [
        line
        for page in PAGES
        for snippet in snippets(page)
        if snippet.language in SHELL
        for line in command_lines(snippet.text)
    ]
    assert {part for part in NOT_RUN if not any(part in line for line in lines)} == set()
