"""Opening a packed checkpoint for transformers: everything is checked before a tensor is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ernieq.errors import FormatError, ShapeError, UsageError
from ernieq.load.source import PackedSource
from ernieq.model import ParameterRole, expected_parameters
from ernieq.pack import MANIFEST_NAME

_WEIGHT = ".weight"
_NEVER_QUANTIZED = frozenset(
    {ParameterRole.ROUTER, ParameterRole.ROUTER_BIAS, ParameterRole.NORM, ParameterRole.BIAS}
)


def open_checked(name_or_path: str, files: Sequence[str] | None) -> PackedSource:
    """Open the directory of the shards that transformers has found, and check all that its loader does not.

    A tensor that is missing or has a wrong shape would be drawn at random with no more than a warning.

    Args:
        name_or_path: what the user asked transformers for.
        files: the shards; None if tensors were passed in another way.

    Raises:
        FormatError: the checkpoint breaks its format, or a matrix is quantized that never may be.
        MissingTensorError: a tensor is missing.
        ShapeError: a tensor has another shape than the configuration calls for.
        NonFiniteError: a weight is NaN or infinite.
        UsageError: there are no files.
    """
    if not files:
        raise UsageError("a packed checkpoint is loaded from its files; state_dict can't be passed instead")
    directory = Path(files[0]).parent.absolute()  # saving looks there again
    if not (directory / MANIFEST_NAME).exists():
        _fetch_manifest(name_or_path, directory)
    source = PackedSource(directory)
    source.check_names()
    _check_tensors(source)
    source.reader.release()
    return source


def _fetch_manifest(name_or_path: str, snapshot: Path) -> None:
    """Let transformers fetch the manifest into its cache, beside the shards that it has fetched on its own."""
    from transformers.utils.hub import cached_file

    if Path(name_or_path).exists():
        return  # a directory without a manifest: the reader says so
    cached_file(
        name_or_path,
        MANIFEST_NAME,
        cache_dir=snapshot.parents[2],  # CACHE/models--ORG--NAME/snapshots/REVISION
        revision=snapshot.name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _check_tensors(source: PackedSource) -> None:
    cpu = torch.device("cpu")
    for name, spec in expected_parameters(source.config).items():
        module = name.removesuffix(_WEIGHT)
        if not source.is_quantized(module):
            source.parameter(name, spec, torch.float32, cpu)
            continue
        if spec.role in _NEVER_QUANTIZED:
            raise FormatError(f"{module} is quantized, but a {spec.role.value.replace('_', ' ')} never may be")
        matrix = source.encoded(module)
        found = (matrix.out_features, matrix.in_features)
        if found != spec.shape:
            raise ShapeError(
                f"{module} is a packed matrix of {found}; the configuration calls for {spec.shape}"
            )
