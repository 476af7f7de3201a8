"""A source that vanishes or changes in mid-run: it is named, no other file is mixed in, work is kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ernieq.checkpoint import open_checkpoint
from ernieq.errors import SourceChangedError
from tests.cli.quantizing import done, quantize, refused
from tests.convert.conversions import write_words
from tests.convert.faults import while_encoding
from tests.e2e.resuming import AGAIN, KEPT, SMALL, raising, resumed, unit_count, weights
from tests.tiny import write_tiny

SHARD = "model-00002-of-00002.safetensors"
TOLD = ("; put the file back as it was", AGAIN, KEPT)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_words(tmp_path / "words.txt")
    return write_tiny(tmp_path / "source", shards=2, tied=False, **SMALL)


@pytest.fixture
def wanted(source: Path, tmp_path: Path) -> dict[str, str]:
    done(quantize(source, tmp_path / "whole"))
    shutil.copytree(source, tmp_path / "saved")
    return weights(tmp_path / "whole")


def put_back(source: Path) -> None:
    """As a user would: copied anew, so that all dates differ."""
    for file in (source.parent / "saved").iterdir():
        (source / file.name).unlink(missing_ok=True)
        shutil.copyfile(file, source / file.name)


def delete(shard: Path) -> None:
    shard.unlink()


def cut_off(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 3)


def cut_off_whole(shard: Path) -> None:
    os.truncate(shard, 0)


def flip(shard: Path) -> None:
    raw = bytearray(shard.read_bytes())
    raw[-5] ^= 1
    shard.write_bytes(raw)


def replace(shard: Path) -> None:
    other = shard.with_name("other")
    shutil.copyfile(shard, other)
    flip(other)
    other.replace(shard)


@pytest.mark.parametrize("number", [1, 5, 9])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (delete, "can't be read: No such file or directory"),
        (cut_off, "changed while it was in use: "),
        (cut_off_whole, "changed while it was in use: 0 bytes"),
        (flip, "changed while it was in use: it was written to"),
        (replace, "changed while it was in use: it was written to"),
    ],
)
def test_a_shard_that_vanishes_or_changes_is_named_and_once_put_back_the_run_goes_on(
    source: Path,
    tmp_path: Path,
    wanted: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    named: str,
    number: int,
) -> None:
    out = tmp_path / "packed"
    with monkeypatch.context() as patch:
        while_encoding(patch, number, lambda: change(source / SHARD))
        refused(quantize(source, out), 3, SHARD, named, *TOLD)
    before = unit_count(out)
    again = quantize(source, out)
    assert again.exit_code in (2, 3)
    assert SHARD in again.stderr.splitlines()[-1]
    assert unit_count(out) == before
    put_back(source)
    if number > 1:
        resumed(source, out, wanted)
    else:  # so early that the contents may not have been hashed
        done(quantize(source, out, "--restart"))
        assert weights(out) == wanted


def test_a_change_behind_the_last_matrix_is_noticed_before_the_output_appears(
    source: Path, tmp_path: Path, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ernieq.convert import job

    genuine, out = job.__dict__["keep_rest"], tmp_path / "packed"

    def keep_rest(*arguments: object) -> object:
        kept = genuine(*arguments)
        dates = (source / SHARD).stat()
        flip(source / SHARD)
        os.utime(source / SHARD, ns=(dates.st_atime_ns, dates.st_mtime_ns))  # as if nothing had happened
        return kept

    with monkeypatch.context() as patch:
        patch.setattr(job, "keep_rest", keep_rest)
        refused(quantize(source, out), 3, SHARD, "changed while it was in use: its sha256 is another", *TOLD)
    put_back(source)
    resumed(source, out, wanted)


def test_contents_decide_and_no_date_when_a_run_is_resumed(
    source: Path, tmp_path: Path, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "packed"
    with monkeypatch.context() as patch:
        while_encoding(patch, 7, lambda: raising(MemoryError()))
        refused(quantize(source, out), 7)
    dates = (source / SHARD).stat()
    flip(source / SHARD)
    os.utime(source / SHARD, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    changed = quantize(source, out)
    assert changed.exit_code == 2
    assert f"Error: source shard {SHARD} differs" in changed.stderr.splitlines()[-1]
    put_back(source)
    os.utime(source / SHARD, (4e9, 4e9))  # in the year 2096
    resumed(source, out, wanted)


def test_a_tokenizer_that_vanishes_is_not_left_out_without_a_word(
    source: Path, tmp_path: Path, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "packed"
    with monkeypatch.context() as patch:
        while_encoding(patch, 5, (source / "tokenizer.json").unlink)
        refused(quantize(source, out), 3, "tokenizer.json can't be read: No such file", *TOLD)
    put_back(source)
    resumed(source, out, wanted)


def test_a_tensor_that_is_cut_off_is_an_error_and_does_not_kill_the_process(source: Path) -> None:
    checkpoint = open_checkpoint(source)
    name = next(name for name in checkpoint.names() if checkpoint.info(name).file.name == SHARD)
    checkpoint.read(name)  # mapped: reading on in the mapping would now be a bus error
    cut_off_whole(source / SHARD)
    with pytest.raises(SourceChangedError, match=SHARD):
        checkpoint.copy(name)
