"""One quick conversion that is cut short by a fault and then resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.cli.quantizing import done, quantize
from tests.convert.conversions import file_hashes

SMALL: dict[str, Any] = {"layers": 2, "experts": 2, "chosen": 1, "shared_experts": 0}
AGAIN = "and run the same command again: "
KEPT = "% of the weights are encoded, kept in "


def raising(error: BaseException) -> None:
    """An expression that raises."""
    raise error


def weights(packed: Path) -> dict[str, str]:
    """Hashes of all files but those that name their directory or tell the time."""
    return {
        name: digest for name, digest in file_hashes(packed).items() if name not in ("ernieq.json", "README.md")
    }


def unit_count(out: Path) -> int:
    """Encoded units that are kept beside an output."""
    return len(list(out.with_name(f"{out.name}.partial").glob("units/*.safetensors")))


def resumed(source: Path, out: Path, wanted: dict[str, str], *options: str) -> None:
    """Run the same command again: it goes on, gives the same bytes, and leaves nothing beside them."""
    assert unit_count(out) > 0
    assert not out.exists()
    again = quantize(source, out, *options)
    done(again)
    assert "resuming from" in again.stderr
    assert weights(out) == wanted
    assert not out.with_name(f"{out.name}.partial").exists()
