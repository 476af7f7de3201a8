"""Every GPU kernel at the shapes of the 21B model, beside its floors: bytes and operations over their rates.

python benchmarks/gpu_kernels.py --out benchmarks/results/gpu_kernels.json

Times are of replayed CUDA graphs, so that launches do not count; inputs rotate so that caches do not help.
The last lines compare the CUDA C++ product with the same one in Triton.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton_product
from machine import describe_gpu, describe_machine, write_result
from torch import Tensor

from ernieq.encode.ring_tensors import symbol_values
from ernieq.encode.scales import CODEBOOK_SCALE
from ernieq.kernels.token_step import cuda as step
from ernieq.kernels.trellis_matmul import cuda as products
from ernieq.kernels.viterbi import FULL_FIRST_PASS, SHORT_FIRST_PASS, search_tiles
from ernieq.runtime.speed import copy_bandwidth
from ernieq.trellis import VALUE_RMS, TrellisCode

HIDDEN, EXPERT, SHARED, EXPERTS, CHOICES, VOCABULARY = 2560, 1536, 3072, 64, 6, 103424
HEADS, KV_HEADS, HEAD_DIM = 20, 4, 128


def graph_seconds(runs: Sequence[Callable[[], Any]], repeats: int = 20) -> float:
    """Median seconds of one of several equal runs, replayed as one graph."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(runs))
    median: float = sorted(times)[repeats // 2]
    return median


def packed(rows: int, columns: int, code: TrellisCode, matrices: int = 1) -> tuple[Tensor, Tensor]:
    """Random rings as words, and scales."""
    shape = (matrices, rows // 16, columns // 16, code.units_per_tile // 2)
    words = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device="cuda")
    return words, torch.full((matrices, rows), 0.02, dtype=torch.float16, device="cuda")


def tokens_of(count: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, width, device="cuda").half(), torch.ones(count, device="cuda")


def measure_search(bits: float, state_bits: int, first_pass: int) -> dict[str, Any]:
    """Squared error and speed of the search on Gaussian tiles."""
    code = TrellisCode(bits, state_bits)
    tiles = torch.cuda.get_device_properties(0).multi_processor_count * 64 * (1 if state_bits == 16 else 4)
    generator = torch.Generator("cuda").manual_seed(0)
    source = torch.randn(tiles, 256, device="cuda", generator=generator)
    scale = VALUE_RMS / CODEBOOK_SCALE[bits]
    symbols = search_tiles(source * scale, code, first_pass_steps=first_pass)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
    begin.record()
    search_tiles(source * scale, code, first_pass_steps=first_pass)
    end.record()
    torch.cuda.synchronize()
    seconds = begin.elapsed_time(end) / 1e3
    values = symbol_values(symbols, code).double() / scale
    # Two float16 additions and multiplications, one comparison, one minimum and one selection serve two tiles.
    branch_instructions = 2.5 * code.states * (FULL_FIRST_PASS + first_pass) / FULL_FIRST_PASS
    rate = issue_rate()
    return {
        "kernel": "viterbi search",
        "code": str(code),
        "first_pass_steps": first_pass,
        "weights": source.numel(),
        "mse": float((values - source.double()).square().mean()),
        "weights_per_second": source.numel() / seconds,
        "floor_weights_per_second": rate / branch_instructions,
        "share_of_floor": source.numel() / seconds * branch_instructions / rate,
    }


def issue_rate() -> float:
    """Lane instructions a second at the highest clock: 128 lanes a multiprocessor and cycle."""
    properties = torch.cuda.get_device_properties(0)
    rate: float = properties.multi_processor_count * 128 * float(describe_gpu()["max_sm_clock_mhz"]) * 1e6
    return rate


def timed(
    name: str, seconds: float, moved: float, bandwidth: float, weights: float = 0, flops: float = 0
) -> dict[str, Any]:
    """One row: time, and the floor that its bytes and decoded weights set."""
    floor_bytes = moved / bandwidth
    floor_decode = weights * 7 / issue_rate()  # issue slots of a decoded weight, trellis.cuh
    return {
        "kernel": name,
        "microseconds": seconds * 1e6,
        "floor_bytes_microseconds": floor_bytes * 1e6,
        "floor_decode_microseconds": floor_decode * 1e6,
        "gigaweights_per_second": weights / seconds / 1e9,
        "gigabytes_per_second": moved / seconds / 1e9,
        "teraflops": flops / seconds / 1e12,
    }


def measure_products(bandwidth: float) -> list[dict[str, Any]]:
    """Fused products of one and more tokens, and decoding."""
    rows = []
    for bits, shape, name in (
        (2.5, (3072, HIDDEN), "q, k, v at 2.5 bits"),
        (4, (3072, HIDDEN), "q, k, v"),
        (4, (HIDDEN, HIDDEN), "o"),
        (4, (2 * SHARED, HIDDEN), "shared gate and up"),
        (4, (HIDDEN, SHARED), "shared down"),
        (6, (VOCABULARY, HIDDEN), "head"),
    ):
        code, weights = TrellisCode(bits), shape[0] * shape[1]
        sets = [packed(*shape, code) for _ in range(3 if shape[0] > 10000 else 24)]
        for tokens in (1, 8):
            x = tokens_of(tokens, shape[1])
            runs = [partial(products.multiply, *x, words[0], scale[0], code) for words, scale in sets]
            label = f"multiply {name}, {tokens} tokens"
            rows.append(timed(label, graph_seconds(runs), weights * bits / 8, bandwidth, weights))
    for bits in (2, 2.5, 4):
        rows += measure_experts(TrellisCode(bits), (2 * EXPERT, HIDDEN), "gate and up", bandwidth)
        rows += measure_experts(TrellisCode(bits), (HIDDEN, EXPERT), "down", bandwidth)
    return rows


def measure_experts(
    code: TrellisCode, shape: tuple[int, int], name: str, bandwidth: float
) -> list[dict[str, Any]]:
    """Products with the experts of a layer: selected, grouped, and decoded to float16."""
    words, scale = packed(*shape, code, EXPERTS)
    matrix, bits = shape[0] * shape[1], code.bits_per_weight
    shared_input = name != "down"
    rows = []
    for tokens in (1, 8):
        x = tokens_of(tokens if shared_input else tokens * CHOICES, shape[1])
        order = torch.rand(8, tokens, EXPERTS, device="cuda").argsort(dim=-1)
        selections = order[..., :CHOICES].int().contiguous()
        runs = [
            partial(products.multiply_selected, *x, words, scale, code, selected, shared_input)
            for selected in selections
        ]
        weights = matrix * tokens * CHOICES
        label = f"{bits} bits, {name} of {CHOICES} experts, {tokens} tokens"
        rows.append(timed(label, graph_seconds(runs), weights * bits / 8, bandwidth, weights))
    weights = matrix * EXPERTS
    for count in (8, 32, 128, 384):
        x = tokens_of(count * EXPERTS, shape[1])
        offsets = torch.arange(0, (EXPERTS + 1) * count, count, dtype=torch.int32, device="cuda")
        run = partial(products.multiply_grouped, *x, words, scale, code, offsets)
        label = f"{bits} bits, {name}, grouped, {count} tokens an expert"
        seconds, moved = graph_seconds([run], 5), weights * bits / 8
        rows.append(timed(label, seconds, moved, bandwidth, weights, 2 * weights * count))
    out = torch.empty(8 * shape[0], shape[1], dtype=torch.float16, device="cuda")
    run = partial(products.decode, words[:8].flatten(0, 1), scale[:8].flatten(), code, out=out)
    moved = 8 * matrix * (bits / 8 + 2)
    rows.append(timed(f"{bits} bits, decode to float16", graph_seconds([run]), moved, bandwidth, 8 * matrix))
    return rows


def measure_token_step(bandwidth: float) -> list[dict[str, Any]]:
    """What lies between the products."""
    rows = []
    hidden, delta, normed = (torch.randn(1, HIDDEN, device="cuda") for _ in "abc")
    experts, weights = torch.randn(CHOICES, HIDDEN, device="cuda"), torch.rand(1, CHOICES, device="cuda")
    signs = torch.ones(HIDDEN, dtype=torch.int8, device="cuda")
    norm = torch.ones(HIDDEN, device="cuda")
    out = step.Rotated(
        torch.empty(1, HIDDEN, dtype=torch.float16, device="cuda"), torch.empty(1, device="cuda")
    )
    run = partial(step.add_norm_rotate, hidden, delta, experts, weights, norm, 1e-5, signs, 128, out, normed)
    rows.append(timed("add, norm, rotate", graph_seconds([run] * 20), 4 * HIDDEN * 10, bandwidth))
    router, bias = torch.randn(EXPERTS, HIDDEN, device="cuda"), torch.zeros(EXPERTS, device="cuda")
    selected = torch.empty(1, CHOICES, dtype=torch.int32, device="cuda")
    run = partial(step.route, normed, router, bias, 1e-12, selected, weights)
    rows.append(timed("route", graph_seconds([run] * 20), 4 * HIDDEN * EXPERTS, bandwidth))
    gate_up = torch.randn(CHOICES, 2 * EXPERT, device="cuda")
    inner = step.Rotated(
        torch.empty(CHOICES, EXPERT, dtype=torch.float16, device="cuda"), torch.empty(CHOICES, device="cuda")
    )
    run = partial(step.silu_mul_rotate, gate_up, signs[:EXPERT], 128, inner)
    rows.append(timed("silu, multiply, rotate", graph_seconds([run] * 20), 10 * CHOICES * EXPERT, bandwidth))
    qkv = torch.randn(1, (HEADS + 2 * KV_HEADS) * HEAD_DIM, device="cuda")
    angles = torch.zeros(32768, HEAD_DIM // 2, 2, device="cuda")
    keys, values = (torch.randn(1, KV_HEADS, 32768, HEAD_DIM, device="cuda").half() for _ in "kv")
    context = torch.empty(1, HEADS * HEAD_DIM, device="cuda")
    for place in (0, 512, 4096, 32000):
        for splits in (32, 64, 128):
            position = torch.tensor([place], dtype=torch.int32, device="cuda")
            space = torch.empty(step.attend_workspace(1, HEADS, HEAD_DIM, splits), device="cuda")
            run = partial(step.attend, qkv, angles, keys, values, position, context, space, splits)
            moved = 2 * 2 * KV_HEADS * HEAD_DIM * (place + 1)
            rows.append(
                timed(f"attend, {place + 1} keys, {splits} splits", graph_seconds([run] * 20), moved, bandwidth)
            )
    return rows


def compare_with_triton(bandwidth: float) -> list[dict[str, Any]]:
    """One token times the gate and up of an expert at 2 bits, in both languages."""
    code, shape = TrellisCode(2), (2 * EXPERT * CHOICES, HIDDEN)
    sets = [packed(*shape, code) for _ in range(16)]
    x = tokens_of(1, HIDDEN)
    weights = shape[0] * shape[1]
    rows = []
    wanted = products.multiply(*x, sets[0][0][0], sets[0][1][0], code)
    for warps in (1, 2, 4, 8):
        for ahead in (2, 4, 8, 16):
            found = triton_product.multiply(x[0], *sets[0], ahead, warps)
            error = float((found - wanted[0]).norm() / wanted.norm())
            assert error < 1e-3, error
            runs = [partial(triton_product.multiply, x[0], *one, ahead, warps) for one in sets]
            label = f"Triton, {ahead} tiles at a time, {warps} warps"
            rows.append(timed(label, graph_seconds(runs), weights / 4, bandwidth, weights))
    runs = [partial(products.multiply, *x, words[0], scale[0], code) for words, scale in sets]
    return [
        min(rows, key=lambda row: row["microseconds"]),
        timed("CUDA C++", graph_seconds(runs), weights / 4, bandwidth, weights),
    ]


def main() -> None:
    """Measure all, print a line each, write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(torch.device("cuda"))
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    searches = [measure_search(bits, 16, FULL_FIRST_PASS) for bits in (1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)]
    searches += [
        measure_search(2, 16, SHORT_FIRST_PASS),
        measure_search(2, 14, FULL_FIRST_PASS),
        measure_search(2, 12, FULL_FIRST_PASS),
    ]
    for row in searches:
        speed, share = row["weights_per_second"] / 1e6, 100 * row["share_of_floor"]
        print(
            f"{row['code']}, first pass {row['first_pass_steps']}: {speed:.1f} M weights/s, "
            f"{share:.0f} % of the issue floor, mse {row['mse']:.5f}"
        )
    rows = measure_products(bandwidth) + measure_token_step(bandwidth)
    compared = compare_with_triton(bandwidth)
    for row in rows + compared:
        floors = f"{row['floor_bytes_microseconds']:7.2f} {row['floor_decode_microseconds']:7.2f}"
        rates = f"{row['gigabytes_per_second']:6.0f} GB/s {row['gigaweights_per_second']:6.0f} Gw/s"
        teraflops = f"{row['teraflops']:5.0f} TF"
        print(f"{row['microseconds']:9.2f} us  floors {floors}  {rates} {teraflops}  {row['kernel']}")
    if arguments.out:
        write_result(
            arguments.out,
            {
                "command": "python benchmarks/gpu_kernels.py --out FILE",
                "machine": {**describe_machine(), **describe_gpu()},
                "copy_bytes_per_second": bandwidth,
                "search": searches,
                "kernels": rows,
                "language": compared,
            },
        )


if __name__ == "__main__":
    main()
