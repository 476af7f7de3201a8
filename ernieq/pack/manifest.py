"""``ernieq.json``: where a packed checkpoint came from and what became of every source tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ernieq.errors import FormatError
from ernieq.pack.layout import FORMAT_VERSION
from ernieq.pack.paths import check_file_name, check_tensor_name
from ernieq.pack.patterns import compact_names, expand_names
from ernieq.pack.quantization import check_version

_SHA256 = re.compile(r"[0-9a-f]{64}")
_FATES = ("quantized", "kept", "carried")
_TUNED = "tuned"  # absent where nothing was


@dataclass(frozen=True)
class Source:
    """The checkpoint that was quantized.

    Args:
        name_or_path: hub id or path as the user gave it; ``eval-ppl`` finds the base by it.
        revision: commit of a hub repository, if it came from one.
        files: sha256 (hex) of every source file that was read, by name.
    """

    name_or_path: str
    revision: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CalibrationRecord:
    """The text that the Hessians came from, and stored Hessians if they were used in its place.

    Args:
        files: sha256 (hex) of every text by file name, in the order in which they were read.
        tokens: of the sample.
        windows: of the sample.
        seed: of the order of documents.
        hessians: sha256 (hex) by file of stored Hessians; None if the text itself was run through the model.
    """

    files: Mapping[str, str]
    tokens: int
    windows: int
    seed: int
    hessians: Mapping[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON object; the key ``hessians`` is absent where none were used."""
        fields = {**vars(self), "files": dict(self.files)}
        stored = fields.pop("hessians")
        return fields if stored is None else {**fields, "hessians": dict(stored)}


@dataclass(frozen=True)
class Coverage:
    """What became of every tensor of the source, by its source name.

    Args:
        quantized: ``<module>.weight`` that became the three tensors of a packed matrix.
        kept: part of the model, stored unchanged (norms, router, biases).
        carried: unknown to the model, stored unchanged (multi-token head).
        tuned: part of the model, stored under its name, dtype and shape with other numbers (norms).
    """

    quantized: tuple[str, ...]
    kept: tuple[str, ...]
    carried: tuple[str, ...] = ()
    tuned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """Contents of ``ernieq.json``.

    Args:
        ernieq_version: version of the program that wrote the checkpoint.
        source: what was quantized.
        recipe: every option that shaped the result, as JSON.
        seed: seed of all randomness of the encoder.
        calibration: None if nothing was calibrated.
        coverage: fate of every source tensor; left None, the writer fills in what it was given.
        shards: sha256 by shard; filled in by the writer.
        files: sha256 by copied file (tokenizer); filled in by the writer.
        created: UTC time, ISO 8601; filled in by the writer when empty.
        report: per-layer errors, expert token counts and the like, as JSON.
        format_version: of the packed format.
    """

    ernieq_version: str
    source: Source
    recipe: Mapping[str, Any]
    seed: int
    calibration: CalibrationRecord | None = None
    coverage: Coverage | None = None
    shards: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    report: Mapping[str, Any] = field(default_factory=dict)
    format_version: str = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """The JSON object; symmetric to ``from_json``."""
        coverage = self.coverage or Coverage((), ())
        calibration = None if self.calibration is None else self.calibration.to_json()
        return {
            "ernieq_version": self.ernieq_version,
            "format_version": self.format_version,
            "created": self.created,
            "source": {**vars(self.source), "files": dict(self.source.files)},
            "recipe": dict(self.recipe),
            "seed": self.seed,
            "calibration": calibration,
            "tensors": {
                fate: compact_names(getattr(coverage, fate))
                for fate in (*_FATES, *((_TUNED,) if coverage.tuned else ()))
            },
            "shards": dict(self.shards),
            "files": dict(self.files),
            "report": dict(self.report),
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], what: str) -> Manifest:
        """Parse and check; keys that this version does not know are ignored.

        Raises:
            FormatError: a field is missing or of a wrong type, or the format version is unknown.
        """
        version = check_version(raw.get("format_version"), what)
        calibration = raw.get("calibration")
        return cls(
            ernieq_version=_field(raw, "ernieq_version", str, what),
            source=_source(_field(raw, "source", dict, what), what),
            recipe=_field(raw, "recipe", dict, what),
            seed=_field(raw, "seed", int, what),
            calibration=None if calibration is None else _calibration(calibration, what),
            coverage=_coverage(_field(raw, "tensors", dict, what), what),
            shards=_hashes(raw, "shards", what),
            files=_hashes(raw, "files", what),
            created=_field(raw, "created", str, what),
            report=_field(raw, "report", dict, what),
            format_version=version,
        )


def _field(raw: object, key: str, kind: type, what: str) -> Any:
    value = raw.get(key) if isinstance(raw, dict) else None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FormatError(f"{what} must have a field {key!r} of type {kind.__name__}")
    return value


def _digests(raw: object, key: str, what: str) -> dict[str, str]:
    digests: dict[str, str] = _field(raw, key, dict, what)
    for name, digest in digests.items():
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise FormatError(f"{what} has no sha256 of 64 hex digits for {name[:80]!a} in {key!r}")
    return digests


def _hashes(raw: object, key: str, what: str) -> dict[str, str]:
    digests = _digests(raw, key, what)
    for name in digests:
        check_file_name(name, what)
    return digests


def _source(raw: dict[str, Any], what: str) -> Source:
    revision = raw.get("revision")
    if revision is not None and not isinstance(revision, str):
        raise FormatError(f"{what} has a source revision that is neither null nor a string")
    return Source(_field(raw, "name_or_path", str, what), revision, _digests(raw, "files", what))


def read_calibration(raw: Mapping[str, Any], what: str) -> CalibrationRecord:
    """The record under the key ``calibration`` of a parsed file.

    Raises:
        FormatError: it is missing, or a field is missing or of a wrong type.
    """
    return _calibration(raw.get("calibration"), what)


def _calibration(raw: object, what: str) -> CalibrationRecord:
    tokens, windows, seed = (_field(raw, key, int, what) for key in ("tokens", "windows", "seed"))
    assert isinstance(raw, dict), "its fields were read"
    hessians = None if raw.get("hessians") is None else _digests(raw, "hessians", what)
    return CalibrationRecord(_digests(raw, "files", what), tokens, windows, seed, hessians)


def _coverage(raw: dict[str, Any], what: str) -> Coverage:
    fates = []
    for fate in (*_FATES, *((_TUNED,) if _TUNED in raw else ())):
        patterns = _field(raw, fate, list, what)
        for pattern in patterns:
            check_tensor_name(pattern, what)
        fates.append(tuple(expand_names(patterns, f"{what} ({fate})")))
    return Coverage(*fates)
