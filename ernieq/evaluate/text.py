"""Evaluation texts: a name of a bundled text, or a file of the user."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ernieq.bundled import evaluation_texts
from ernieq.errors import TextError

_SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class EvaluationText:
    """A text to be measured on.

    Args:
        name: as the user gave it.
        text: the characters.
        sha256: of the text's UTF-8 bytes.
    """

    name: str
    text: str
    sha256: str


def text_names() -> tuple[str, ...]:
    """Names of the evaluation texts that come with the package."""
    return tuple(text.name for text in evaluation_texts())


def load_text(
    source: str, *, max_bytes: int | None = None, named: Mapping[str, Path] | None = None
) -> EvaluationText:
    """Read a text, given by a known name or as a UTF-8 ``.txt`` or ``.jsonl`` file.

    The lines of a ``.jsonl`` file are objects with a string ``text``; they are joined by blank lines.

    Args:
        source: a name, or a path; names come first.
        max_bytes: keep at most so many bytes of UTF-8 from the start; a character is never split.
        named: files of the named texts; those that come with the package by default.

    Raises:
        TextError: no such text, not UTF-8, malformed, or empty.
    """
    path = _find(source, {text.name: text.path for text in evaluation_texts()} if named is None else named)
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"text {source} is not UTF-8 (byte {error.start}); only UTF-8 is read") from error
    except OSError as error:
        raise TextError(f"text {source} can't be read: {error.strerror}") from error
    if path.suffix == ".jsonl":
        text = "\n\n".join(_jsonl_texts(source, text))
    data = text.encode("utf-8")
    if max_bytes is not None and len(data) > max_bytes:
        # The only invalid bytes can be those of a last, cut character.
        text = data[:max_bytes].decode("utf-8", errors="ignore")
        data = text.encode("utf-8")
    if not text.strip():
        raise TextError(f"text {source} is empty; an evaluation text needs at least one window of tokens")
    return EvaluationText(source, text, hashlib.sha256(data).hexdigest())


def _find(source: str, named: Mapping[str, Path]) -> Path:
    if source in named:
        return named[source]
    path = Path(source)
    if not path.is_file():
        known = ", ".join(sorted(named)) or "none are bundled"
        raise TextError(f"no text named {source!r} and no such file; known names: {known}")
    if path.suffix not in _SUFFIXES:
        raise TextError(f"text {source} has suffix {path.suffix!r}; allowed are {' and '.join(_SUFFIXES)}")
    return path


def _jsonl_texts(source: str, content: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "it is nested too deeply")
            raise TextError(f"text {source}, line {number}, is not JSON: {reason}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise TextError(f'text {source}, line {number}, is not an object with a string "text"')
        texts.append(entry["text"])
    return texts
