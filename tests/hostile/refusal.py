"""What every refusal must be: of the right class, one sentence, within a second, with little memory."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable

import pytest

from ernieq.errors import ErnieqError

MOST_SECONDS = 1.0  # of processor time: on a busy machine the clock measures the neighbours
MOST_WAITING = 20.0  # seconds on the clock: nothing may wait for a pipe
MOST_BYTES = 64_000_000


def refusal(
    action: Callable[[], object],
    kind: type[ErnieqError],
    match: str | None = None,
    most_bytes: int = MOST_BYTES,
) -> str:
    """Expect an action to be refused, twice: once to time it, once to count the memory that it takes."""
    waited, started = time.monotonic(), time.process_time()
    with pytest.raises(kind, match=match) as caught:
        action()
    assert time.process_time() - started < MOST_SECONDS
    assert time.monotonic() - waited < MOST_WAITING
    tracemalloc.start()
    try:
        with pytest.raises(kind, match=match):
            action()
        assert tracemalloc.get_traced_memory()[1] < most_bytes
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.isprintable()  # one line, nothing that a terminal would obey
    assert len(message) < 600
    message.encode("utf-8")
    return message
