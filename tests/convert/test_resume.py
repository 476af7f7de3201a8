"""A conversion that was killed anywhere goes on, and gives the bytes of one that was not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ernieq.convert import snapshots
from ernieq.errors import OutputExistsError
from tests.convert.conversions import convert, file_hashes, quick_recipe, write_words
from tests.convert.faults import Disk, KilledError

Tiny = Callable[..., Path]

SMALL = {"layers": 2, "experts": 2, "chosen": 1, "shared_experts": 0}


def weights(packed: Path) -> dict[str, str]:
    """Hashes of what must be the same: everything but the manifest, whose time and duration differ."""
    return {name: digest for name, digest in file_hashes(packed).items() if name != "ernieq.json"}


def killed_at(number: int, work: Callable[[], Any]) -> bool:
    """Kill the work at that operation of the disk; False if it does not need so many."""
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, number)
        try:
            work()
        except KilledError:
            return True
    return False


def test_a_kill_at_any_operation_of_the_disk_loses_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "PATIENCE", 0)
    source, text, out = tiny(**SMALL), write_words(tmp_path / "words.txt"), tmp_path / "out" / "packed"
    recipe = quick_recipe()
    convert(source, tmp_path / "whole", recipe, text=text)
    wanted, number = weights(tmp_path / "whole"), 1
    while killed_at(number, lambda: convert(source, out, recipe, text=text)):
        with suppress(OutputExistsError):  # killed when all but the last of the leftovers was removed
            convert(source, out, recipe, text=text)
        assert weights(out) == wanted, number
        assert [path.name for path in out.parent.iterdir()] == ["packed"]
        shutil.rmtree(out.parent)
        number += 1
    assert number > 50
