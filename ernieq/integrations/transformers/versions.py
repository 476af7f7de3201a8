"""The range of transformers that packed checkpoints can be loaded with; pyproject.toml says the same."""

from __future__ import annotations

import re

from ernieq.errors import BackendUnavailableError

OLDEST = (5, 16, 1)  # the first with hooks for a method from outside
BEYOND = (5, 25)  # the first that was not tested
_RELEASE = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")


def check_version(version: str) -> None:
    """Check that a version of transformers is one that was tested.

    A newer one is refused, too: it may rename what the quantizer relies on, and a model whose weights were not
    found would start with random ones.

    Raises:
        BackendUnavailableError: it is another one.
    """
    match = _RELEASE.match(version)
    release = tuple(int(part or 0) for part in match.groups()) if match else (0,)
    if not OLDEST <= release < BEYOND:
        raise BackendUnavailableError(
            f"transformers {version} can't load packed checkpoints; "
            f"pip install '{requirement()}' brings one that can"
        )


def requirement() -> str:
    """The range as pip takes it."""
    return f"transformers>={_dotted(OLDEST)},<{_dotted(BEYOND)}"


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))
