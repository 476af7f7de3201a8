"""Structural damage drawn by hypothesis: one to three changes to a JSON value, or to the bytes of its text."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

INTEGERS = [0, 1, -1, 7, 8, 16, 255, 2**16, 2**31, 2**48 - 1, 2**48, 2**63, 2**64, -(2**63), 10**30, 10**400]
FLOATS = [0.0, -0.0, 0.5, 1.5, 2.0, 2.25, 1e-320, 1e308, float("nan"), float("inf")]
TEXTS = [
    "", "x", "0", "0-3", "0-999999", "3-1", "m.0-99999.0-99999", "a,b", "0,1,1", "..", "../x", "/etc/passwd",
    "\0", "a\nb", "\x1b[2J", "\ud800", "ä", "x" * 600, "__metadata__", "weight_map", "model.safetensors",
    "F16", "BF16", "I16", "F32", "F64", "U8", "BOOL", "I64", "0.1", "0.2", "0.3", "ernieq", "0" * 64, "silu",
    "default", "model.norm.weight", "model.norm.weight_scale", "model.embed_tokens.weight",
    "model.embed_tokens.weight_packed",
]  # fmt: skip
TOKENS = [
    b"1e999", b"-1e999", b"NaN", b"Infinity", b"9" * 5000, b"1" + b"0" * 4000, b"[" * 40 + b"]" * 40, b"1.",
    b"01", b"[" * 1000, b'"\\ud800"', b'"\\u0000"', b"\xff", b"\xef\xbb\xbf", b"{}", b"[[]]", b"true", b"-0",
    b"1E400", b'"a":1,"a":1', b",", b"}", b"{", b"\0", b"null",
]  # fmt: skip

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(INTEGERS),
    st.integers(-(2**70), 2**70),
    st.sampled_from(FLOATS),
    st.floats(),
    st.sampled_from(TEXTS),
    st.text(max_size=20),
)
keys = st.sampled_from(TEXTS) | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)

Path = tuple[Any, ...]


def paths_of(value: Any, path: Path = ()) -> list[Path]:
    """Places of all values inside a value, the value itself left out."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return []
    return [found for key, child in items for found in ((*path, key), *paths_of(child, (*path, key)))]


def parent_of(value: Any, path: Path) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value


@st.composite
def changed(draw: st.DrawFn, original: dict[str, Any]) -> dict[str, Any]:
    """A copy of a JSON object with one to three changes of its structure."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        places = paths_of(value)
        if not places:
            break
        path = draw(st.sampled_from(places))
        parent, key = parent_of(value, path), path[-1]
        match draw(st.sampled_from(["replace", "nudge", "delete", "copy", "add", "rename"])):
            case "nudge" if type(parent[key]) is int:
                parent[key] += draw(st.sampled_from([-64, -32, -16, -2, -1, 1, 2, 16, 32, 64]))
            case "delete":
                del parent[key]
            case "copy":
                other = draw(st.sampled_from(places))
                parent[key] = copy.deepcopy(_at(value, other))
            case "add" if isinstance(parent, dict):
                parent[draw(st.sampled_from(TEXTS))] = draw(values)
            case "add":
                parent.insert(draw(st.integers(0, len(parent))), draw(values))
            case "rename" if isinstance(parent, dict):
                parent[draw(st.sampled_from(TEXTS) | st.text(max_size=12))] = parent.pop(key)
            case _:
                parent[key] = draw(values)
    return value


def _at(value: Any, path: Path) -> Any:
    try:
        for key in path:
            value = value[key]
    except (KeyError, IndexError, TypeError):
        return None
    return value


@st.composite
def damaged(draw: st.DrawFn, text: bytes) -> bytes:
    """Bytes with one to three changes: flipped, cut, repeated, or with a token of JSON put in."""
    raw = bytearray(text)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(raw)))
        end = min(len(raw), place + draw(st.integers(0, 12)))
        match draw(st.sampled_from(["flip", "cut", "repeat", "token", "over"])):
            case "flip" if place < len(raw):
                raw[place] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del raw[place:end]
            case "repeat":
                raw[place:place] = raw[place:end] * draw(st.integers(1, 3))
            case "over":
                raw[place:end] = draw(st.sampled_from(TOKENS))
            case _:
                raw[place:place] = draw(st.sampled_from(TOKENS))
    return bytes(raw)


def json_texts(text: bytes) -> st.SearchStrategy[bytes]:
    """Texts that began as this one: mostly changed in structure, else in their bytes."""
    original = json.loads(text)
    structured = changed(original).map(lambda value: json.dumps(value).encode())
    return st.one_of(structured, structured, damaged(text))
