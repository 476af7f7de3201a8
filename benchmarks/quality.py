"""Divergence of a model at several recipes from its bf16 original, through the command line that users have.

    python benchmarks/quality.py MODEL --text wikitext2_test.txt --text english_books.txt --work DIR \\
        --out benchmarks/results/mini_quality.json

Protocol: the first 400,000 bytes of each text, tokenised once with the begin token first, the first 48 windows
of 1024 tokens, all shifted tokens scored, float32. Calibration is on the bundled calibration texts alone.
Packed checkpoints and evaluations that are already in the working directory are not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from machine import describe_machine, write_result
from side_by_side import in_order, run

from ernieq.pack import PackedReader

SETTINGS = {
    "uniform-2bit": ["--bits", "2", *(f"--{part}-bits=2" for part in ("attention", "shared", "dense"))],
    "default-2bit": ["--bits", "2"],
    "default-3bit": ["--bits", "3"],
    "default-4bit": ["--bits", "4"],
    "small-2bit": [
        "--bits",
        "2",
        "--attention-bits=3",
        "--shared-bits=3",
        "--dense-bits=3",
        "--embedding-bits=4",
    ],
}
PROTOCOL = ["--window", "1024", "--max-windows", "48", "--max-bytes", "400000"]


def measure(model: Path, texts: list[Path], work: Path, setting: str, device: str) -> list[dict[str, Any]]:
    """Convert, if it has not been done, and evaluate: one row a text."""
    packed, evaluation = work / setting, work / f"{setting}.json"
    if not packed.is_dir():
        run(["quantize", str(model), "--out", str(packed), "--device", device, *SETTINGS[setting]])
    if not evaluation.is_file():
        named = [argument for text in texts for argument in ("--text", str(text))]
        started = time.monotonic()
        options = ["--base", str(model), *named, *PROTOCOL, "--device", device, "--json"]
        printed = run(["eval-ppl", str(packed), *options])
        evaluation.write_text(printed, encoding="utf-8")
        print(f"{setting}: evaluated in {time.monotonic() - started:.0f} s", flush=True)
    report = json.loads(evaluation.read_text(encoding="utf-8"))
    manifest = PackedReader(packed).manifest
    return [row(model.name, setting, entry, report, manifest.report) for entry in report["texts"]]


def row(model: str, setting: str, entry: dict[str, Any], report: dict[str, Any], made: Any) -> dict[str, Any]:
    """The figures of one setting on one text."""
    divergence, weights, text = entry["divergence"], report["weights"], entry["text"]
    return {
        "model": model,
        "setting": setting,
        "options": SETTINGS[setting],
        "text": Path(text["name"]).stem.removesuffix("_test"),
        "text_sha256": text["sha256"],
        "scored_tokens": text["scored_tokens"],
        "perplexity_bf16": entry["base"]["perplexity"],
        "perplexity": entry["perplexity"]["perplexity"],
        "ratio": divergence["perplexity_ratio"],
        "ratio_interval": divergence["ratio_interval"],
        "kl": divergence["mean_kl"],
        "kl_interval": divergence["kl_interval"],
        "kl_p99": divergence["p99_kl"],
        "top1": divergence["top1_agreement"],
        "experts_kept": sum(layer["experts_kept"] for layer in entry["routing"]) / len(entry["routing"]),
        "decoder_bytes": weights["decoder_bytes"],
        "file_bytes": weights["file_bytes"],
        "conversion_seconds": made["seconds"],
        "conversion_device": made.get("device", "cpu"),
    }


def main() -> None:
    """Measure every setting asked for and write one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--work", type=Path, required=True, help="where packed checkpoints are kept")
    parser.add_argument("--setting", choices=SETTINGS, action="append", help="default: all")
    parser.add_argument("--device", default="auto", help="where to convert and evaluate")
    parser.add_argument("--jobs", type=int, default=1, help="settings at a time, shared out among the GPUs")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    tasks = [
        (arguments.model, arguments.text, arguments.work, setting, arguments.device)
        for setting in arguments.setting or SETTINGS
    ]
    rows = [row for rows in in_order(arguments.jobs, arguments.device, measure, tasks) for row in rows]
    for measured in rows:
        print(
            f"{measured['setting']} {measured['text']}: KL {measured['kl']:.4f}, "
            f"ratio {measured['ratio']:.4f}, top-1 {measured['top1']:.3f}, "
            f"decoder {measured['decoder_bytes'] / 1e6:.2f} MB, "
            f"file {measured['file_bytes'] / 1e6:.2f} MB",
            flush=True,
        )
    if arguments.out:
        command = (
            "python benchmarks/quality.py MODEL --text wikitext2_test.txt --text english_books.txt --work DIR"
        )
        write_result(
            arguments.out,
            {"machine": describe_machine(), "command": command, "protocol": PROTOCOL, "rows": rows},
        )


if __name__ == "__main__":
    main()
