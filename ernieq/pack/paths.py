"""Which file a name in a checkpoint stands for, and the refusal of names that lead elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

from ernieq.errors import FormatError
from ernieq.untrusted import link_fault

# Tensor and file names are printed and put into JSON: printable ASCII without space, nothing can hide there.
_TENSOR_NAME = re.compile(r"[!-~]{1,512}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,254}")


def check_tensor_name(name: object, what: str) -> str:
    """Return the name if it is one that a tensor or module may have.

    Raises:
        FormatError: the name is empty, longer than 512 characters, or holds more than visible ASCII.
    """
    if not isinstance(name, str) or not _TENSOR_NAME.fullmatch(name):
        raise FormatError(
            f"{what} holds the tensor name {str(name)[:80]!a}; allowed are 1 to 512 printable ASCII characters"
        )
    return name


def check_file_name(name: object, what: str) -> str:
    """Return the name if it is a plain file name, without folders.

    Raises:
        FormatError: the name has a slash, starts with a dot, or holds anything but letters, digits, ``_.-``.
    """
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise FormatError(
            f"{what} names the file {str(name)[:80]!a}; allowed is a plain name in the same directory"
        )
    return name


def locate(directory: Path, name: str) -> Path:
    """Path of a regular file of the checkpoint.

    A symbolic link must stay inside the directory. The one exception is the Hugging Face cache, whose
    ``snapshots/<revision>/`` directories link to ``../../blobs/``.

    Raises:
        FormatError: the name is not plain, the file is missing, not a regular file, or leads outside.
    """
    path = directory / check_file_name(name, str(directory))
    if fault := link_fault(directory, name):
        raise FormatError(fault)
    return path
