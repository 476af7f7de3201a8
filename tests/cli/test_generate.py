"""``ernieq generate``: prompts from arguments and stdin, pieces as they come, one JSON object."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ernieq.cli import main
from ernieq.cli.generate import _prompts
from ernieq.errors import UsageError

TinyFactory = Callable[..., Path]
QUICK = ("--max-tokens", "6", "--temperature", "0", "--threads", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import write_tiny

    return write_tiny(tmp_path_factory.mktemp("model") / "tiny")


def generate(model: Path, *arguments: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, ["generate", str(model), *arguments, *QUICK], input=stdin)


def completion(model: Path, prompt: str) -> str:
    result = generate(model, prompt)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_prompt_comes_from_stdin_without_its_last_line_end_if_none_is_given(model: Path) -> None:
    expected = completion(model, "w5 w6")
    assert expected.strip()
    assert generate(model, stdin="w5 w6\n").stdout == expected
    assert generate(model, "-", stdin="w5 w6").stdout == expected


def test_stdin_is_not_read_if_a_prompt_is_given(model: Path) -> None:
    assert generate(model, "w5 w6", stdin="w9 w9").stdout == completion(model, "w5 w6")


def test_several_prompts_are_completed_each_as_if_it_were_alone(model: Path) -> None:
    first, second = completion(model, "w5 w6"), completion(model, "w9")
    assert first != second
    result = generate(model, "w5 w6", "-", stdin="w9")
    assert result.stdout == f"==> w5 w6\n{first}==> w9\n{second}"
    assert result.stderr.count("tokens/s") == 2


def test_json_holds_what_the_plain_output_shows_and_the_options(model: Path) -> None:
    result = generate(model, "w5 w6", "w9", "--seed", "3", "--json")
    found = json.loads(result.stdout)
    assert [record["prompt"] for record in found["completions"]] == ["w5 w6", "w9"]
    for record in found["completions"]:
        assert record["text"] + "\n" == completion(model, record["prompt"])
        assert record["tokens"] == 6
        assert record["tokens_per_second"] > 0
        assert record["seconds_to_first_token"] > 0
    assert (found["options"]["seed"], found["options"]["max_tokens"]) == (3, 6)
    assert result.stderr == ""


def test_json_tells_no_speed_of_a_single_token(model: Path) -> None:
    result = CliRunner().invoke(
        main, ["generate", str(model), "w5", "--max-tokens", "1", "--threads", "1", "--device", "cpu", "--json"]
    )
    (record,) = json.loads(result.stdout)["completions"]
    assert (record["tokens"], record["tokens_per_second"]) == (1, None)


def test_pieces_are_written_as_they_come(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    seen_when_asked_for_more: list[list[str]] = []

    def pieces(*_arguments: object, **_options: object) -> object:
        for piece in ("one ", "two "):
            yield piece
            seen_when_asked_for_more.append(list(written))

    monkeypatch.setattr("ernieq.generate.generate_text", pieces)
    monkeypatch.setattr(
        "ernieq.cli.generate.click.echo", lambda text="", **_options: written.append(text) if text else None
    )
    generate(model, "w5")
    assert seen_when_asked_for_more == [["one "], ["one ", "two "]]


def test_stdin_that_is_no_text_is_refused_in_one_sentence(model: Path) -> None:
    result = generate(model, stdin=b"w5 \xff")
    assert (result.exit_code, result.stdout) == (4, "")
    assert result.stderr == "Error: stdin is not UTF-8: invalid start byte at byte 3\n"


def test_stdin_can_t_be_two_prompts(model: Path) -> None:
    result = generate(model, "-", "-", stdin="w5")
    assert result.exit_code == 2
    assert "can be read once" in result.stderr


def test_a_terminal_is_not_waited_for_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal(io.BytesIO(b"typed\n")))
    with pytest.raises(UsageError, match="there is no prompt"):
        _prompts(())
    assert _prompts(("-",)) == ["typed"]
