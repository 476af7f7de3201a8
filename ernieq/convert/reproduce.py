"""Run the conversion of a packed checkpoint again, from what its manifest says: the inputs, found and checked.

A manifest names every input by its sha256. Whatever is missing or has changed is refused by its name before the
work begins. The bits of an allocation stand in the recipe, so nothing is measured again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ernieq.bundled import calibration_texts
from ernieq.calibrate import TextFile, read_text_file
from ernieq.checkpoint import Checkpoint
from ernieq.convert.job import Conversion
from ernieq.convert.listener import ConversionReport, Listener
from ernieq.convert.recipe import Recipe, apply_overrides, default_recipe
from ernieq.convert.stored import HessianDirectory
from ernieq.convert.workplace import Workplace
from ernieq.encode import EncodeOptions
from ernieq.errors import BackendUnavailableError, CheckpointError, FormatError, TextError, UsageError
from ernieq.pack import CalibrationRecord, Manifest, file_sha256


def recorded_recipe(manifest: Manifest) -> Recipe:
    """The recipe of a manifest; settings that its writer did not know yet have their defaults.

    Raises:
        FormatError: there is none, or it is not that of the manifest's seed.
        RecipeError: it has a key or value that means nothing here.
    """
    raw = dict(manifest.recipe)
    bits = raw.get("bits")
    if not isinstance(bits, int | float) or isinstance(bits, bool) or not isinstance(raw.get("parts"), Mapping):
        raise FormatError("its manifest holds no recipe of ernieq quantize, so there is nothing to run again")
    if raw.get("seed") != manifest.seed:
        raise FormatError(f"its manifest has the seed {manifest.seed}, its recipe another")
    recipe = apply_overrides(
        dataclasses.replace(default_recipe(2), bits=bits), raw, "the recipe in the manifest"
    )
    if recipe.tune.enabled and manifest.report.get("tuning") is None:  # asked for, and not done
        return dataclasses.replace(recipe, tune=dataclasses.replace(recipe.tune, enabled=False))
    return recipe


def made_on_gpu(manifest: Manifest) -> bool:
    """Whether the search counted as a GPU does."""
    return manifest.report.get("search_arithmetic") == "float16"


def check_arithmetic(manifest: Manifest, device: torch.device) -> None:
    """Refuse a device whose search counts in other numbers than the one of the conversion.

    Raises:
        BackendUnavailableError: a GPU is needed, or the CPU.
    """
    if made_on_gpu(manifest) == (device.type == "cuda"):
        return
    name, wanted = manifest.report.get("device", "a CPU"), "cuda" if made_on_gpu(manifest) else "cpu"
    here, there = ("int16", "float16") if wanted == "cuda" else ("float16", "int16")
    raise BackendUnavailableError(
        f"the checkpoint was converted on {name}, whose search counts in {there}; {device} counts in {here} "
        f"and would find other codes: it can only be reproduced with --device {wanted}"
    )


def check_source(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Hash the weights and the tokenizer of the source, and compare them with the manifest.

    Raises:
        CheckpointError: a file is missing, has changed, or was not there.
    """
    found = {path.name: path for path in checkpoint.shard_files()}
    copied = {path.name: path for path in checkpoint.aux_files()}
    tokenizer = {name: digest for name, digest in manifest.files.items() if name in copied}
    _check_files(manifest.source.files, found, f"the source {checkpoint.directory}")
    if extra := sorted(set(found) - set(manifest.source.files)):
        raise CheckpointError(
            f"the source {checkpoint.directory} holds {extra[0]}, which the checkpoint was not made from"
        )
    _check_files(tokenizer, copied, f"the source {checkpoint.directory}")


def check_hessians(record: CalibrationRecord, stored: HessianDirectory | None) -> HessianDirectory | None:
    """The Hessians that a conversion used; None if it ran texts through the model.

    Raises:
        CheckpointError: they are not at hand, a file of theirs is missing, or one has changed.
        UsageError: some were given, and none were used.
    """
    if record.hessians is None:
        if stored is not None:
            raise UsageError(
                "the checkpoint was calibrated on texts, not on stored Hessians: leave --hessians out"
            )
        return None
    if stored is None:
        raise CheckpointError(
            f"the checkpoint was made from stored Hessians ({len(record.hessians)} files, the first is "
            f"{next(iter(record.hessians), 'missing')}); name their directory with --hessians"
        )
    _check_files(record.hessians, stored.files(), f"the Hessians {stored.path}")
    return stored


def find_texts(record: CalibrationRecord, given: Sequence[Path], beside: Path) -> list[TextFile]:
    """The texts of a record, in its order: given ones, bundled ones, and own text beside the checkpoint.

    Args:
        record: says name and sha256 of every text.
        given: files of the user; each must be one of the record.
        beside: directory that ``--own-text`` has written to.

    Raises:
        TextError: a text is missing or has changed.
        UsageError: a file was given that is none of the record.
    """
    own = [beside / name for name in record.files if Path(name).name == name and (beside / name).is_file()]
    texts = [read_text_file(path) for path in given]
    for text in texts:
        if text.path.name in record.files and text.sha256 not in record.files.values():
            raise TextError(f"the text {text.path} has changed: its sha256 is not the one in the manifest")
        if text.sha256 not in record.files.values():
            names = ", ".join(record.files)
            raise UsageError(f"the checkpoint was not calibrated on {text.path}; its texts are {names}")
    at_hand = {text.sha256: text for text in texts}
    for path in [*own, *(bundled.path for bundled in calibration_texts())]:
        if set(record.files.values()) - set(at_hand):
            text = read_text_file(path)
            at_hand.setdefault(text.sha256, text)
    for name, digest in record.files.items():
        if digest not in at_hand:
            raise TextError(
                f"the calibration text {name} (sha256 {digest[:12]}...) is not at hand; name it with --text"
            )
    return [at_hand[digest] for digest in record.files.values()]


def run_again(
    manifest: Manifest,
    checkpoint: Checkpoint,
    calibration: Sequence[TextFile] | HessianDirectory,
    out: Path,
    options: EncodeOptions,
    listener: Listener | None = None,
    *,
    workplace: Workplace,
    overwrite: bool = False,
) -> ConversionReport:
    """Convert as the manifest says; the inputs are those that were checked.

    Args:
        manifest: of the packed checkpoint.
        checkpoint: its source.
        calibration: its texts or Hessians.
        out: directory to write.
        options: backend and threads.
        listener: told what happens.
        workplace: device, and GPU memory that may be used.
        overwrite: whether ``out`` may be replaced.

    Raises:
        BackendUnavailableError: it was tuned, which the device is too small for, or has too little memory.
        ErnieqError: anything that a conversion raises.
    """
    conversion = Conversion(
        checkpoint,
        manifest.source.name_or_path,
        recorded_recipe(manifest),
        calibration,
        options,
        listener,
        device=workplace.device,
        vram_bytes=workplace.vram_bytes,
        allocation=manifest.report.get("allocation"),
    )
    if conversion.untuned:
        raise BackendUnavailableError(f"the checkpoint was tuned, and can't be here: {conversion.untuned}")

    about = f"# {out.name}\n\n{manifest.source.name_or_path}, converted again by `ernieq reproduce`.\n"
    return conversion.run(out, overwrite=overwrite, card=lambda _: about)


def _check_files(wanted: Mapping[str, str], found: Mapping[str, Path], where: str) -> None:
    for name, digest in wanted.items():
        if name not in found:
            raise CheckpointError(f"{where}: {name}, which the checkpoint was made from, is missing")
        if file_sha256(found[name]) != digest:
            raise CheckpointError(f"{where}: {name} has changed: its sha256 is not the one in the manifest")
