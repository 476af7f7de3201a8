"""``ernieq inspect``: what a checkpoint is made of, per group of tensors."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ernieq.bundled import resolve_source
from ernieq.cli.shared import directories, json_option, print_json
from ernieq.pack import PackedReader, is_packed
from ernieq.pack.inventory import Group, Inventory, StoredParameter, packed_parameters, take_inventory
from ernieq.records import WeightsRecord, bits_per_weight, format_bits, format_bytes, format_count

if TYPE_CHECKING:
    from ernieq.model import ModelConfig
    from ernieq.report import Table

_CARRIED = "carried"
# Groups in the order of the table, by the value of the ParameterRole that fills them.
_GROUPS = {
    "routed_expert": "routed experts",
    "shared_expert": "shared experts",
    "attention": "attention",
    "dense_mlp": "dense MLP",
    "embedding": "embedding",
    "head": "head",
    "router": "router",
    "router_bias": "router",
    "norm": "norms",
    "bias": "biases",
}
_OUTSIDE_DECODER = ("embedding", "head", _CARRIED)


@click.command("inspect")
@click.argument("path", shell_complete=directories)
@json_option
def command(path: str, as_json: bool) -> None:
    """Show what PATH is made of: parameters, bits, bytes and codes per group of tensors.

    PATH is a packed or an ordinary checkpoint; of a hub id only headers are fetched. Bits are all that is
    stored for a group, scales and signs included, over the parameters that it stands for.

    \b
    Example:
      ernieq inspect ernieq-nano-2bit
    """
    from ernieq.checkpoint import header_directory

    version = None
    with header_directory(resolve_source(path)) as directory:
        if is_packed(directory):
            config, stored, file_bytes, version = _packed(directory)
        else:
            config, stored, file_bytes = _plain(directory)
    inventory = take_inventory(stored, _group_of(config), dict.fromkeys(_GROUPS.values()), _CARRIED)
    weights = _weights(inventory, file_bytes)
    if as_json:
        print_json(_result(path, version, inventory, weights))
    else:
        _print(_table(path, version, inventory, weights, tied=config.tie_word_embeddings))


def _packed(path: Path) -> tuple[ModelConfig, list[StoredParameter], int, str]:
    from ernieq.model import ModelConfig

    reader = PackedReader(path)
    file_bytes = sum((path / name).stat().st_size for name in reader.shard_files())
    return ModelConfig.from_dict(reader.config), packed_parameters(reader), file_bytes, reader.format_version


def _plain(source: Path) -> tuple[ModelConfig, list[StoredParameter], int]:
    from ernieq.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(source)
    stored = []
    for name in checkpoint.names():
        info = checkpoint.info(name)
        parameters = 1
        for side in info.shape:
            parameters *= side
        stored.append(StoredParameter(name, parameters, info.nbytes, info.dtype))
    return checkpoint.config, stored, sum(file.stat().st_size for file in checkpoint.shard_files())


def _group_of(config: ModelConfig) -> dict[str, str]:
    from ernieq.model import expected_parameters

    return {name: _GROUPS[spec.role.value] for name, spec in expected_parameters(config).items()}


def _weights(inventory: Inventory, file_bytes: int) -> WeightsRecord:
    decoder = sum(group.nbytes for group in inventory.groups if group.name not in _OUTSIDE_DECODER)
    return WeightsRecord(
        file_bytes=file_bytes,
        decoder_bytes=decoder,
        parameters=inventory.parameters,
        quantized_bytes=inventory.quantized_bytes,
        quantized_parameters=inventory.quantized_parameters,
    )


def _result(path: str, version: str | None, inventory: Inventory, weights: WeightsRecord) -> dict[str, Any]:
    groups = [
        {**asdict(group), "bits_per_weight": bits_per_weight(group.nbytes, group.parameters) or None}
        for group in inventory.groups
    ]
    return {
        "path": path,
        "packed": version is not None,
        "format_version": version,
        "groups": groups,
        **asdict(weights),
        "bits_per_weight": weights.bits,
        "quantized_bits_per_weight": weights.quantized_bits if weights.quantized_parameters else None,
    }


def _table(
    path: str, version: str | None, inventory: Inventory, weights: WeightsRecord, *, tied: bool
) -> Table:
    from ernieq.report import Section, Table

    total = ("all weight files", *_figures(sum(group.tensors for group in inventory.groups), weights), "")
    notes = [f"Decoder (without embedding, head and carried tensors): {format_bytes(weights.decoder_bytes)}."]
    if weights.quantized_parameters:
        notes.append(
            f"Quantized matrices: {format_bits(weights.quantized_bits)} bits per weight over "
            f"{format_count(weights.quantized_parameters)} parameters; "
            f"all parameters: {format_bits(weights.bits)}."
        )
    if tied:
        notes.append("The output head is tied to the embedding.")
    kind = "ordinary checkpoint" if version is None else f"packed checkpoint, format {version}"
    return Table(
        title=f"{path}: {kind}",
        columns=("group", "tensors", "parameters", "bits", "bytes", "code"),
        sections=(Section("", (*(_row(group) for group in inventory.groups), total)),),
        notes=tuple(notes),
    )


def _figures(tensors: int, weights: WeightsRecord) -> tuple[str, str, str, str]:
    return (
        f"{tensors:,}",
        format_count(weights.parameters),
        format_bits(weights.bits),
        format_bytes(weights.file_bytes),
    )


def _row(group: Group) -> tuple[str, ...]:
    return (
        group.name,
        f"{group.tensors:,}",
        format_count(group.parameters),
        format_bits(bits_per_weight(group.nbytes, group.parameters)),
        format_bytes(group.nbytes),
        _codes(group),
    )


def _codes(group: Group) -> str:
    """The code of a group; where there are several, how often each occurs, as short as it gets."""
    if len(group.codes) == 1:
        return next(iter(group.codes))
    short = {code: code.removeprefix("trellis ").removesuffix(" L=16") for code in group.codes}
    return ", ".join(f"{count} x {short[code]}" for code, count in group.codes.items())


def _print(table: Table) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 160  # a pipe has no width that lines would have to fit into
    console.print(table.rich())
