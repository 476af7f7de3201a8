"""``ernieq push`` against a pretended hub: what is sent, and what is refused before anything is."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from click.testing import CliRunner, Result
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ernieq.cli import main
from tests.pack.packed_model import pack_model, source_model

TOKEN = "hf_secret_of_a_test"
SIGNATURES = {
    call: inspect.signature(getattr(huggingface_hub.HfApi, call))
    for call in ("create_repo", "repo_info", "create_branch", "create_commit")
}


class FakeApi:
    """Remembers what it was asked for; ``refusal`` is raised by the call that it names."""

    refusal: tuple[str, Exception] | None = None
    public = False
    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self, **_: Any) -> None:
        pass

    def _note(self, call: str, **details: Any) -> None:
        arguments = {
            name: value for name, value in details.items() if name not in ("repository", "sent", "message")
        }
        SIGNATURES[call].bind_partial(None, "user/name", **arguments)
        FakeApi.calls.append((call, details))
        if FakeApi.refusal and FakeApi.refusal[0] == call:
            raise FakeApi.refusal[1]

    def create_repo(self, repository: str, *, private: bool | None, exist_ok: bool) -> None:
        self._note("create_repo", repository=repository, private=private, exist_ok=exist_ok)

    def repo_info(self, repository: str) -> Any:
        self._note("repo_info")
        return SimpleNamespace(private=not FakeApi.public)

    def create_branch(self, repository: str, *, branch: str, exist_ok: bool) -> None:
        self._note("create_branch", branch=branch, exist_ok=exist_ok)

    def create_commit(
        self, repository: str, operations: list[Any], *, commit_message: str, revision: str | None
    ) -> Any:
        sent = {}
        for operation in operations:
            content = operation.path_or_fileobj
            sent[operation.path_in_repo] = content if isinstance(content, bytes) else Path(content).read_bytes()
        self._note("create_commit", sent=sent, message=commit_message, revision=revision)
        return SimpleNamespace(oid="c0ffee", commit_url=f"https://huggingface.co/{repository}/commit/c0ffee")


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    FakeApi.calls, FakeApi.refusal, FakeApi.public = [], None, False
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    return FakeApi


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("push")
    pack_model(source_model(directory / "source"), directory / "packed")
    (directory / "packed" / "README.md").write_text("# A card\n")
    return directory / "packed"


@pytest.fixture
def packed(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "packed"))


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(main, ["push", *(str(argument) for argument in arguments)])
    assert TOKEN not in result.output
    return result


def test_weights_manifest_tokenizer_and_card_are_sent_in_one_commit(api: type[FakeApi], packed: Path) -> None:
    (packed / "notes.txt").write_text("mine")
    result = run(packed, "user/name", "--json")
    assert result.exit_code == 0, result.output
    assert [call for call, _ in api.calls] == ["create_repo", "create_commit"]
    assert api.calls[0][1] == {"repository": "user/name", "private": None, "exist_ok": True}
    sent = api.calls[1][1]["sent"]
    assert set(sent) == {path.name for path in packed.iterdir()} - {"notes.txt"}
    assert all(sent[name] == (packed / name).read_bytes() for name in sent)
    report = json.loads(result.stdout)
    assert (report["repository"], report["revision"], report["commit"]) == ("user/name", "main", "c0ffee")
    assert report["nbytes"] == sum(len(content) for content in sent.values())


def test_the_card_says_how_to_load_from_the_hub(api: type[FakeApi], packed: Path) -> None:
    from ernieq.report import model_card

    card = model_card(name="packed", base="b", recipe={}, parts=[], output_bytes=1, bits_per_weight=2.0)
    (packed / "README.md").write_text(card)
    assert run(packed, "user/name").exit_code == 0
    sent = api.calls[-1][1]["sent"]["README.md"].decode()
    assert 'ernieq.load_model("user/name")' in sent
    assert "ernieq generate user/name" in sent
    assert (packed / "README.md").read_text() == card


def test_private_revision_and_message_reach_the_hub(api: type[FakeApi], packed: Path) -> None:
    result = run(packed, "user/name", "--private", "--revision", "2bit", "--message", "First")
    assert result.exit_code == 0, result.output
    assert [call for call, _ in api.calls] == ["create_repo", "repo_info", "create_branch", "create_commit"]
    assert api.calls[0][1]["private"] is True
    assert api.calls[2][1] == {"branch": "2bit", "exist_ok": True}
    assert (api.calls[3][1]["message"], api.calls[3][1]["revision"]) == ("First", "2bit")


def test_nothing_private_is_sent_to_a_public_repository(api: type[FakeApi], packed: Path) -> None:
    api.public = True
    result = run(packed, "user/name", "--private")
    assert (result.exit_code, "is there and public" in result.output) == (2, True)
    assert "create_commit" not in [call for call, _ in api.calls]


def test_a_checkpoint_that_is_damaged_or_none_is_not_sent(api: type[FakeApi], packed: Path) -> None:
    shard = next(packed.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    assert run(packed, "user/name").exit_code == 6
    assert run(packed.parent / "missing", "user/name").exit_code == 6
    (packed / "README.md").unlink()
    result = run(packed, "user/name")
    assert (result.exit_code, "has no model card" in result.output) == (6, True)
    assert api.calls == []


def test_without_a_login_nothing_is_tried(
    api: type[FakeApi], packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    result = run(packed, "user/name")
    assert (result.exit_code, "run `hf auth login` or set HF_TOKEN" in result.output) == (2, True)
    assert api.calls == []


def refusal(status: int) -> HfHubHTTPError:
    answer: Any = SimpleNamespace(headers={}, request=None, status_code=status)
    return HfHubHTTPError(f"{status} Error\nmore", response=answer)


@pytest.mark.parametrize(
    ("call", "error", "code", "words"),
    [
        ("create_repo", refusal(403), 3, "use a token with write access"),
        ("create_commit", refusal(401), 3, "use a token with write access"),
        ("create_commit", refusal(500), 3, "the hub refuses user/name: 500 Error"),
        ("create_repo", HFValidationError("bad id\nmore"), 2, "user/name is no id of the hub: bad id"),
        ("create_repo", ConnectionError("no route"), 3, "can't be sent to the hub: no route"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    api: type[FakeApi], packed: Path, call: str, error: Exception, code: int, words: str
) -> None:
    api.refusal = (call, error)
    result = run(packed, "user/name")
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert "more" not in result.stderr


@pytest.mark.parametrize("repository", ["name", "a/b/c", "../name", "user/"])
def test_an_id_that_is_none_is_refused(api: type[FakeApi], packed: Path, repository: str) -> None:
    result = run(packed, repository)
    assert (result.exit_code, "user/name is needed" in result.output) == (2, True)
    assert api.calls == []
