"""What a checkpoint of the hub is made of, without its weights: small files, and the headers of the large ones.

A shard becomes a file of its full length that holds nothing but its header (a hole takes no disk), so that
whoever reads headers needs no second way to do it. Its data reads as zeros: nothing here is for computing.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub

from ernieq.checkpoint.hub import fetch_small_files, locate, looks_like_hub_id, weight_files
from ernieq.checkpoint.hub_errors import hub_sentence
from ernieq.errors import CheckpointError

_PREFIX_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own bound


@contextmanager
def header_directory(source: str | Path, revision: str | None = None) -> Iterator[Path]:
    """A directory with the headers of a checkpoint; a local directory is itself.

    Args:
        source: path of a directory, or ``organisation/name``.
        revision: branch, tag or commit on the hub.

    Yields:
        The directory; one that was made for a hub id is removed at the end.

    Raises:
        CheckpointError: the path is no directory, or the hub can't be reached or has no such checkpoint.
        UsageError: a revision was given for a local directory.
    """
    if Path(source).exists() or not looks_like_hub_id(str(source)):
        yield locate(source, revision=revision)[0]
        return
    small, commit = fetch_small_files(str(source), revision)
    with tempfile.TemporaryDirectory(prefix="ernieq-headers-") as made:
        for path in small.iterdir():
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copyfile(path, Path(made) / path.name)
        for name in weight_files(small):
            _write_head(Path(made) / name, f"{source}@{commit or revision or 'main'}/{name}", str(source))
        yield Path(made)


def _write_head(target: Path, remote: str, repository: str) -> None:
    try:
        # Without a cache the client asks for the bytes that are read and no more.
        with huggingface_hub.HfFileSystem().open(remote, "rb", cache_type="none") as file:
            size = int(file.size)
            length = bytes(file.read(_PREFIX_BYTES))
            header_bytes = int.from_bytes(length, "little")
            if header_bytes > min(size - _PREFIX_BYTES, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{target.name} of {repository} is truncated or no safetensors file")
            header = bytes(file.read(header_bytes))
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{repository} on the hub holds no {target.name}") from None
    except Exception as error:  # the library and its HTTP client share no base class
        raise CheckpointError(hub_sentence(error, repository)) from error
    with target.open("wb") as copy:
        copy.write(length + header)
        copy.truncate(size)
