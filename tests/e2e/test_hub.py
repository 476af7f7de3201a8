"""The command line and the hub's real client, against a hub on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import LocalHub
from tests.pack.packed_model import pack_model, source_model
from tests.tiny import write_tokenizer

UNWANTED = ("pytorch_model.bin", "model.gguf", "modeling_ernie4_5.py", "extra.safetensors", "notes.txt")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    directory = tmp_path_factory.mktemp("hub")
    pack_model(source_model(directory / "source"), directory / "packed")
    write_tokenizer(directory / "source", 64)
    shutil.copytree(directory / "source", directory / "gated")
    for name in UNWANTED:
        (directory / "source" / name).write_bytes(b"not wanted")
    (directory / "packed" / "README.md").write_text("# A model card\n")
    (directory / "packed" / "notes.txt").write_bytes(b"not wanted")
    repositories = {f"org/{name}": directory / name for name in ("source", "packed", "gated")}
    with LocalHub(repositories, gated={"org/gated"}).running() as hub:
        yield hub


@pytest.fixture
def ernieq(hub: LocalHub, tmp_path: Path) -> Ernieq:
    hub.sent.clear()
    return Ernieq(hub, tmp_path)


class Ernieq:
    """Runs the program in a process of its own: the client reads its settings when it is imported."""

    def __init__(self, hub: LocalHub, directory: Path) -> None:
        self._directory = directory
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        self.environment = kept | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(directory / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ernieq.cli", *arguments],
            cwd=self._directory,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )


def test_a_packed_checkpoint_is_fetched_whole_and_nothing_else(ernieq: Ernieq, hub: LocalHub) -> None:
    verified = ernieq("verify", "org/packed", "--json")
    assert verified.returncode == 0, verified.stderr
    packed = hub.repositories["org/packed"]
    kept_there = ("notes.txt", "README.md")
    wanted = {path.name: path.stat().st_size for path in packed.iterdir() if path.name not in kept_there}
    assert hub.sent == wanted
    hub.sent.clear()
    exported = ernieq("export", "org/packed", "--out", "plain")
    assert exported.returncode == 0, exported.stderr
    assert hub.sent == {}  # all of it is in the cache


@pytest.mark.parametrize(
    ("arguments", "repository"),
    [(("inspect",), "packed"), (("quantize", "--bits", "2", "--dry-run"), "source")],
)
def test_who_looks_at_headers_only_fetches_no_weights(
    ernieq: Ernieq, hub: LocalHub, arguments: tuple[str, ...], repository: str
) -> None:
    found = ernieq(*arguments, f"org/{repository}", "--json")
    assert found.returncode == 0, found.stderr
    local = ernieq(*arguments, str(hub.repositories[f"org/{repository}"]), "--json")
    assert same_but_for_names(found.stdout) == same_but_for_names(local.stdout)
    for file in hub.repositories[f"org/{repository}"].glob("model*.safetensors"):
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert hub.sent[file.name] == header < file.stat().st_size
    assert not set(UNWANTED) & set(hub.sent)


def same_but_for_names(output: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(output)
    return found | {"path": "", "out": "", "seconds": 0}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("verify", "org/none"), "has no such repository that you may read: check the id"),
        (("generate", "org/gated", "Once"), "is gated: ask for access on"),
        (
            ("quantize", "org/source", "--revision", "v9"),
            "has no revision 'v9'; name a branch, a tag or a commit",
        ),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(ernieq: Ernieq, arguments: tuple[str, ...], words: str) -> None:
    refused = ernieq(*arguments)
    assert refused.returncode == 3
    assert refused.stderr.count("\n") == 1
    assert words in refused.stderr


def test_what_is_pushed_is_what_the_directory_holds(ernieq: Ernieq, hub: LocalHub) -> None:
    directory = hub.repositories["org/packed"]
    ernieq.environment["HF_TOKEN"] = "hf_of_a_test"
    pushed = ernieq("push", str(directory), "org/pushed", "--revision", "first")
    assert pushed.returncode == 0, pushed.stderr
    assert "hf_of_a_test" not in pushed.stdout + pushed.stderr
    (revision, files), *others = hub.commits
    assert (revision, others) == ("first", [])
    assert files == {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "notes.txt"}


def test_a_hub_that_does_not_answer_is_one_sentence(ernieq: Ernieq) -> None:
    ernieq.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"  # the discard port: nobody listens
    refused = ernieq("verify", "org/packed")
    assert refused.returncode == 3
    assert refused.stderr.count("\n") == 1
    assert "the hub can't be reached; connect to the network, or name a local directory" in refused.stderr
