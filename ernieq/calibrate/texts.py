"""Calibration texts: the bundled ones or the user's, cut into windows of tokens."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ernieq.errors import TextError
from ernieq.untrusted import read_regular

_MOST_BYTES = 1 << 28  # of a text: some 60 million tokens, of which a sample takes 130,000
_HALF_PAIR = re.compile("[\ud800-\udfff]")


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    @property
    def bos_token_id(self) -> int | None:
        """Token that begins a document."""
        ...

    @property
    def eos_token_id(self) -> int | None:
        """Token that ends a document."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        ...


@dataclass(frozen=True)
class TextFile:
    """A text file as read: its documents and the hash of its bytes."""

    path: Path
    sha256: str
    documents: tuple[str, ...]


@dataclass(frozen=True)
class CalibrationSample:
    """Windows of tokens and where they come from.

    Args:
        windows: (windows, length) int64.
        files: path and sha256 of every text file.
        seed: seed of the order of documents.
    """

    windows: Tensor
    files: tuple[tuple[str, str], ...]
    seed: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.windows.numel()


def read_text_file(path: Path) -> TextFile:
    """Read a ``.txt`` (one document) or ``.jsonl`` (``{"text": ...}`` a line) file.

    Raises:
        TextError: the file is missing, not UTF-8, empty, or a line is not a JSON object with a text.
    """
    raw = read_regular(path, _MOST_BYTES, TextError)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text (byte {error.start})") from error
    if path.suffix == ".jsonl":
        documents = [
            _document(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()
        ]
    else:
        documents = [text]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise TextError(f"{path} holds no text")
    return TextFile(path, hashlib.sha256(raw).hexdigest(), tuple(documents))


def _document(path: Path, number: int, line: str) -> str:
    try:
        document = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TextError(f'{path} line {number} is not a JSON object with a "text"') from error
    if not isinstance(document, str):
        raise TextError(f'{path} line {number}: "text" is not a string')
    if _HALF_PAIR.search(document):
        raise TextError(f'{path} line {number}: "text" holds half of a surrogate pair, which is no text')
    return document


def sample_windows(
    files: Sequence[TextFile], tokenizer: Tokenizer, *, windows: int, length: int, seed: int
) -> CalibrationSample:
    """Shuffle documents, join them with begin and end tokens, and cut the stream into windows.

    Each file gives its share of the stream in proportion to its size; documents of all files are mixed.

    Args:
        files: texts that have been read.
        tokenizer: tokenizer of the model.
        windows: number of windows wanted; fewer are returned where the text is shorter.
        length: tokens of a window.
        seed: seed of the order of documents.

    Returns:
        The sample, with at least one window.

    Raises:
        TextError: the texts together are shorter than one window.
    """
    documents = [document for file in files for document in file.documents]
    order = np.random.default_rng(seed).permutation(len(documents))
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for index in order:
        if len(stream) >= windows * length:
            break
        stream += begin + tokenizer.encode(documents[index], add_special_tokens=False) + end
    count = min(windows, len(stream) // length)
    if count == 0:
        raise TextError(
            f"the calibration text has {len(stream)} tokens; at least one window of {length} is needed"
        )
    tokens = torch.tensor(stream[: count * length], dtype=torch.int64).reshape(count, length)
    return CalibrationSample(tokens, tuple((str(file.path), file.sha256) for file in files), seed)
