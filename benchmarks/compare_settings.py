"""Settings of a conversion against each other on validation text, over seeds of the rotation and the sample.

    python benchmarks/compare_settings.py MODEL --text english_novels.txt --work DIR --seeds 0 1 2 \\
        --setting "default:" --setting "long: --windows 128" --out FILE

A setting is a name, a colon and options of ``ernieq quantize``; the first is what the others are compared with.
Choosing is what this is for: texts that results are reported on have no place here. A difference smaller than
the spread over the seeds is none. Conversions and evaluations that are in the working directory are kept.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
from pathlib import Path
from typing import Any

from machine import describe_machine, write_result
from quality import PROTOCOL
from side_by_side import in_order, run


def measure(
    model: Path, texts: list[Path], packed: Path, options: list[str], device: str
) -> dict[str, dict[str, float]]:
    """Convert and evaluate once: text -> KL, perplexity ratio, bytes."""
    evaluation = packed.with_suffix(".json")
    if not packed.is_dir():
        run(["quantize", str(model), "--out", str(packed), "--device", device, *options])
    if not evaluation.is_file():
        named = [argument for text in texts for argument in ("--text", str(text))]
        arguments = [str(packed), "--base", str(model), *named, *PROTOCOL, "--device", device, "--json"]
        evaluation.write_text(run(["eval-ppl", *arguments]), encoding="utf-8")
    report = json.loads(evaluation.read_text(encoding="utf-8"))
    return {
        Path(entry["text"]["name"]).stem: {
            "kl": entry["divergence"]["mean_kl"],
            "ratio": entry["divergence"]["perplexity_ratio"],
            "decoder_bytes": report["weights"]["decoder_bytes"],
            "file_bytes": report["weights"]["file_bytes"],
        }
        for entry in report["texts"]
    }


def summary(name: str, options: list[str], seeds: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """One row a text: mean and standard deviation over the seeds."""
    rows = []
    for text in seeds[0]:
        divergences = [measured[text]["kl"] for measured in seeds]
        rows.append(
            {
                "setting": name,
                "options": options,
                "text": text,
                "kl": statistics.fmean(divergences),
                "kl_of_seeds": divergences,
                "kl_spread": statistics.stdev(divergences) if len(divergences) > 1 else None,
                "ratio": statistics.fmean(measured[text]["ratio"] for measured in seeds),
                "decoder_bytes": seeds[0][text]["decoder_bytes"],
                "file_bytes": seeds[0][text]["file_bytes"],
            }
        )
    return rows


def parsed(setting: str) -> tuple[str, list[str]]:
    """A name and options from ``NAME: OPTIONS``."""
    name, colon, options = setting.partition(":")
    if not colon or not name.strip().replace("-", "").isalnum():
        raise argparse.ArgumentTypeError(f"{setting!r} is not NAME: OPTIONS, with a name of letters and digits")
    return name.strip(), shlex.split(options)


def main() -> None:
    """Measure every setting with every seed and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--work", type=Path, required=True, help="where packed checkpoints are kept")
    parser.add_argument(
        "--setting", type=parsed, action="append", required=True, help="NAME: options of quantize"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, shared out among the GPUs")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    tasks = [
        (
            arguments.model,
            arguments.text,
            arguments.work / f"{name}-seed{seed}",
            [*options, "--seed", str(seed)],
            arguments.device,
        )
        for name, options in arguments.setting
        for seed in arguments.seeds
    ]
    measured = in_order(arguments.jobs, arguments.device, measure, tasks)
    rows: list[dict[str, Any]] = []
    first: dict[str, float] = {}
    for place, (name, options) in enumerate(arguments.setting):
        seeds = measured[place * len(arguments.seeds) : (place + 1) * len(arguments.seeds)]
        for row in summary(name, options, seeds):
            base = first.setdefault(row["text"], row["kl"])
            spread = "" if row["kl_spread"] is None else f" +- {row['kl_spread']:.4f}"
            print(
                f"{name} {row['text']}: KL {row['kl']:.4f}{spread}, {row['kl'] / base:.3f} of the first, "
                f"decoder {row['decoder_bytes'] / 1e6:.2f} MB, file {row['file_bytes'] / 1e6:.2f} MB",
                flush=True,
            )
            rows.append(row)
    if arguments.out:
        command = "python benchmarks/compare_settings.py MODEL --text ... --work DIR --seeds ... --setting ..."
        result = {"machine": describe_machine(), "command": command, "protocol": PROTOCOL, "rows": rows}
        write_result(arguments.out, {**result, "model": arguments.model.name, "seeds": arguments.seeds})


if __name__ == "__main__":
    main()
