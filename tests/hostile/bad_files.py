"""Bad inputs that are wrong in any checkpoint, packed or not: each damages a directory that was whole.

A case is a function of the directory. What its file must be called in the refusal is the key of the table.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.hostile.packed_damage import INDEX, SHARD, edit_header, edit_json, write_shard

Damage = Callable[[Path], object]
NORM = "model.norm.weight"


def overwrite(name: str, content: bytes) -> Damage:
    return lambda directory: (directory / name).write_bytes(content)


def truncate(kept: int) -> Damage:
    return lambda directory: (directory / SHARD).write_bytes((directory / SHARD).read_bytes()[:kept])


def announce(length: int, file_bytes: int | None = None) -> Damage:
    """Make the header's length something else, in a sparse file that may be long enough for it."""

    def damage(directory: Path) -> None:
        with (directory / SHARD).open("r+b") as file:
            file.write(length.to_bytes(8, "little"))
            if file_bytes is not None:
                file.truncate(file_bytes)

    return damage


def header_text(text: bytes) -> Damage:
    return lambda directory: write_shard(directory / SHARD, text, b"")


def entry(**fields: Any) -> Damage:
    return lambda directory: edit_header(directory / SHARD, lambda header: header[NORM].update(fields))


def entry_text(field: str, text: str) -> Damage:
    """Put a text that is no JSON of Python's into a field of the header."""

    def damage(directory: Path) -> None:
        raw = (directory / SHARD).read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        header[NORM][field] = "MARK"
        write_shard(directory / SHARD, json.dumps(header).replace('"MARK"', text).encode(), raw[end:])

    return damage


def rename(name: str) -> Damage:
    return lambda directory: edit_header(
        directory / SHARD, lambda header: header.update({name: header.pop(NORM)})
    )


def twice(directory: Path) -> None:
    """The same name a second time in one header, where a lenient parser takes the last."""
    raw = (directory / SHARD).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    text = raw[8:end].rstrip()
    copy = json.dumps({NORM: json.loads(text)[NORM]}).encode()
    write_shard(directory / SHARD, text[:-1] + b"," + copy[1:], raw[end:])


def twin(directory: Path) -> None:
    edit_header(directory / SHARD, lambda header: header.update({"model.twin": header[NORM]}))


def replace(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(directory: Path) -> None:
        (directory / name).rename(directory.parent / f"moved-{name}")
        make(directory / name)

    return damage


def listen(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket may have 108 characters
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a directory": lambda path: path.mkdir(),
    "a socket": listen,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link out of the directory": lambda path: path.symlink_to(path.parent.parent / f"moved-{path.name}"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
}

JSON_BOMBS: dict[str, bytes] = {
    "nothing": b"",
    "a list": b"[]",
    "a number": b"1",
    "a text": b'"x"',
    "null": b"null",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "no UTF-8": b'{"a":"\xc3("}',
    "half a surrogate pair": b'{"\\ud800": {}}',
    "a key twice": b'{"a": 1, "a": 1}',
    "NaN": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "a float beyond floats": b'{"a": 1e999}',
    "an integer of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "lists 33 deep": b'{"a":' + b"[" * 33 + b"]" * 33 + b"}",
    "lists 900 deep": b'{"a":' + b"[" * 900 + b"]" * 900 + b"}",
    "lists two million deep": b'{"a":' + b"[" * 2_000_000,
    "objects half a million deep": b'{"a":' * 500_000,
    "five million lists": b'{"a":[' + b"[]," * 5_000_000 + b"[]]}",
    "two million objects": b'{"a":[' + b"{}," * 2_000_000 + b"{}]}",
    "a million keys": b"{" + b",".join(b'"%d":0' % number for number in range(1_000_000)) + b"}",
    "four million numbers": b'{"a":[' + b"999," * 4_000_000 + b"1]}",
}

BAD_NAMES = {
    "that is empty": "",
    "with a line end": "a\nb",
    "with NUL": "a\0b",
    "that a terminal obeys": "\x1b[2J",
    "of two thousand letters": "x" * 2000,
    "of a million letters": "x" * 1_000_000,
}

SHARD_CASES: dict[str, Damage] = {
    **{f"truncated to {kept}": truncate(kept) for kept in (0, 1, 7, 8, 9, 500, -1)},
    **{f"announces {length}": announce(length) for length in (2**64 - 1, 2**63, 2**40, 10**6)},
    "announces 8 GB in a sparse file": announce(2**33, 2**33 + 4096),
    **{f"header: {what}": header_text(text) for what, text in JSON_BOMBS.items()},
    "metadata of numbers": header_text(b'{"__metadata__": {"format": 1}}'),
    "metadata a list": header_text(b'{"__metadata__": []}'),
    "dtype unknown": entry(dtype="Q2"),
    "dtype of another width": entry(dtype="F32"),
    "dtype a number": entry(dtype=3),
    "dtype a list": entry(dtype=["BF16"]),
    "dtype very long": entry(dtype="F" * 100_000),
    "shape negative": entry(shape=[-32]),
    "shape doubly negative": entry(shape=[-4, -8]),
    "shape a boolean": entry(shape=[True, 32]),
    "shape a float": entry(shape=[32.0]),
    "shape a text": entry(shape="32"),
    "shape null": entry(shape=None),
    "shape gigantic": entry(shape=[2**62, 2**62]),
    "shape gigantic and empty": entry(shape=[2**47, 2**47, 2**47, 0]),
    "shape of a hundred thousand sides": entry(shape=[1] * 100_000),
    "shape with a side of zero": entry(shape=[32, 0]),
    "shape of other numbers": entry(shape=[31]),
    "offsets swapped": entry(data_offsets=[64, 0]),
    "offsets negative": entry(data_offsets=[-64, 0]),
    "offsets of three": entry(data_offsets=[0, 64, 64]),
    "offsets booleans": entry(data_offsets=[False, True]),
    "offsets floats": entry(data_offsets=[0.0, 64.0]),
    "offsets beyond the file": entry(data_offsets=[2**40, 2**40 + 64]),
    "offsets beyond 64 bits": entry(data_offsets=[2**200, 2**200 + 64]),
    "offsets that are NaN": entry_text("data_offsets", "[NaN, NaN]"),
    "offsets beyond floats": entry_text("data_offsets", "[0, 1e999]"),
    "a field too many": entry(stride=2),
    "an entry twice": twice,
    "two tensors in one place": twin,
    "a hole": lambda directory: edit_header(directory / SHARD, lambda header: header.pop(NORM)),
    "trailing bytes": lambda directory: (directory / SHARD).open("ab").write(b"\0"),
    **{f"a name {what}": rename(name) for what, name in BAD_NAMES.items()},
    **{f"shard {what}": replace(SHARD, make) for what, make in NO_FILES.items()},
}

CONFIG_CASES: dict[str, Damage] = {
    **{f"{what}": overwrite("config.json", text) for what, text in JSON_BOMBS.items()},
    **{f"{what}": replace("config.json", make) for what, make in NO_FILES.items()},
    "a sparse file of 16 GB": lambda directory: os.truncate(directory / "config.json", 2**34),
}


def index_entry(name: Any) -> Damage:
    return lambda directory: edit_json(
        directory / INDEX, lambda index: index["weight_map"].update({NORM: name})
    )


def index_map(weight_map: Any) -> Damage:
    return lambda directory: edit_json(directory / INDEX, lambda index: index.update(weight_map=weight_map))


def place_of(directory: Path, name: str) -> str:
    place: str = json.loads((directory / INDEX).read_text())["weight_map"][name]
    return place


def elsewhere(directory: Path) -> None:
    """Name a shard that is really there, in a directory beside this one."""
    name = place_of(directory, NORM)
    (directory.parent / "other").mkdir()
    (directory / name).rename(directory.parent / "other" / name)
    index_entry(f"../other/{name}")(directory)


def swap(directory: Path) -> None:
    current = place_of(directory, NORM)
    other = next(path.name for path in sorted(directory.glob("*.safetensors")) if path.name != current)
    index_entry(other)(directory)


def forget(directory: Path) -> None:
    edit_json(directory / INDEX, lambda index: index["weight_map"].pop(NORM))


INDEX_CASES: dict[str, Damage] = {
    **{f"{what}": overwrite(INDEX, text) for what, text in JSON_BOMBS.items()},
    **{
        f"{what}": replace(INDEX, make)
        for what, make in NO_FILES.items()
        if what
        not in ("a link to nothing", "a link to itself")  # then there is no index, which is another case
    },
    "a sparse file of 16 GB": lambda directory: os.truncate(directory / INDEX, 2**34),
    "a shard in another directory": elsewhere,
    **{
        f"a shard {name!r}": index_entry(name)
        for name in (
            "../model.safetensors",
            "/etc/passwd",
            "/etc/x.safetensors",
            "sub/x.safetensors",
            "..\\x.safetensors",
            "..",
            ".safetensors",
            "model.bin",
            "",
            "x\n.safetensors",
            "x\0.safetensors",
            7,
            True,
            None,
            ["model.safetensors"],
        )
    },
    "a shard of a long name": index_entry("x" * 300 + ".safetensors"),
    "a shard that is not there": index_entry("model-00099-of-00099.safetensors"),
    "a shard of another place": swap,
    "a tensor that is not listed": forget,
    **{
        f"a tensor name {what}": index_map({name: "model-00001-of-00002.safetensors"})
        for what, name in BAD_NAMES.items()
    },
    "no map": index_map(None),
    "a list for a map": index_map([]),
    "an empty map": index_map({}),
    "a text for a map": index_map("x"),
    "a number for a map": index_map(3),
    "a hundred thousand ghosts": index_map(
        {f"ghost.{number}": "model-00001-of-00001.safetensors" for number in range(100_000)}
    ),
}

ALL_CASES: dict[str, tuple[str, dict[str, Damage]]] = {
    "shard": (SHARD, SHARD_CASES),
    "config": ("config.json", CONFIG_CASES),
    "index": ("model", INDEX_CASES),
}


def case_ids() -> list[tuple[str, str]]:
    return [(table, case) for table, (_, cases) in ALL_CASES.items() for case in cases]


def damage_of(table: str, case: str) -> tuple[str, Damage]:
    """Name that the refusal must hold, and the damage."""
    name, cases = ALL_CASES[table]
    return name, partial(cases[case])
