"""What keeping a unit costs against encoding it: decoding it again, writing, fsync, hash and journal.

    python benchmarks/journal_cost.py --rows 192 --columns 192 --repeats 8 --out FILE

Processor seconds of one thread, which a busy machine does not change; seconds on the clock only for what waits
for the disk, which happens in a thread of its own beside the next unit.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from machine import describe_machine, write_result

from ernieq.convert.groups import Group, GroupEncoder, Target
from ernieq.convert.journal import Journal
from ernieq.convert.overlap import BackgroundQueue
from ernieq.convert.recipe import Part, default_recipe
from ernieq.convert.unit_store import UnitStore
from ernieq.encode import EncodeOptions


def main() -> None:
    """Encode gate and up of made-up experts, with what follows kept apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=192, help="of each of two matrices")
    parser.add_argument("--columns", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    kept, written, clock = 0.0, 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), BackgroundQueue() as queue:
        store = UnitStore(Path(folder), Journal(Path(folder) / "journal.jsonl"), "cost", queue)
        genuine = store.keep

        def keep(*arguments: object) -> None:
            nonlocal kept
            before = time.thread_time()
            genuine(*arguments)  # type: ignore[arg-type]
            kept += time.thread_time() - before

        store.keep = keep  # type: ignore[method-assign,assignment]
        encoder = GroupEncoder(default_recipe(2), EncodeOptions(threads=1), store)
        started = time.process_time()
        for number in range(options.repeats):
            inputs = torch.randn(4 * options.columns, options.columns, generator=draw)
            weights = {
                f"mlp.experts.{number}.{name}": torch.randn(options.rows, options.columns, generator=draw)
                for name in ("gate_proj", "up_proj")
            }
            gram = inputs.T @ inputs / len(inputs)
            group = Group(weights, Part.ROUTED_EXPERTS, "mlp.input", gram.device)
            encoder.encode(0, [group], partial(list, [Target(weights, gram)]))
            before, clocked = time.process_time(), time.monotonic()
            queue.wait()
            written += time.process_time() - before
            clock += time.monotonic() - clocked
        everything = time.process_time() - started
    encoding = everything - kept - written
    result = {
        "machine": describe_machine(),
        "command": f"python benchmarks/journal_cost.py --rows {options.rows} --columns {options.columns} "
        f"--repeats {options.repeats}",
        "weights_of_a_unit": 2 * options.rows * options.columns,
        "processor_seconds_of_encoding": encoding / options.repeats,
        "processor_seconds_of_image_and_check": kept / options.repeats,
        "processor_seconds_of_writing": written / options.repeats,
        "seconds_of_writing_beside": clock / options.repeats,
        "processor_overhead": (kept + written) / encoding,
    }
    for name, value in result.items():
        print(f"{name}: {value}")
    if options.out:
        write_result(options.out, result)


if __name__ == "__main__":
    main()
