"""``ernieq quantize``: a checkpoint in, a packed one at 1.5 to 6 bits out."""

from __future__ import annotations

import dataclasses
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import torch

from ernieq.bundled import BUNDLED_PREFIX, DEFAULT_MODEL
from ernieq.cli.allocating import allocate, convert_in_rounds
from ernieq.cli.allocation_options import chosen_target, target_options
from ernieq.cli.calibrate import read_texts
from ernieq.cli.conversion_device import settle_conversion
from ernieq.cli.conversion_output import print_result, tuning_sentence
from ernieq.cli.conversion_run import ConversionRun
from ernieq.cli.preflight import announce, conclude, prepare, print_dry_run
from ernieq.cli.sample_text import own_text
from ernieq.cli.shared import (
    backend_option,
    device_option,
    directories,
    json_option,
    overwrite_option,
    progress_report,
    restart_option,
    seed_option,
    source_checkpoint,
    text_option,
    threads_option,
    vram_option,
)
from ernieq.cli.stopping import stopping_gently
from ernieq.convert import (
    PRESETS,
    HessianDirectory,
    Part,
    PresetName,
    Recipe,
    SourceScan,
    Staging,
    apply_overrides,
    check_place,
    check_writable,
    default_recipe,
    read_recipe,
    stated_parts,
)
from ernieq.encode import EncodeOptions
from ernieq.errors import UsageError
from ernieq.kernels.backend import Backend
from ernieq.kernels.viterbi import SHORT_FIRST_PASS

_PART_OPTIONS = {
    "attention_bits": Part.ATTENTION,
    "shared_bits": Part.SHARED_EXPERTS,
    "dense_bits": Part.DENSE_MLP,
    "embedding_bits": Part.EMBEDDING,
    "head_bits": Part.HEAD,
}


def _part_options(function: Any) -> Any:
    for name, part in reversed(_PART_OPTIONS.items()):
        flag = "--" + name.replace("_", "-")
        words = f"Bits of {part.replace('_', ' ').replace('mlp', 'MLP')}.  [default: as --bits calls for]"
        function = click.option(flag, type=float, metavar="BITS", help=words)(function)
    return function


@click.command(name="quantize")
@click.argument("model", required=False, shell_complete=directories)
@click.option(
    "--bits",
    type=float,
    metavar="BITS",
    help="Bits of the routed experts, which are most of the model: 1.5 to 6 in halves.  [default: 2]",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Directory to write.  [default: ./NAME-2bit or such]"
)
@click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(path_type=Path),
    help="A TOML file: bits of parts and of single modules, and settings that have no option.",
)
@target_options
@_part_options
@click.option(
    "--preset",
    type=click.Choice([name.value for name in PresetName]),
    default=PresetName.BALANCED.value,
    show_default=True,
    help="fast: short search, 32 windows; balanced: full search, 64 windows; "
    "best: 460 windows, --own-text on a GPU, --tune.",
)
@text_option
@click.option(
    "--own-text/--no-own-text",
    default=None,
    help="Calibrate on text that the model writes itself, kept beside the output.  "
    "[default: with --preset best, on a GPU that holds the model]",
)
@click.option(
    "--hessians",
    type=click.Path(path_type=Path),
    help="Use the output of ernieq calibrate in place of texts: quicker, but errors are not corrected.",
)
@click.option("--windows", type=click.IntRange(min=1), help="Calibration windows.  [default: the preset's]")
@click.option("--window", type=click.IntRange(min=16), help="Tokens of a calibration window.  [default: 2048]")
@click.option(
    "--state-bits",
    type=int,
    metavar="NUMBER",
    help="Length of the code's state; 12 to 14 are for a quick try (at least twice the bits of every part).  "
    "[default: 16]",
)
@click.option(
    "--fast",
    is_flag=True,
    help="The short search of --preset fast, and nothing else of it: a quarter less time, 1.5 % more error.",
)
@click.option(
    "--tune/--no-tune",
    default=None,
    help="Tune channel scales and norms after rounding, by distillation on the same text.  "
    "[default: as the preset]",
)
@click.option("--tune-steps", type=click.IntRange(min=1), help="Steps of --tune at most.  [default: 100]")
@click.option("--revision", help="Branch, tag or commit of a hub repository.")
@click.option("--dry-run", is_flag=True, help="Print the plan (sizes, memory, disk, time) and stop.")
@seed_option
@threads_option
@backend_option
@device_option
@vram_option
@overwrite_option
@restart_option
@json_option
def command(
    model: str | None,
    bits: float | None,
    out: Path | None,
    recipe_file: Path | None,
    texts: tuple[Path, ...],
    hessians: Path | None,
    revision: str | None,
    dry_run: bool,
    threads: int,
    backend: Backend,
    device: torch.device,
    vram: float | None,
    overwrite: bool,
    restart: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Quantize MODEL: a directory, a hub id, or the small bundled model if none is named.

    Say --bits, or one target: --target-size, --target-decoder-size, --target-bpw or --max-kl. For a target the
    model is measured first, and every part of every layer gets the bits that its errors call for; parts whose
    bits you state keep them.

    A run that was interrupted in any way is resumed by the same command: finished work is kept in OUT.partial.

    Bits of a part can be 1.5 to 6 in halves, 7, 8, or 16 to keep the numbers of the source.

    \b
    Examples:
      ernieq quantize --bits 2
      ernieq quantize --bits 2.5 --attention-bits 5 --dry-run
      ernieq quantize baidu/ERNIE-4.5-21B-A3B-Base-PT --target-size 6GB --out ernie-21b-6gb
      ernieq quantize ./my-model --max-kl 0.1 --preset fast
      ernieq quantize ./my-model --bits 2 --tune
    """
    torch.set_num_threads(threads)
    name = model or BUNDLED_PREFIX + DEFAULT_MODEL
    target = chosen_target(settings, bits, hessians)
    recipe = _recipe(bits, recipe_file, settings)
    _check_texts(texts, hessians, settings)
    with progress_report(f"opening {name}", unit="weights") as progress, ExitStack() as stack:
        checkpoint = stack.enter_context(
            source_checkpoint(name, revision, headers_only=dry_run and target is None)
        )
        label = f"{recipe.bits:g}bit" if target is None else target.label
        out = out or Path(f"{Path(name.removeprefix(BUNDLED_PREFIX)).name}-{label}")
        options = EncodeOptions(backend=backend, threads=threads)
        device, vram_bytes = settle_conversion(device, vram, backend, quiet=as_json)
        check_place(checkpoint, out, overwrite=overwrite or dry_run)
        check_writable(out.resolve())
        staging = None if dry_run else stack.enter_context(Staging(out, restart=restart))
        if not dry_run:
            wanted = _wants_own_text(settings, given=bool(texts or hessians))
            texts += own_text(checkpoint.directory, out, recipe, device, progress, wanted=wanted)
        calibration = read_texts(texts) if hessians is None else HessianDirectory(hessians)
        run = ConversionRun(
            checkpoint,
            name,
            out,
            overwrite,
            calibration,
            options,
            device,
            vram_bytes,
            progress,
            staging,
            stack.enter_context(stopping_gently()),
        )
        scan = SourceScan(checkpoint)
        started = time.monotonic()
        allocated = allocate(run, recipe, target, _pinned(recipe_file, settings)) if target else None
        allocation = allocated.allocation if allocated else None
        measuring = max(0.0, time.monotonic() - started)
        prepared = prepare(run, recipe, allocated, measuring)
        if dry_run:
            print_dry_run(prepared, as_json=as_json)
            return
        if not as_json:
            announce(prepared, scan)
        kl: float | None = None
        if allocated and allocated.held_out is not None:
            report, kl = convert_in_rounds(run, allocated)
        else:
            report = run.convert(recipe, allocation)
        if staging is not None:
            staging.remove()
        seconds = max(0.0, time.monotonic() - started)
        if report.tuning is not None:
            progress.line(tuning_sentence(report.tuning))
        elif report.untuned:
            progress.warn(f"not tuned: {report.untuned}")
        if not as_json:
            conclude(run, scan)
    print_result(run, report, seconds, kl, as_json=as_json)
    checkpoint.close()


def _pinned(recipe_file: Path | None, settings: dict[str, Any]) -> list[Part]:
    """Parts whose bits the user gave, in options or in the recipe file: no target changes them."""
    stated = stated_parts(recipe_file) if recipe_file else []
    return [*stated, *(part for key, part in _PART_OPTIONS.items() if settings[key] is not None)]


def _recipe(bits: float | None, recipe_file: Path | None, settings: dict[str, Any]) -> Recipe:
    """Defaults, then the preset, then the file, then the options."""
    preset = PRESETS[PresetName(settings["preset"])].settings()
    if recipe_file:
        recipe = read_recipe(recipe_file, bits, preset)
    else:
        recipe = apply_overrides(default_recipe(2 if bits is None else bits), preset, "preset")
    if bits is not None:
        recipe = dataclasses.replace(recipe, parts={**recipe.parts, Part.ROUTED_EXPERTS: recipe.bits})
    parts = {str(part): settings[key] for key, part in _PART_OPTIONS.items() if settings[key] is not None}
    encode = {"state_bits": settings["state_bits"]} if settings["state_bits"] is not None else {}
    if settings["fast"]:
        encode["first_pass_steps"] = SHORT_FIRST_PASS
    calibration = {key: settings[key] for key in ("windows", "window") if settings[key] is not None}
    raw = {"parts": parts, "encode": encode, "calibration": calibration, "tune": _tune_settings(settings)}
    if settings["seed"] or recipe_file is None:
        raw["seed"] = settings["seed"]
    recipe = apply_overrides(recipe, raw, "options")
    if settings["tune_steps"] is not None and not recipe.tune.enabled:
        raise UsageError("--tune-steps means nothing without --tune")
    return recipe


def _tune_settings(settings: dict[str, Any]) -> dict[str, Any]:
    given = {"enabled": settings["tune"], "steps": settings["tune_steps"]}
    return {key: value for key, value in given.items() if value is not None}


def _wants_own_text(settings: dict[str, Any], *, given: bool) -> bool | None:
    """Whether the model is to write the calibration text; None if it may, where it can."""
    asked: bool | None = settings["own_text"]
    if asked is not None:
        return asked
    return None if PRESETS[PresetName(settings["preset"])].own_text and not given else False


def _check_texts(texts: tuple[Path, ...], hessians: Path | None, settings: dict[str, Any]) -> None:
    """Refuse options of the calibration text that mean nothing beside one another."""
    if settings["own_text"] and (texts or hessians):
        raise UsageError("--own-text means nothing beside --text and --hessians: leave one out")
    if hessians is None:
        return
    if settings["tune"]:
        raise UsageError("--tune needs the calibration text, and stored Hessians have none: leave one out")
    if texts or settings["windows"] or settings["window"]:
        raise UsageError(
            "--text, --windows and --window mean nothing beside --hessians: "
            "the sample was drawn when the Hessians were collected"
        )
