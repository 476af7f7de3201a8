"""A disk that fills, turns read-only or refuses in mid-run: one sentence, work kept, the same bytes later."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from click.testing import Result

from ernieq.calibrate import LayerStatistics
from ernieq.convert import HessianDirectory, snapshots
from ernieq.errors import OutputExistsError, StorageError
from tests.cli.quantizing import done, quantize, refused, run
from tests.convert.conversions import convert, file_hashes, quick_recipe, write_words
from tests.convert.faults import RefusingDisk, while_encoding
from tests.convert.file_systems import as_nobody, mounted
from tests.e2e.resuming import AGAIN, KEPT, SMALL, raising, resumed, unit_count, weights
from tests.tiny import write_tiny


def fill(disk: Path, spare: int) -> Path:
    """A file that takes all space but a little."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - spare)
    return filler


@pytest.mark.parametrize("spare", [0, 12_288, 40_960])
def test_a_disk_that_fills_says_how_much_to_free_and_that_is_enough(
    source: Path, tmp_path: Path, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    with mounted(tmp_path / "disk", "size=60m") as disk:
        out = disk / "packed"
        with monkeypatch.context() as patch:
            while_encoding(patch, 4, lambda: fill(disk, spare))
            named = (
                f"{out}.partial",
                "No space left on device; free ",
                AGAIN,
                f"encoded, kept in {out}.partial",
            )
            sentence = refused(quantize(source, out), 5, *named)
        assert list(out.with_name("packed.partial").glob("units/*.new")) == []
        refused(quantize(source, out), 5, "free and the conversion needs")
        megabytes = re.search(r"free ([0-9.]+) MB there", sentence)
        assert megabytes
        filler = disk / "filler"
        os.truncate(filler, filler.stat().st_size - int(1e6 * float(megabytes[1])))
        resumed(source, out, wanted)


def refusal(work: Callable[[], object]) -> str | None:
    """What the disk's refusal is told as; None if it has refused nothing."""
    try:
        work()
    except StorageError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("number", "step"), [(errno.ENOSPC, 3), (errno.EROFS, 9), (errno.EACCES, 9), (errno.EIO, 9)]
)
def test_a_disk_that_refuses_any_operation_loses_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, number: int, step: int
) -> None:
    monkeypatch.setattr(snapshots, "PATIENCE", 0)
    text, out, recipe = tmp_path / "words.txt", tmp_path / "out" / "packed", quick_recipe()
    convert(source, tmp_path / "whole", recipe, text=text)
    wanted, first, advised = weights(tmp_path / "whole"), 1, 0
    while True:
        out.parent.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            RefusingDisk(patch, first, number)
            sentence = refusal(lambda: convert(source, out, recipe, text=text))
        if sentence is None:
            break
        assert os.strerror(number) in sentence, first
        assert "\n" not in sentence
        advised += AGAIN in sentence
        with suppress(OutputExistsError):  # refused when all but the last of the leftovers was removed
            convert(source, out, recipe, text=text)
        assert weights(out) == wanted, first
        assert [path.name for path in out.parent.iterdir()] == ["packed"]
        shutil.rmtree(out.parent)
        first += step
    assert advised > 25 / step


def test_a_file_system_that_turns_read_only_keeps_what_was_finished(
    source: Path, tmp_path: Path, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "packed"
    units = out.with_name("packed.partial") / "units"
    with ExitStack() as stack, monkeypatch.context() as patch:
        # Nothing that is open for writing can be remounted, so a read-only file system is laid over the units.
        while_encoding(patch, 5, lambda: stack.enter_context(mounted(units, "size=1m,ro")))
        told = ("Read-only file system; make it writable", AGAIN, KEPT)
        refused(quantize(source, out), 5, *told)
    resumed(source, out, wanted)


@pytest.fixture
def place_of_nobody() -> Iterator[Path]:
    """A directory that the user nobody may write, with a source that it may read."""
    place = Path(tempfile.mkdtemp(prefix="ernieq-test-"))
    write_tiny(place / "source", **SMALL)
    write_words(place / "words.txt")
    place.chmod(0o755)
    for file in (place / "source").iterdir():
        file.chmod(0o644)
    if os.geteuid() == 0:
        os.chown(place, 65534, 65534)
    yield place
    shutil.rmtree(place)


def test_a_directory_without_permission_is_refused_before_the_work(place_of_nobody: Path) -> None:
    place_of_nobody.chmod(0o555)
    with as_nobody():
        result = quantize(place_of_nobody / "source", place_of_nobody / "packed")
    refused(result, 5, f"{place_of_nobody}: Permission denied; make it writable")


def test_a_permission_that_is_taken_away_keeps_what_was_finished(
    place_of_nobody: Path, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = place_of_nobody / "packed"
    folder = out.with_name("packed.partial") / "units"
    with as_nobody():
        with monkeypatch.context() as patch:
            while_encoding(patch, 5, lambda: folder.chmod(0o555))
            told = (f"{folder}", "Permission denied; make it writable", AGAIN, KEPT)
            refused(quantize(place_of_nobody / "source", out), 5, *told)
        folder.chmod(0o755)
        resumed(place_of_nobody / "source", out, wanted)


def test_a_job_that_can_not_be_read_is_not_taken_for_one_that_never_began(
    source: Path, tmp_path: Path, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "packed"
    with monkeypatch.context() as patch:
        while_encoding(patch, 5, lambda: raising(MemoryError()))
        refused(quantize(source, out), 7)
    genuine: Callable[..., str] = Path.read_text
    finished = unit_count(out)

    def read_text(self: Path, *arguments: str, **options: str) -> str:
        if self.name == "job.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return genuine(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", read_text)
        refused(quantize(source, out), 5, "can't read", "job.json", os.strerror(errno.EIO))
    assert unit_count(out) == finished > 0
    resumed(source, out, wanted)


def test_hessians_that_were_collected_before_the_disk_was_full_are_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calibrate(out: Path) -> Result:
        options = ("--windows", "4", "--window", "32", "--threads", "1", "--device", "cpu")
        return run("calibrate", source, "--text", tmp_path / "words.txt", *options, "--out", out)

    done(calibrate(tmp_path / "whole"))
    out = tmp_path / "hessians"
    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "PATIENCE", 0)
        genuine = HessianDirectory.write_layer

        def write_layer(self: HessianDirectory, index: int, statistics: LayerStatistics) -> str:
            if index == 1:
                RefusingDisk(patch, 1, errno.ENOSPC)
            return genuine(self, index, statistics)

        patch.setattr(HessianDirectory, "write_layer", write_layer)
        told = ("No space left on device; free some space there", AGAIN, "1 of 2 layers are finished, kept in ")
        refused(calibrate(out), 5, *told)
    again = calibrate(out)
    done(again)
    assert "1 of 2 layers are finished" in again.stderr
    assert file_hashes(out) == file_hashes(tmp_path / "whole")
