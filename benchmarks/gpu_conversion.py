"""One MoE layer at the shapes of the 21B model: calibrated, and quantized from shard to packed file.

python benchmarks/gpu_conversion.py --out benchmarks/results/gpu_conversion.json

Times are of undisturbed runs; the shares come from a second run of each, whose phases wait for the GPU.
``--experts 8 --windows 16`` makes it small enough to try.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from machine import describe_gpu, describe_machine, write_result
from synthetic_layer import LAYER, Shape, hidden_states, write_layer
from torch import Tensor

import ernieq
from ernieq.calibrate import AttentionPass, MlpPass, Streams, collect_layer, narrow_layer
from ernieq.checkpoint import Checkpoint, load_layer
from ernieq.convert import LayerQuantizer, Workplace, default_recipe
from ernieq.convert.groups import GroupEncoder
from ernieq.convert.journal import Journal
from ernieq.convert.overlap import BackgroundQueue
from ernieq.convert.snapshots import Mark
from ernieq.convert.unit_store import UnitStore
from ernieq.encode import EncodeOptions, encode_matrices, input_signs
from ernieq.model import DecoderLayer, Rotary
from ernieq.pack import Manifest, PackedWriter, Source
from ernieq.trellis import TrellisCode

GIGABYTE = 1_000_000_000
QUANTIZED_WINDOWS = 64

# What is timed: where a function is looked up, its name, and what its time counts as. Phases nest: the search
# is inside LDLQ, and time counts for the innermost.
PHASES = (
    *((AttentionPass, name, "attention") for name in ("input_moments", "context_moments", "advance")),
    *((MlpPass, name, "dense moments") for name in ("__init__", "input_moments", "down_moments", "advance")),
    *((MlpPass, name, "expert moments") for name in ("experts_input_moments", "experts_down_moments")),
    (MlpPass, "add_experts", "expert outputs"),
    ("ernieq.convert.layer", "corrected_weight", "corrections"),
    ("ernieq.encode.curvature", "block_ldl_factors", "factors"),
    ("ernieq.encode.batch_matrix", "encode_ldlq_batch", "LDLQ but for the search"),
    ("ernieq.encode.batch_feedback", "search_tiles", "search"),
    ("ernieq.encode.batch_matrix", "pack_rings", "packing"),
)


@dataclass
class Stopwatch:
    """Seconds by phase, each without what is counted as a phase inside it."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    _inner: list[float] = field(default_factory=list)

    def watch(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """The function, timed with all that it leaves to the GPU."""

        def timed(*arguments: Any, **options: Any) -> Any:
            finish(self.device)
            self._inner.append(0.0)
            started = time.perf_counter()
            result = function(*arguments, **options)
            finish(self.device)
            taken = time.perf_counter() - started
            self.seconds[phase] = self.seconds.get(phase, 0.0) + taken - self._inner.pop()
            if self._inner:
                self._inner[-1] += taken
            return result

        return timed

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time all phases."""
        patches = []
        for place, name, phase in PHASES:
            if isinstance(place, str):
                module = __import__(place, fromlist=[name])
                patches.append(patch(f"{place}.{name}", self.watch(getattr(module, name), phase)))
            else:
                patches.append(patch.object(place, name, self.watch(getattr(place, name), phase)))
        for each in patches:
            each.start()
        try:
            yield
        finally:
            for each in patches:
                each.stop()


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def placed_layer(checkpoint: Checkpoint, place: Workplace) -> DecoderLayer:
    if not place.is_gpu:
        return load_layer(checkpoint, LAYER)
    return narrow_layer(load_layer(checkpoint, LAYER, None), place.device)


def rotary_of(checkpoint: Checkpoint, streams: Streams) -> tuple[Tensor, Tensor]:
    cosine, sine = Rotary(checkpoint.config).angles(torch.arange(streams.shape[1]))
    return cosine.to(streams.device), sine.to(streams.device)


def measured(place: Workplace, work: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of some work within the memory it is given, and the memory it took."""
    if place.is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(place.device)
    with torch.no_grad(), place.limited():
        started = time.perf_counter()
        work()
        finish(place.device)
        result: dict[str, Any] = {"seconds": time.perf_counter() - started}
        if place.is_gpu:
            result["peak_bytes"] = torch.cuda.max_memory_allocated(place.device)
            result["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(place.device)
    return result


def calibrate(checkpoint: Checkpoint, place: Workplace, hidden: Streams, notices: list[str]) -> dict[str, Any]:
    """All Hessians of the layer; the streams are put in their place, and the layer is read, beforehand."""
    config, tokens = checkpoint.config, hidden.shape[0] * hidden.shape[1]
    streams, layer = place.place(hidden), placed_layer(checkpoint, place)
    batches = place.expert_batches(config, tokens, notices.append)
    rotary = rotary_of(checkpoint, streams)
    result = measured(place, lambda: collect_layer(config, LAYER, layer, streams, rotary, 1.0, batches.run))
    return result | {"tokens": tokens, "on_gpu": streams.resident, "experts_at_once": batches.size}


def quantize(
    checkpoint: Checkpoint, place: Workplace, hidden: Streams, out: Path, notices: list[str]
) -> dict[str, Any]:
    """The layer from the shard to a verified packed file; the streams are put in their place beforehand."""
    config, recipe = checkpoint.config, default_recipe(2)
    tokens, weights = hidden.shape[0] * hidden.shape[1], list[int]()
    streams = place.place(Streams(hidden.reference.clone(), hidden.quantized.clone()))
    rotary, batches = rotary_of(checkpoint, streams), place.expert_batches(config, tokens, notices.append)
    options = EncodeOptions(
        damping=recipe.encode.damping,
        first_pass_steps=recipe.encode.first_pass_steps,
        memory_bytes=place.encoding_bytes(config, tokens),
        on_notice=notices.append,
    )
    errors: dict[str, float] = {}

    def work() -> None:
        with PackedWriter(out) as writer:
            with tempfile.TemporaryDirectory(dir=out.parent) as folder, BackgroundQueue() as queue:
                journal = Journal(Path(folder) / "journal.jsonl")
                units = UnitStore(Path(folder), journal, "synthetic", queue)
                encoder = GroupEncoder(recipe, options, units, weights.append)
                quantizer = LayerQuantizer(config, recipe.encode, encoder, batches)
                report = quantizer.run(Mark(LAYER), placed_layer(checkpoint, place), streams, rotary)
                queue.wait()
                for name in units.used:
                    writer.add_encoded(name, units.matrix(name))
            source = Source("synthetic", None, {})
            writer.finish(
                checkpoint.raw_config, Manifest(ernieq.__version__, source, recipe.to_dict(), recipe.seed)
            )
        errors["mean_proxy_error"] = sum(report.errors.values()) / len(report.errors)
        errors["output_error"] = report.output_error

    return measured(place, work) | errors | {
        "weights": sum(weights),
        "tokens": tokens,
        "on_gpu": streams.resident,
        "experts_at_once": batches.size,
    }  # fmt: skip


def with_shares(device: torch.device, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A run undisturbed, and the shares of its phases from another."""
    result, watch = run(), Stopwatch(device)
    with watch.watching():
        again = run()
    known = sum(watch.seconds.values())
    phases = watch.seconds | {"other": max(0.0, again["seconds"] - known)}
    result["shares"] = {name: seconds / again["seconds"] for name, seconds in phases.items()}
    result["seconds_when_timed"] = again["seconds"]
    ldlq = sum(watch.seconds.get(name, 0.0) for name in ("LDLQ but for the search", "search"))
    if result.get("weights") and ldlq:
        result["ldlq_weights_per_second"] = result["weights"] / ldlq
        result["weights_per_second"] = result["weights"] / result["seconds"]
    return result


def show(name: str, row: dict[str, Any]) -> None:
    memory = f", peak {row['peak_bytes'] / GIGABYTE:.2f} GB" if "peak_bytes" in row else ""
    rate = (
        f", {row['ldlq_weights_per_second'] / 1e6:.1f} M weights/s in LDLQ"
        if "weights_per_second" in row
        else ""
    )
    print(f"{name}: {row['seconds']:.2f} s{memory}{rate}, {row['experts_at_once']} experts at once", flush=True)
    for phase, share in sorted(row["shares"].items(), key=lambda item: -item[1]):
        print(f"    {phase:<26}{100 * share:5.1f} %")
    for notice in row["notices"]:
        print(f"    {notice}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=Shape.experts)
    parser.add_argument("--hidden", type=int, default=Shape.hidden)
    parser.add_argument("--expert-width", type=int, default=Shape.expert_width)
    parser.add_argument("--windows", type=int, default=256, help="for calibration; quantizing takes at most 64")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--vram", type=float, nargs="*", default=[16.0, 8.0], help="GB to quantize within")
    parser.add_argument("--device", default="cuda", help="cpu only to try the script")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    shape = Shape(arguments.experts, arguments.hidden, arguments.expert_width)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_layer(Path(folder) / "source", shape, device)
        measure_all(checkpoint, shape, device, arguments, Path(folder), rows)
    if arguments.out:
        command = "python benchmarks/gpu_conversion.py --out FILE"
        machine = describe_machine() | (describe_gpu() if device.type == "cuda" else {})
        write_result(arguments.out, {"machine": machine, "command": command, "rows": rows})


def warm_up(device: torch.device) -> None:
    """Compile the search of the codes that the recipe uses, and let the libraries set themselves up."""
    for bits in (2, 4):
        weight, signs = torch.randn(32, 128, device=device), input_signs(0, "warm-up", 128)
        encode_matrices({"w": weight}, torch.eye(128, device=device), signs, TrellisCode(bits), EncodeOptions())


def measure_all(
    checkpoint: Checkpoint,
    shape: Shape,
    device: torch.device,
    arguments: argparse.Namespace,
    folder: Path,
    rows: dict[str, Any],
) -> None:
    def note(name: str, run: Callable[[list[str]], dict[str, Any]]) -> None:
        notices: list[str] = []
        rows[name] = with_shares(device, lambda: run(notices)) | {"notices": notices}
        show(name, rows[name])

    warm_up(device)
    hidden = hidden_states(shape, arguments.windows, arguments.length, device)
    note(
        f"calibration, {arguments.windows} windows",
        lambda notices: calibrate(checkpoint, Workplace.on(device), hidden, notices),
    )
    del hidden
    windows = min(QUANTIZED_WINDOWS, arguments.windows)
    hidden = hidden_states(shape, windows, arguments.length, device)
    runs = 0
    for gigabytes in arguments.vram:

        def run(notices: list[str], gigabytes: float = gigabytes) -> dict[str, Any]:
            nonlocal runs
            runs += 1
            bound = int(gigabytes * GIGABYTE) if device.type == "cuda" else None
            place = Workplace.on(device, bound)
            return quantize(checkpoint, place, hidden, folder / f"packed-{runs}", notices)

        note(f"quantizing, {windows} windows, {gigabytes:g} GB", run)


if __name__ == "__main__":
    main()
