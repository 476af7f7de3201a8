"""What the machine has: memory that this process may still grow into, and whether a directory may be written.

Memory is read from /proc and from the control groups that this process is in (cgroups v2, and v1 where only
that is there), because a container's limit is not in /proc/meminfo. Where there is no /proc nothing is known.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ernieq.errors import StorageError

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Names of a limit, of what is used, and of the part of it that is cached files, which give way to all else.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@dataclass(frozen=True)
class Memory:
    """Bytes that this process may take in all, what it has already included, and swap beyond them."""

    available: int
    swap: int


def available_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> Memory | None:
    """Memory for this process: what the system has available or a control group leaves, whichever is less.

    Args:
        proc: where the process information is mounted.
        cgroups: where the control groups are mounted.

    Returns:
        None where the system does not say.
    """
    try:
        machine = _table((proc / "meminfo").read_text(), unit=1024)
        available, swap = machine["MemAvailable"], machine["SwapFree"]
        resident = int((proc / "self" / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, KeyError, ValueError, IndexError):
        return None
    rooms = list(_cgroup_rooms(proc, cgroups))
    if rooms and min(rooms) < available:
        return Memory(max(0, min(rooms)) + resident, 0)
    return Memory(available + resident, swap)


def _cgroup_rooms(proc: Path, cgroups: Path) -> Iterator[int]:
    """What every control group above this process leaves; none for one without a limit."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        mounts: tuple[Path, ...]
        if controllers == "":
            mounts, names = (cgroups, cgroups / "unified"), _V2
        elif "memory" in controllers.split(","):
            mounts, names = (cgroups / "memory",), _V1
        else:
            continue
        for mount in mounts:
            # Within a container the path may be that of the host: the mount itself is then the container's.
            group = mount / path.lstrip("/")
            for place in (group, *group.parents):
                room = _room(place, *names)
                if room is not None:
                    yield room
                if place == mount:
                    break


def _room(group: Path, limit_name: str, usage_name: str, cached_name: str) -> int | None:
    try:
        limit = int((group / limit_name).read_text())  # "max" is no number
        usage = int((group / usage_name).read_text())
        cached = _table((group / "memory.stat").read_text()).get(cached_name, 0)
    except (OSError, ValueError):
        return None
    return limit - max(0, usage - cached)


def _table(text: str, unit: int = 1) -> dict[str, int]:
    """Lines of ``name value`` or ``name: value kB``."""
    rows = (line.replace(":", " ").split() for line in text.splitlines())
    return {row[0]: int(row[1]) * unit for row in rows if len(row) > 1}


def check_writable(target: Path) -> Path:
    """Whether a directory can be made at ``target``: tried beside it, and undone.

    Args:
        target: absolute path of what is to be made; it need not exist, nor its parents.

    Returns:
        The nearest directory above it that exists.

    Raises:
        StorageError: it can't; the sentence names the directory and says why.
    """
    if target.is_mount():
        raise StorageError(
            f"{target} is a mount point, which nothing can be renamed to; name a directory in it"
        )
    place = next(parent for parent in target.parents if parent.exists())
    if not place.is_dir():
        raise StorageError(f"{place} is a file: nothing can be written below it; name another --out")
    if os.statvfs(place).f_flag & os.ST_RDONLY:
        raise StorageError(f"{place} lies on a read-only file system; name an --out elsewhere")
    name = target.name if place == target.parent else target.relative_to(place).parts[0]
    trial = place / f".{name}.{secrets.token_hex(4)}.trial"
    try:
        trial.mkdir()
    except OSError as error:
        raise StorageError(
            f"nothing can be written into {place}: {error.strerror}; make it writable or name another --out"
        ) from None
    with contextlib.suppress(OSError):
        trial.rmdir()
    return place
