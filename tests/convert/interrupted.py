"""A conversion that is run several times, and stopped in between."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ernieq.calibrate import read_text_file
from ernieq.checkpoint import open_checkpoint
from ernieq.convert import Conversion, HessianDirectory, Listener, Recipe, groups
from ernieq.encode import Batches, EncodeOptions
from ernieq.errors import InterruptedConversionError
from tests.convert.conversions import file_hashes, quick_recipe, write_words


def contents(packed: Path) -> dict[str, Any]:
    """What must be the same: the hash of every file, and the manifest without its time and duration."""
    manifest = json.loads((packed / "ernieq.json").read_text(encoding="utf-8"))
    del manifest["created"], manifest["report"]["seconds"]
    return {**file_hashes(packed), "ernieq.json": manifest}


class Stop:
    """Asks a conversion to stop after so many questions."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


class Job:
    """One conversion that is run several times; counts the matrices that each run encodes."""

    def __init__(self, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.source, self.out = source, out
        self.recipe: Recipe = quick_recipe()
        self.text = write_words(out.with_suffix(".txt"))
        self.hessians: HessianDirectory | None = None
        self.batch = 1
        self.lines: list[str] = []
        self.encoded: list[str] = []
        for name in ("encode_matrices", "encode_batch"):
            monkeypatch.setattr(groups, name, self._counted(getattr(groups, name)))

    def run(self, stop: int | None = None) -> None:
        """Run it; all that was encoded and said is noted anew."""
        self.encoded.clear()
        self.lines.clear()
        calibration = self.hessians or [read_text_file(self.text)]
        conversion = Conversion(
            open_checkpoint(self.source),
            str(self.source),
            self.recipe,
            calibration,
            EncodeOptions(threads=1),
            Listener(on_line=self.lines.append),
        )
        conversion._experts = Batches(self.batch, "experts")
        asked = Stop(10**9 if stop is None else stop)
        conversion.run(self.out, overwrite=False, card=lambda _: "# a test\n", should_stop=asked)

    def stopped(self, after: int) -> None:
        """Run it until it has been asked so many times whether to stop."""
        with pytest.raises(InterruptedConversionError, match=r"% of the weights are encoded, kept in "):
            self.run(after)
        assert not self.out.exists()

    @property
    def staging(self) -> Path:
        return self.out.with_name("packed.partial")

    def units(self) -> list[Path]:
        return sorted((self.staging / "units").iterdir())

    def _counted(self, genuine: Callable[..., Any]) -> Callable[..., Any]:
        def encode(weights: Any, *arguments: Any) -> Any:
            for stack in [weights] if isinstance(weights, Mapping) else weights:
                self.encoded += stack
            return genuine(weights, *arguments)

        return encode
