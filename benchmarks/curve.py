"""Divergence against bytes, the peers' points beside ours: a conversion at each of their sizes, and a sweep.

    python benchmarks/curve.py MODEL --text wikitext2_test.txt --text english_books.txt --work DIR --jobs 8 \\
        --preset balanced --out benchmarks/results/mini_curve.json
    python benchmarks/curve.py --draw docs/kl_against_bytes.svg benchmarks/results/mini_curve.json

``peers.json`` holds the peers' points. At EXL3's, the decoder has as many bytes and the protocol is windows of
1024, all tokens scored, the first 48 windows of the first 400,000 bytes of each text; the embedding has 8 bits,
and the file is smaller than EXL3's at every point. At llama.cpp's, the file has as many bytes, and the protocol
is its own: 512 tokens of context, the second half scored, 40 windows. Calibration is on bundled texts alone;
the texts given here are for reporting, and nothing is chosen by them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from machine import describe_machine, write_result
from side_by_side import in_order, run

from ernieq.convert import PRESETS, CalibrationSettings, PresetName
from ernieq.pack import MANIFEST_NAME

PEERS = Path(__file__).with_name("peers.json")
SWEEP = (
    1.75,
    2.0,
    2.25,
    2.5,
    3.0,
    3.5,
    4.0,
    5.0,
    6.0,
)  # bits a decoder weight, all bytes of the decoder counted
OWN_TEXT = "own.jsonl"
PROTOCOLS = {
    "EXL3": ["--window", "1024", "--max-windows", "48", "--max-bytes", "400000"],
    "llama.cpp": ["--protocol", "llama.cpp", "--window", "512", "--max-windows", "40"],
}


@dataclass(frozen=True)
class Point:
    """One conversion: what it is measured against, and the options that give it its size."""

    tool: str
    setting: str
    options: tuple[str, ...]
    protocol: str


def points(model: str, decoder_weights: int, tools: list[str]) -> list[Point]:
    """The sizes of the peers that are asked for, and of the sweep."""
    made = []
    for peer in json.loads(PEERS.read_text(encoding="utf-8"))["models"].get(model, []):
        size: tuple[str, ...] = (
            "--target-decoder-size",
            f"{peer['decoder_mb']}MB",
            "--embedding-bits",
            "8",
        )
        if peer["tool"] == "llama.cpp":
            size = ("--target-size", f"{peer['file_mb']}MB")
        made.append(Point(peer["tool"], peer["setting"], size, peer["tool"]))
    for bits in SWEEP:
        size = ("--target-decoder-size", f"{bits * decoder_weights / 8e6:.3f}MB", "--embedding-bits", "8")
        made.append(Point("sweep", f"{bits:g}", size, "EXL3"))
    return [point for point in made if point.tool in tools]


def measure(
    model: Path, point: Point, preset: str, seed: int, texts: list[Path], work: Path, device: str
) -> list[dict[str, Any]]:
    """Convert and evaluate, unless it was done before: one row a text."""
    name = f"{preset}-{point.tool}-{point.setting}-{seed}".replace(" ", "")
    packed, evaluation = work / name, work / f"{name}.json"
    chosen = ["--preset", preset, "--seed", str(seed), "--device", device]
    own = work / OWN_TEXT
    if PRESETS[PresetName(preset)].own_text and own.is_file():
        chosen += ["--text", str(own)]
    if not packed.is_dir():
        run(["quantize", str(model), "--out", str(packed), *point.options, *chosen])
    if not evaluation.is_file():
        named = [argument for text in texts for argument in ("--text", str(text))]
        options = [*named, *PROTOCOLS[point.protocol], "--device", device, "--noise-floor", "--json"]
        evaluation.write_text(run(["eval-ppl", str(packed), "--base", str(model), *options]), encoding="utf-8")
    report = json.loads(evaluation.read_text(encoding="utf-8"))
    manifest = json.loads((packed / MANIFEST_NAME).read_text(encoding="utf-8"))
    return [
        row(model.name, point, preset, seed, entry, report["weights"], manifest) for entry in report["texts"]
    ]


def write_own_text(model: Path, own: Path, device: str) -> None:
    """The text on which --preset best calibrates on a GPU, once for all of its conversions."""
    best = PRESETS[PresetName.BEST]
    tokens = best.windows * CalibrationSettings().window
    run(["sample-text", str(model), "--out", str(own), "--tokens", str(tokens), "--device", device])


def row(
    model: str,
    point: Point,
    preset: str,
    seed: int,
    entry: dict[str, Any],
    weights: dict[str, Any],
    manifest: dict[str, Any],
) -> dict[str, Any]:
    """Our figures on one text."""
    divergence = entry["divergence"]
    return {
        "model": model,
        "tool": point.tool,
        "setting": point.setting,
        "options": ["--preset", preset, "--seed", str(seed), *point.options],
        "preset": preset,
        "protocol": PROTOCOLS[point.protocol],
        "text": Path(entry["text"]["name"]).stem.removesuffix("_test"),
        "decoder_bytes": weights["decoder_bytes"],
        "file_bytes": weights["file_bytes"],
        "kl": divergence["mean_kl"],
        "kl_interval": divergence["kl_interval"],
        "kl_noise": entry["noise"]["mean_kl"],
        "ratio": divergence["perplexity_ratio"],
        "ratio_interval": divergence["ratio_interval"],
        "top1": divergence["top1_agreement"],
        "conversion_seconds": manifest["report"]["seconds"],
    }


def against_peers(rows: list[dict[str, Any]]) -> None:
    """Note beside every row of a peer's size the peer's own figures, and print the table."""
    peers = json.loads(PEERS.read_text(encoding="utf-8"))["models"]
    for ours in rows:
        for peer in peers.get(ours["model"], []):
            if (peer["tool"], peer["setting"]) == (ours["tool"], ours["setting"]):
                ours["peer"] = {key: peer[key] for key in ("decoder_mb", "file_mb")}
                ours["peer"]["kl"] = peer[ours["text"]]
                ours["share_of_peer"] = ours["kl"] / peer[ours["text"]]
        share = f", {ours['share_of_peer']:.3f} of {ours['tool']}'s" if "share_of_peer" in ours else ""
        print(
            f"{ours['preset']:9} {ours['tool']:9} {ours['setting']:8} {ours['text']:14} "
            f"KL {ours['kl']:.4f}{share}, ratio {ours['ratio']:.4f}, "
            f"decoder {ours['decoder_bytes'] / 1e6:.2f} MB, "
            f"file {ours['file_bytes'] / 1e6:.2f} MB, noise {ours['kl_noise']:.5f}, "
            f"{ours['conversion_seconds']:.0f} s",
            flush=True,
        )


def draw(result: dict[str, Any], picture: Path) -> None:
    """KL against the bytes of the decoder, a panel a text, by the protocol of the first table."""
    import matplotlib.pyplot as plt

    model = result["rows"][0]["model"]
    peers = json.loads(PEERS.read_text(encoding="utf-8"))["models"][model]
    texts = sorted({row["text"] for row in result["rows"]}, reverse=True)
    figure, axes = plt.subplots(1, len(texts), figsize=(6 * len(texts), 4.2), squeeze=False)
    for axis, text in zip(axes[0], texts, strict=True):
        for tool, marker in (("EXL3", "s"), ("llama.cpp", "^")):
            theirs = [
                (peer["decoder_mb"], peer[text], peer["setting"]) for peer in peers if peer["tool"] == tool
            ]
            if theirs:
                megabytes, divergence, settings = zip(*sorted(theirs), strict=True)
                axis.plot(megabytes, divergence, marker=marker, linestyle="none", label=tool)
                for setting, *place in zip(settings, megabytes, divergence, strict=True):
                    axis.annotate(setting, place, xytext=(4, 4), textcoords="offset points", fontsize=7)
        for preset, style in (("balanced", "o-"), ("best", "o--")):
            ours = sorted(
                (row["decoder_bytes"] / 1e6, row["kl"])
                for row in result["rows"]
                if row["text"] == text and row["preset"] == preset and row["tool"] in ("sweep", "EXL3")
            )
            if ours:
                axis.plot(*zip(*ours, strict=True), style, markersize=3, label=f"ernieq, {preset}")
        axis.set_yscale("log")
        axis.set(title=f"{model}, {text}", xlabel="decoder, MB", ylabel="KL from bf16, nats per token")
        axis.legend()
    figure.tight_layout()
    figure.savefig(picture, metadata={"Date": None})


def decoder_weights(model: Path) -> int:
    """Parameters outside embedding and head."""
    from ernieq.load import open_stream
    from ernieq.model import expected_parameters

    specs = expected_parameters(open_stream(model).config)
    ends = ("model.embed_tokens.", "lm_head.")
    return sum(prod(spec.shape) for name, spec in specs.items() if not name.startswith(ends))


def main() -> None:
    """Measure, or draw what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model; with --draw a result of this script")
    parser.add_argument("--draw", type=Path, metavar="PICTURE", help="only draw a result that is there")
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--work", type=Path, help="where packed checkpoints are kept")
    parser.add_argument("--tool", choices=("EXL3", "llama.cpp", "sweep"), action="append", help="default: all")
    parser.add_argument("--preset", action="append", help="default: balanced")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, shared out among the GPUs")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.draw:
        draw(json.loads(arguments.model.read_text(encoding="utf-8")), arguments.draw)
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    tools = arguments.tool or ["EXL3", "llama.cpp", "sweep"]
    where = (arguments.seed, arguments.text, arguments.work, arguments.device)
    own = arguments.work / OWN_TEXT
    if PresetName.BEST in (arguments.preset or []) and arguments.device != "cpu" and not own.is_file():
        in_order(1, arguments.device, write_own_text, [(arguments.model, own, arguments.device)])
    tasks = [
        (arguments.model, point, preset, *where)
        for preset in arguments.preset or ["balanced"]
        for point in points(arguments.model.name, decoder_weights(arguments.model), tools)
    ]
    rows = [row for rows in in_order(arguments.jobs, arguments.device, measure, tasks) for row in rows]
    against_peers(rows)
    if arguments.out:
        command = (
            "python benchmarks/curve.py MODEL --text wikitext2_test.txt --text english_books.txt --work DIR"
        )
        write_result(arguments.out, {"machine": describe_machine(), "command": command, "rows": rows})


if __name__ == "__main__":
    main()
