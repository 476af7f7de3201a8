"""Encoded units on disk: what one job has encoded already need not be encoded again.

A unit is what is searched in one go: q, k and v of a layer, its o, gate and up of one expert, its down, and so
on. Its name is a hash of the job (source, recipe, text, program) and of the matrices that were encoded beside
it: on a GPU the last bits of a batch depend on its composition, so a batch is taken from here whole or not at
all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ernieq.convert.journal import Journal
from ernieq.convert.overlap import BackgroundQueue
from ernieq.convert.tensor_file import (
    TensorFile,
    array_of,
    parse_tensor_file,
    read_tensor_file,
    write_tensor_file,
)
from ernieq.errors import VerificationError
from ernieq.pack import RawTensor, little_endian_bytes
from ernieq.pack.layout import PACKED_SUFFIX, SCALE_SUFFIX, SIGNS_SUFFIX, pack_signs, unpack_signs
from ernieq.trellis import EncodedMatrix, TrellisCode

_UNIT = "unit"


class DamagedUnitError(VerificationError):
    """A unit was journalled, and its file is no longer what it was."""

    def __init__(self, module: str) -> None:
        super().__init__(f"what was encoded of {module} is missing or damaged")
        self.module = module


@dataclass(frozen=True)
class Unit:
    """Matrices that were encoded as one stack: full name -> matrix, and its proxy error; in their order."""

    matrices: Mapping[str, EncodedMatrix]
    errors: Mapping[str, float]


class Units(Protocol):
    """Where encoded units come from and go to."""

    def fetch(self, batch: Sequence[Sequence[str]]) -> list[Unit] | None:
        """The units of a batch, given by the names of their matrices; None unless all are there."""
        ...

    def keep(self, batch: Sequence[Unit], check: Callable[[Sequence[Unit]], None]) -> None:
        """Take a batch of encoded units; ``check`` raises unless they decode to what the encoder meant."""
        ...


class UnitStore:
    """The units of one job in a folder.

    Args:
        folder: where the files are; must exist.
        journal: says which of them are whole.
        job: digest of the job.
        queue: writes beside the work.
        on_line: receives a sentence if a file turns out to be damaged.
        check_stop: called when a batch has been taken; raises if the conversion is to stop.

    Attributes:
        used: full name of every matrix fetched or kept so far -> key of its unit.
    """

    def __init__(
        self,
        folder: Path,
        journal: Journal,
        job: str,
        queue: BackgroundQueue,
        on_line: Callable[[str], None] = lambda _: None,
        check_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder, self._journal, self._job, self._queue = folder, journal, job, queue
        self._on_line, self._check_stop = on_line, check_stop
        self._entries: dict[str, dict[str, Any]] = {entry["key"]: entry for entry in journal.events(_UNIT)}
        self.used: dict[str, str] = {}
        self._open: tuple[str, Unit] | None = None  # the unit that was read last

    @property
    def modules(self) -> set[str]:
        """Full names of all matrices that are there."""
        return {name for entry in list(self._entries.values()) for name in entry["modules"]}

    def has(self, key: str) -> bool:
        """Whether a unit is journalled and its file is there; whether it is whole, reading it will tell."""
        return key in self._entries and self._path(key).exists()

    def fetch(self, batch: Sequence[Sequence[str]]) -> list[Unit] | None:
        """The units of a batch, given by the names of their matrices; None unless all are there and whole."""
        keys = [self._key(names, batch) for names in batch]
        if not all(key in self._entries for key in keys):
            return None
        units = [self._read(key) for key in keys]
        found = [unit for unit in units if unit is not None]
        if len(found) < len(units):
            return None
        self._note(keys, found)
        return found

    def keep(self, batch: Sequence[Unit], check: Callable[[Sequence[Unit]], None]) -> None:
        """Write the units of a batch and journal each, beside the work that follows.

        Args:
            batch: what was encoded together.
            check: raises unless the units decode to what the encoder meant. It is given what was parsed from
                the very bytes that are written; once written they are read again and compared.

        Raises:
            StorageError: the disk refused one of the units before.
            VerificationError: one of them was not the same when it was read again.
        """
        images = [b"".join(_file_of(unit).chunks()) for unit in batch]
        check([_unit_of(parse_tensor_file(image)) for image in images])
        names = [list(unit.matrices) for unit in batch]
        keys = [self._key(own, names) for own in names]
        for key, own, image in zip(keys, names, images, strict=True):
            self._queue.submit(partial(self._write, key, own, image))
        self._note(keys, batch)
        self._check_stop()

    def matrix(self, module: str) -> EncodedMatrix:
        """One of the matrices that are ``used``.

        Raises:
            DamagedUnitError: its file is damaged; it is then no longer there.
        """
        key = self.used[module]
        if self._open is None or self._open[0] != key:
            unit = self._read(key)
            if unit is None:
                raise DamagedUnitError(module)
            self._open = key, unit
        return self._open[1].matrices[module]

    def _write(self, key: str, names: list[str], image: bytes) -> None:
        entry = {"key": key, "modules": names, "sha256": write_tensor_file(self._path(key), [image])}
        self._journal.append(_UNIT, **entry)
        self._entries[key] = entry

    def _read(self, key: str) -> Unit | None:
        entry = self._entries[key]
        file = read_tensor_file(self._path(key), entry["sha256"])
        if file is None:
            del self._entries[key]
            self._on_line(f"{self._path(key)} is missing or damaged: {entry['modules'][0]} is encoded again")
            return None
        return _unit_of(file)

    def _note(self, keys: Sequence[str], units: Sequence[Unit]) -> None:
        for key, unit in zip(keys, units, strict=True):
            self.used |= dict.fromkeys(unit.matrices, key)

    def _key(self, names: Sequence[str], batch: Sequence[Sequence[str]]) -> str:
        identity = [self._job, list(names), [list(other) for other in batch]]
        return hashlib.sha256(json.dumps(identity).encode("ascii")).hexdigest()

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"


def journalled_modules(journal: Journal) -> set[str]:
    """Full names of all matrices whose units a journal calls finished."""
    return {name for event in journal.events(_UNIT) for name in event["modules"]}


def _file_of(unit: Unit) -> TensorFile:
    tensors: dict[str, RawTensor] = {}
    note: dict[str, Any] = {}
    for name, matrix in unit.matrices.items():
        for suffix, dtype, array in (
            (PACKED_SUFFIX, "I16", matrix.packed),
            (SCALE_SUFFIX, "F16", matrix.scale),
            (SIGNS_SUFFIX, "U8", pack_signs(matrix.signs)),
        ):
            tensors[name + suffix] = RawTensor(dtype, array.shape, little_endian_bytes(array))
        note[name] = {
            "bits": matrix.code.bits_per_weight,
            "state_bits": matrix.code.state_bits,
            "rotation_block": matrix.rotation_block,
            "proxy_error": unit.errors[name],
        }
    return TensorFile(tensors, note)


def _unit_of(file: TensorFile) -> Unit:
    matrices = {
        name: EncodedMatrix(
            packed=array_of(file.tensors[name + PACKED_SUFFIX], "<i2"),
            scale=array_of(file.tensors[name + SCALE_SUFFIX], "<f2"),
            signs=unpack_signs(array_of(file.tensors[name + SIGNS_SUFFIX], "u1")),
            rotation_block=facts["rotation_block"],
            code=TrellisCode(facts["bits"], facts["state_bits"]),
        )
        for name, facts in file.note.items()
    }
    return Unit(matrices, {name: facts["proxy_error"] for name, facts in file.note.items()})
