"""What a checkpoint, packed or plain, is made of: parameters, bytes and codes per group of tensors.

A group is a name that the caller gives to tensors, because this package knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ernieq.pack.layout import PACKED_SUFFIXES
from ernieq.pack.reader import PackedReader


@dataclass(frozen=True)
class StoredParameter:
    """One tensor of the source and how it is stored.

    Args:
        name: its name in the source.
        parameters: numbers that it stands for.
        nbytes: bytes that it takes, with scales and signs.
        code: ``trellis K=2 L=16``, or the element type.
        quantized: whether it is a packed matrix.
    """

    name: str
    parameters: int
    nbytes: int
    code: str
    quantized: bool = False


@dataclass(frozen=True)
class Group:
    """Totals of a group; ``codes`` gives the number of tensors stored in each way."""

    name: str
    tensors: int
    parameters: int
    nbytes: int
    codes: Mapping[str, int]


@dataclass(frozen=True)
class Inventory:
    """All groups in the order asked for, and totals over their tensors.

    Args:
        groups: those that have a tensor.
        parameters: numbers that the checkpoint stands for.
        nbytes: bytes of all tensors.
        quantized_parameters: numbers in packed matrices.
        quantized_bytes: bytes of these, with scales and signs.
    """

    groups: tuple[Group, ...]
    parameters: int
    nbytes: int
    quantized_parameters: int
    quantized_bytes: int


def packed_parameters(reader: PackedReader) -> list[StoredParameter]:
    """The source's tensors as a packed checkpoint stores them."""
    stored = []
    for module in reader.modules():
        code = reader.code_of(module)
        nbytes = sum(reader.info(module + suffix).nbytes for suffix in PACKED_SUFFIXES)
        text = f"trellis K={code.bits_per_weight} L={code.state_bits}"
        shape = reader.shape_of(module)
        stored.append(StoredParameter(f"{module}.weight", math.prod(shape), nbytes, text, quantized=True))
    for name in reader.tensors():
        entry = reader.info(name)
        stored.append(StoredParameter(name, entry.elements, entry.nbytes, entry.dtype))
    return stored


def take_inventory(
    stored: Iterable[StoredParameter], group_of: Mapping[str, str], order: Iterable[str], rest: str
) -> Inventory:
    """Add up tensors by group.

    Args:
        stored: the tensors.
        group_of: group by tensor name.
        order: groups in the order to report them.
        rest: group of the tensors that ``group_of`` does not name; reported last.
    """
    members: dict[str, list[StoredParameter]] = {group: [] for group in (*order, rest)}
    for parameter in stored:
        members[group_of.get(parameter.name, rest)].append(parameter)
    everything = [parameter for group in members.values() for parameter in group]
    quantized = [parameter for parameter in everything if parameter.quantized]
    return Inventory(
        groups=tuple(_group(name, parameters) for name, parameters in members.items() if parameters),
        parameters=sum(parameter.parameters for parameter in everything),
        nbytes=sum(parameter.nbytes for parameter in everything),
        quantized_parameters=sum(parameter.parameters for parameter in quantized),
        quantized_bytes=sum(parameter.nbytes for parameter in quantized),
    )


def _group(name: str, members: list[StoredParameter]) -> Group:
    codes: dict[str, int] = {}
    for parameter in sorted(members, key=lambda parameter: parameter.code):
        codes[parameter.code] = codes.get(parameter.code, 0) + 1
    return Group(
        name=name,
        tensors=len(members),
        parameters=sum(parameter.parameters for parameter in members),
        nbytes=sum(parameter.nbytes for parameter in members),
        codes=codes,
    )
