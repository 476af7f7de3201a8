"""What the 21B model takes at every rate of the default recipe: file, memory of a conversion, memory of a GPU.

    python benchmarks/plan_sizes.py --out benchmarks/results/plan_sizes.json

Nothing is converted. A checkpoint with the headers of the 21B's shape and no data (its one shard is a hole,
which takes no disk) is planned as ``ernieq quantize --dry-run`` plans it. Memory of a GPU that runs the result
is what is stored, keys and values of the context, and the work space that was measured on an H100
(``results/gpu_runtime.json``: peak less weights less context; the larger of its two variants).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from math import prod
from pathlib import Path
from typing import Any

from machine import describe_machine, write_result
from synthetic_layer import Shape

from ernieq.checkpoint import Checkpoint, open_checkpoint
from ernieq.convert import default_recipe, make_plan
from ernieq.model import ModelConfig, ParameterRole, expected_parameters
from ernieq.records import format_bytes
from ernieq.runtime.cache import context_bytes

RATES = (1.5, 2, 2.5, 3, 3.5, 4, 5, 6)
CONTEXTS = (8192, 32768)
LAYERS = 28
_FLOAT32 = {ParameterRole.ROUTER, ParameterRole.ROUTER_BIAS}
_RUNTIME = Path(__file__).parent / "results" / "gpu_runtime.json"
_RUNTIME_CONTEXT = 32768  # tokens that gpu_runtime.py keeps room for


def write_hollow(directory: Path) -> Checkpoint:
    """A checkpoint of the 21B's shape whose shard has a header and a hole."""
    raw = {**Shape().config(), "num_hidden_layers": LAYERS, "moe_layer_end_index": LAYERS - 1}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in expected_parameters(ModelConfig.from_dict(raw)).items():
        kind, width = ("F32", 4) if spec.role in _FLOAT32 else ("BF16", 2)
        begin, end = end, end + width * prod(spec.shape)
        header[name] = {"dtype": kind, "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return open_checkpoint(directory)


def working_bytes(config: ModelConfig) -> int:
    """GPU memory beside weights and context, as measured."""
    context = context_bytes(config, max_tokens=_RUNTIME_CONTEXT, batch=1)
    variants = json.loads(_RUNTIME.read_text(encoding="utf-8"))["variants"]
    return max(int(found["peak_allocated_bytes"] - found["weights_bytes"] - context) for found in variants)


def plan_rows(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """A row for every rate."""
    work = working_bytes(checkpoint.config)
    rows = []
    for bits in RATES:
        plan = make_plan(checkpoint, default_recipe(bits))
        context = {length: context_bytes(checkpoint.config, max_tokens=length, batch=1) for length in CONTEXTS}
        rows.append(
            {
                "bits": bits,
                "file_bytes": plan.output_bytes,
                "decoder_bytes": plan.decoder_bytes,
                "bits_per_weight": plan.bits_per_weight,
                "conversion_memory_bytes": plan.memory_bytes,
                "gpu_bytes": {str(length): plan.output_bytes + size + work for length, size in context.items()},
            }
        )
    return rows


def main() -> None:
    """Plan every rate and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        checkpoint = write_hollow(Path(work) / "hollow")
        rows = plan_rows(checkpoint)
        source = (checkpoint.directory / "model.safetensors").stat().st_size
        space = working_bytes(checkpoint.config)
        checkpoint.close()
    for row in rows:
        on_gpu = ", ".join(f"{format_bytes(size)} with {length}" for length, size in row["gpu_bytes"].items())
        print(
            f"{row['bits']:3} bits: file {format_bytes(row['file_bytes'])}, "
            f"{row['bits_per_weight']:.2f} bits a parameter, GPU {on_gpu} tokens of context, "
            f"converting takes {format_bytes(row['conversion_memory_bytes'])}"
        )
    if arguments.out:
        result = {
            "machine": describe_machine(),
            "command": "python benchmarks/plan_sizes.py --out FILE",
            "source_bytes": source,
            "work_space_bytes": space,
            "rows": rows,
        }
        write_result(arguments.out, result)


if __name__ == "__main__":
    main()
