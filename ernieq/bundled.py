"""Where the bundled model and texts lie, in a checkout and in an installed wheel.

A checkout keeps the calibration texts in ``calib/`` at its top, so that they can be read and replaced without
knowing the package; a wheel has no such place, so its build puts the same files into ``ernieq/data/calib``.
Nothing here reads a weight or needs torch.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ernieq.errors import TextError, UsageError

DEFAULT_MODEL = "ernieq-nano"
BUNDLED_PREFIX = "bundled:"

_PACKAGE = Path(__file__).resolve().parent
_DATA = _PACKAGE / "data"
_EVALUATION_TEXT = _DATA / "text"
_MANIFEST = "manifest.toml"


@dataclass(frozen=True)
class BundledText:
    """One text of a manifest: where it lies, where it comes from, and what its bytes hash to."""

    name: str
    path: Path
    source: str
    licence: str
    sha256: str
    characters: int


def bundled_models() -> list[str]:
    """Names of the models that this installation carries."""
    return sorted(config.parent.name for config in _DATA.glob("*/config.json"))


def bundled_model(name: str = DEFAULT_MODEL) -> Path:
    """Directory of a bundled model.

    Raises:
        UsageError: no model of that name is bundled.
    """
    if name not in bundled_models():
        raise UsageError(f"no model {name!r} is bundled in {_DATA}; it has {_listed(bundled_models())}")
    return _DATA / name


def resolve_source(source: str | Path) -> Path | str:
    """Turn ``bundled`` or ``bundled:NAME`` into that model's directory; a path or a hub id comes back as it is.

    Raises:
        UsageError: no model of that name is bundled.
    """
    if source == BUNDLED_PREFIX.rstrip(":"):
        return bundled_model()
    if isinstance(source, str) and source.startswith(BUNDLED_PREFIX):
        return bundled_model(source.removeprefix(BUNDLED_PREFIX))
    return source


def calibration_directory() -> Path:
    """Directory of the bundled calibration texts and their ``manifest.toml``.

    Raises:
        TextError: this installation has none.
    """
    places = (_DATA / "calib", _PACKAGE.parent / "calib")
    for place in places:
        if (place / _MANIFEST).is_file():
            return place
    raise TextError(
        f"the bundled calibration texts are in none of {_listed(places)}; install ernieq again or name a text"
    )


def calibration_texts() -> tuple[BundledText, ...]:
    """The bundled calibration texts in the order of their manifest.

    Raises:
        TextError: the texts or their manifest are missing or broken.
    """
    return read_manifest(calibration_directory())


def evaluation_texts() -> tuple[BundledText, ...]:
    """The bundled evaluation texts in the order of their manifest.

    Raises:
        TextError: the texts or their manifest are missing or broken.
    """
    return read_manifest(_EVALUATION_TEXT)


def evaluation_text(name: str) -> Path:
    """File of a bundled evaluation text, for example ``wikitext2``.

    Raises:
        TextError: no evaluation text of that name is bundled.
    """
    texts = {text.name: text.path for text in evaluation_texts()}
    if name not in texts:
        raise TextError(f"no evaluation text {name!r} is bundled; there is {_listed(texts)}")
    return texts[name]


def read_manifest(directory: Path) -> tuple[BundledText, ...]:
    """Read ``manifest.toml``, which lists the texts of a directory.

    Raises:
        TextError: the manifest is missing or malformed, or a file that it lists is missing.
    """
    path = directory / _MANIFEST
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))["text"]
        texts = tuple(
            BundledText(
                name=str(entry["name"]),
                path=directory / str(entry["file"]),
                source=str(entry["source"]),
                licence=str(entry["licence"]),
                sha256=str(entry["sha256"]),
                characters=int(entry["characters"]),
            )
            for entry in entries
        )
    except OSError as error:
        raise TextError(f"the text manifest {path} can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise TextError(f"the text manifest {path} is malformed: {type(error).__name__} {error}") from error
    for text in texts:
        if not text.path.is_file():
            raise TextError(f"{text.path}, which {path} lists, is missing")
    return texts


def _listed(names: Iterable[object]) -> str:
    """Names for a sentence."""
    return ", ".join(str(name) for name in names) or "none"
