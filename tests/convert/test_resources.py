"""Memory is what system and containers leave; a place that can't be written is said to be so."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from ernieq.convert.resources import Memory, available_memory, check_writable
from ernieq.errors import StorageError
from tests.convert.file_systems import as_nobody, mounted

GB = 10**9
PAGE = os.sysconf("SC_PAGE_SIZE")


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, Path]:
    """8 GB available, 1 GB of swap; this process holds 1000 pages."""
    proc = tmp_path / "proc"
    write(
        proc / "meminfo",
        f"MemTotal: 9999999 kB\nMemAvailable: {8 * GB // 1024} kB\nSwapFree: {GB // 1024} kB\nHugePages: 0",
    )
    write(proc / "self" / "statm", "5000 1000 10 1 0 1 0")
    write(proc / "self" / "cgroup", "0::/a/b")
    return proc, tmp_path / "cgroup"


def limit(group: Path, limit: object, usage: int, cached: int, *, old: bool = False) -> None:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
    write(group / names[0], limit)
    write(group / names[1], usage)
    write(group / "memory.stat", f"anon 1\n{'total_inactive_file' if old else 'inactive_file'} {cached}")


def near(memory: Memory | None, available: int) -> bool:
    assert memory is not None
    return abs(memory.available - PAGE * 1000 - available) < 2048


def test_without_a_limit_it_is_what_the_system_has_available_and_what_this_process_holds(
    machine: tuple[Path, Path],
) -> None:
    memory = available_memory(*machine)
    assert near(memory, 8 * GB)
    assert memory is not None
    assert memory.swap == GB // 1024 * 1024


def test_a_limit_of_any_group_above_counts_and_cached_files_give_way(machine: tuple[Path, Path]) -> None:
    limit(machine[1] / "a" / "b", "max", 0, 0)
    limit(machine[1] / "a", 5 * GB, 3 * GB, GB)
    memory = available_memory(*machine)
    assert near(memory, 3 * GB)
    assert memory is not None
    assert memory.swap == 0


def test_in_a_container_the_limit_is_that_of_the_mount(machine: tuple[Path, Path]) -> None:
    limit(machine[1], 2 * GB, GB, 0)
    assert near(available_memory(*machine), GB)


def test_limits_of_the_first_version_of_groups_count_too(machine: tuple[Path, Path]) -> None:
    write(machine[0] / "self" / "cgroup", "5:cpu:/x\n4:memory:/x\n0::/")
    limit(machine[1] / "memory" / "x", 4 * GB, 2 * GB, GB, old=True)
    assert near(available_memory(*machine), 3 * GB)


def test_a_limit_above_what_there_is_changes_nothing(machine: tuple[Path, Path]) -> None:
    limit(machine[1] / "a" / "b", 100 * GB, GB, 0)
    assert near(available_memory(*machine), 8 * GB)


def test_nothing_is_known_of_a_system_without_proc(tmp_path: Path) -> None:
    assert available_memory(tmp_path / "proc", tmp_path) is None


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs /proc")
def test_this_machine_has_some_memory() -> None:
    memory = available_memory()
    assert memory is not None
    assert 10**7 < memory.available < 10**14


def test_a_directory_that_can_be_made_is_not_left_behind(tmp_path: Path) -> None:
    assert check_writable(tmp_path / "packed") == tmp_path
    assert check_writable(tmp_path / "new" / "deep" / "packed") == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_a_file_above_the_output_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"notes\.txt is a file"):
        check_writable(tmp_path / "notes.txt" / "packed")


def test_a_name_that_the_file_system_can_not_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=rf"written into {tmp_path}: File name too long"):
        check_writable(tmp_path / ("x" * 250))


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs users of Unix")
def test_a_directory_of_somebody_else_is_named() -> None:
    place = Path(tempfile.mkdtemp(prefix="ernieq-test-"))
    try:
        place.chmod(0o555)
        with as_nobody(), pytest.raises(StorageError, match=f"{place}: Permission denied; make it writable"):
            check_writable(place / "packed")
    finally:
        place.chmod(0o755)
        shutil.rmtree(place)


def test_a_read_only_file_system_is_called_that(tmp_path: Path) -> None:
    with (
        mounted(tmp_path / "disk", "size=1m,ro") as disk,
        pytest.raises(StorageError, match=f"{disk} lies on a read-only file system"),
    ):
        check_writable(disk / "packed")


def test_a_mount_point_is_no_output(tmp_path: Path) -> None:
    with (
        mounted(tmp_path / "disk", "size=1m") as disk,
        pytest.raises(StorageError, match=f"{disk} is a mount point"),
    ):
        check_writable(disk)
