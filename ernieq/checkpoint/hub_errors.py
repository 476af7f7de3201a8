"""What the Hugging Face hub refuses, in one sentence that says what to do."""

from __future__ import annotations

from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def hub_sentence(error: Exception, repository: str, revision: str | None = None) -> str:
    """A sentence for what a call of huggingface_hub raised; it never holds a token.

    Args:
        error: what was raised.
        repository: ``organisation/name``.
        revision: what was asked for, if it was.
    """
    match error:
        case GatedRepoError():
            return (
                f"{repository} is gated: ask for access on https://huggingface.co/{repository}, then {_LOG_IN}"
            )
        case RepositoryNotFoundError():
            return (
                f"{repository} is no directory here, and the hub has no such repository that you may read: "
                f"check the id; if it is private, {_LOG_IN}"
            )
        case RevisionNotFoundError():
            return f"{repository} on the hub has no revision {revision!r}; name a branch, a tag or a commit"
        case OfflineModeIsEnabled():
            return f"{repository} is no directory here and the hub is switched off; unset HF_HUB_OFFLINE"
        case LocalEntryNotFoundError():
            return (
                f"{repository} is no directory here, is not in the hub's cache, and the hub can't be reached; "
                "connect to the network, or name a local directory"
            )
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return f"{repository} is no directory here and can't be fetched from the hub: {reason}"
