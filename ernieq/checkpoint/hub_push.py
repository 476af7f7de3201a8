"""A checkpoint to the Hugging Face hub: one commit that holds the named files and nothing else.

Who pushes is whoever is logged in (``hf auth login``, or HF_TOKEN in the environment); the token is neither
stored nor printed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ernieq.checkpoint.hub import looks_like_hub_id
from ernieq.errors import CheckpointError, UsageError

_Result = TypeVar("_Result")
_REFUSED = (401, 403)


@dataclass(frozen=True)
class PushedCommit:
    """What the hub has now: the repository's id, the branch, the commit, and where to look at it."""

    repository: str
    revision: str
    commit: str
    url: str


def require_login() -> None:
    """Say at once that nobody is logged in, before anything is checked or sent.

    Raises:
        UsageError: no token is stored or in the environment.
    """
    if huggingface_hub.get_token() is None:
        raise UsageError("nobody is logged in to the hub: run `hf auth login` or set HF_TOKEN")


def push_files(
    directory: Path,
    names: Sequence[str],
    repository: str,
    *,
    replaced: Mapping[str, bytes] | None = None,
    private: bool = False,
    revision: str | None = None,
    message: str,
) -> PushedCommit:
    """Make the repository if there is none, and commit files to it.

    Args:
        directory: where the files are.
        names: files to send.
        repository: ``user/name``.
        replaced: contents that are sent in place of a file's own.
        private: the repository is to be seen by its owner only.
        revision: branch, made if there is none; the main branch if None.
        message: of the commit.

    Raises:
        UsageError: the id is malformed, or the repository is public and is to be private.
        CheckpointError: the hub refuses, or can't be reached.
    """
    if not looks_like_hub_id(repository):
        raise UsageError(f"{repository} is no id of the hub; user/name is needed")
    api = huggingface_hub.HfApi(library_name="ernieq")
    _asked(lambda: api.create_repo(repository, private=private or None, exist_ok=True), repository)
    if private and not _asked(lambda: api.repo_info(repository), repository).private:
        raise UsageError(f"{repository} is there and public; leave out --private, or make it private first")
    if revision is not None:
        _asked(lambda: api.create_branch(repository, branch=revision, exist_ok=True), repository)
    contents = replaced or {}
    operations = [
        huggingface_hub.CommitOperationAdd(name, contents.get(name, str(directory / name))) for name in names
    ]
    commit = _asked(
        lambda: api.create_commit(repository, operations, commit_message=message, revision=revision), repository
    )
    return PushedCommit(repository, revision or "main", commit.oid, commit.commit_url)


def _asked(call: Callable[[], _Result], repository: str) -> _Result:
    try:
        return call()
    except HFValidationError as error:
        raise UsageError(f"{repository} is no id of the hub: {_first_line(error)}") from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in _REFUSED:
            raise CheckpointError(
                f"the hub does not let you write to {repository}: use a token with write access to that user "
                "or organisation (`hf auth login`, or HF_TOKEN)"
            ) from error
        raise CheckpointError(f"the hub refuses {repository}: {_first_line(error)}") from error
    except Exception as error:  # the HTTP client and the transfer backend share no base class
        raise CheckpointError(f"{repository} can't be sent to the hub: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
