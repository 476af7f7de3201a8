"""Speed of the packed runtime at the full shape of ERNIE-4.5-21B-A3B, on one GPU.

Every bit string is a legal tile, so the weights are random words made on the GPU: speed and memory do not
depend on what they say, and nothing has to be downloaded. Two floors stand beside each time of a step: the
bytes that it reads over the bandwidth of a large copy on this GPU (reading and writing both counted), and the
weights that it decodes over the rate at which integer instructions can be issued.

python benchmarks/gpu_runtime.py --out benchmarks/results/gpu_runtime.json
python benchmarks/gpu_runtime.py --layers 4 --profile
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import describe_gpu, describe_machine, write_result
from torch import Tensor

from ernieq.model import ModelConfig, ParameterRole, ParameterSpec
from ernieq.runtime.plan import (
    ExpertStack,
    GatedPlan,
    LayerPlan,
    ModelPlan,
    PackedMatrix,
    Product,
    Rotation,
    RoutedPlan,
)
from ernieq.runtime.runtime import PackedRuntime
from ernieq.runtime.speed import copy_bandwidth, seconds
from ernieq.runtime.traffic import step_bytes, step_weights, weight_bytes
from ernieq.trellis import TrellisCode

# config.json of baidu/ERNIE-4.5-21B-A3B-Base-PT
SHAPE = ModelConfig(
    model_type="ernie4_5_moe",
    vocab_size=103424,
    hidden_size=2560,
    intermediate_size=12288,
    num_hidden_layers=28,
    num_attention_heads=20,
    num_key_value_heads=4,
    head_dim=128,
    moe_num_experts=64,
    moe_k=6,
    moe_intermediate_size=1536,
    moe_num_shared_experts=2,
    moe_layer_start_index=1,
    moe_layer_end_index=27,
)
CONTEXT = 32768
CONTEXTS = (0, 4096, 30000)
BATCHES = (1, 2, 4, 8)
PROMPTS = (512, 4096, 16384)
STEPS = 64
REPEATS = 3

# Instructions that decode one weight: cut the state out of the ring, multiply, add the four bytes, convert.
OPERATIONS_PER_WEIGHT = 4
INTEGERS_PER_CLOCK = 64  # per processor of an NVIDIA GPU since Volta


def recipe(expert_bits: int) -> dict[ParameterRole, int]:
    """Bits by part: the default recipe, the dense MLP at 3 beside 2-bit experts and at 4 else."""
    return {
        ParameterRole.ROUTED_EXPERT: expert_bits,
        ParameterRole.SHARED_EXPERT: 4,
        ParameterRole.ATTENTION: 4,
        ParameterRole.DENSE_MLP: 3 if expert_bits == 2 else 4,
        ParameterRole.EMBEDDING: 6,
    }


class RandomWeights:
    """Makes parts of a plan on a device; one seed, one model."""

    def __init__(self, bits: dict[ParameterRole, int], device: torch.device) -> None:
        self._bits = bits
        self._device = device
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, float32."""
        return torch.randn(shape, generator=self._generator, device=self._device)

    def rotation(self, columns: int) -> Rotation:
        """Random signs, and the block that the encoder would choose."""
        signs = torch.where(self.normal(columns) > 0, 1, -1).to(torch.int8)
        return Rotation(signs, min(columns & -columns, 128))

    def _tiles(self, role: ParameterRole, columns: int, *rows: int) -> tuple[Tensor, Tensor, TrellisCode]:
        """Words and scales; a row's products have about the size of its inputs."""
        code = TrellisCode(self._bits[role])
        shape = (*rows[:-1], rows[-1] // 16, columns // 16, code.units_per_tile // 2)
        words = torch.randint(
            -(2**31), 2**31, shape, dtype=torch.int32, generator=self._generator, device=self._device
        )
        scale = (0.5 + torch.rand(rows, generator=self._generator, device=self._device)) / columns**0.5
        return words, scale.half(), code

    def product(
        self, role: ParameterRole, rows: int, columns: int, rotation: Rotation | None = None
    ) -> Product:
        """One matrix."""
        return Product(rotation or self.rotation(columns), (PackedMatrix(*self._tiles(role, columns, rows)),))

    def experts(self, count: int, rows: int, columns: int, rotation: Rotation | None = None) -> ExpertStack:
        """One matrix of every expert."""
        tiles = self._tiles(ParameterRole.ROUTED_EXPERT, columns, count, rows)
        return ExpertStack(rotation or self.rotation(columns), *tiles)

    def gated(self, role: ParameterRole, hidden: int, inner: int, rotation: Rotation) -> GatedPlan:
        """An MLP."""
        return GatedPlan(self.product(role, 2 * inner, hidden, rotation), self.product(role, hidden, inner))


def random_plan(config: ModelConfig, bits: dict[ParameterRole, int], device: torch.device) -> ModelPlan:
    """A whole model with a tied head."""
    make = RandomWeights(bits, device)
    table = make.product(ParameterRole.EMBEDDING, config.vocab_size, config.hidden_size)
    layers = tuple(random_layer(make, config, index) for index in range(config.num_hidden_layers))
    return ModelPlan(config, table, layers, torch.ones(config.hidden_size, device=device), table)


def random_layer(make: RandomWeights, config: ModelConfig, index: int) -> LayerPlan:
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    heads = config.num_attention_heads * config.head_dim
    both = heads + 2 * config.num_key_value_heads * config.head_dim
    rotation = make.rotation(hidden)
    ones = torch.ones_like(rotation.signs, dtype=torch.float32)
    qkv = make.product(ParameterRole.ATTENTION, both, hidden)
    output = make.product(ParameterRole.ATTENTION, hidden, heads)
    if not config.is_moe_layer(index):
        dense = make.gated(ParameterRole.DENSE_MLP, hidden, config.intermediate_size, rotation)
        return LayerPlan(ones, qkv, output, ones, dense, None)
    shared = make.gated(ParameterRole.SHARED_EXPERT, hidden, config.moe_num_shared_experts * inner, rotation)
    routed = RoutedPlan(
        router=make.normal(config.moe_num_experts, hidden) / hidden**0.5,
        bias=torch.zeros(config.moe_num_experts, device=ones.device),
        gate_up=make.experts(config.moe_num_experts, 2 * inner, hidden, rotation),
        down=make.experts(config.moe_num_experts, hidden, inner),
    )
    return LayerPlan(ones, qkv, output, ones, shared, routed)


def bytes_of_weights(config: ModelConfig, bits: dict[ParameterRole, int]) -> dict[str, int]:
    """What each weight takes: words and a float16 scale per row, or float32."""

    def size(_name: str, spec: ParameterSpec) -> int:
        if spec.role not in bits:
            return 4 * torch.Size(spec.shape).numel()
        rows, columns = spec.shape
        return rows * columns * bits[spec.role] // 8 + 2 * rows

    return weight_bytes(config, size)


def decode_rate(device: torch.device) -> float:
    """Weights per second that integer instructions alone would let through."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    hertz = 1e6 * describe_gpu()["max_sm_clock_mhz"]
    rate: float = processors * INTEGERS_PER_CLOCK * hertz / OPERATIONS_PER_WEIGHT
    return rate


def measure_steps(
    runtime: PackedRuntime, context: int, weights: dict[str, int], bandwidth: float, rate: float
) -> dict[str, Any]:
    """A step of greedy decoding behind ``context`` tokens, whatever they were."""
    config, batch = runtime.plan.config, runtime.context.batch
    runtime.seek(context)
    runtime.start_sampling()

    def steps() -> None:
        runtime.seek(context)
        for _ in range(STEPS):
            runtime.step_sample()

    steps()
    step = min(seconds(steps, runtime.context.device) for _ in range(REPEATS)) / STEPS
    read = step_bytes(config, weights, batch=batch, context=context + STEPS // 2, cache_bytes=2)
    return {
        "batch": batch,
        "context": context,
        "tokens_per_second": batch / step,
        "step_milliseconds": 1e3 * step,
        "bytes": read,
        "bytes_floor_milliseconds": 1e3 * read / bandwidth,
        "decode_floor_milliseconds": 1e3 * step_weights(config, batch=batch) / rate,
        "bandwidth_share": read / bandwidth / step,
    }


def measure_prompts(runtime: PackedRuntime, prompts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Prompts of random tokens."""
    rows = []
    for length in prompts:
        ids = torch.randint(0, runtime.plan.config.vocab_size, (runtime.context.batch, length))
        logits = runtime.prefill(ids)
        assert bool(torch.isfinite(logits).all()), "the random weights overflow"
        device = runtime.context.device
        took = min(seconds(partial(runtime.prefill, ids), device) for _ in range(REPEATS))
        rows.append({"prompt": length, "seconds": took, "tokens_per_second": length / took})
        print(f"  prompt {length:>6}: {length / took:>9,.0f} tokens/s", flush=True)
    return rows


def measure(config: ModelConfig, expert_bits: int, device: torch.device, *, profile: bool) -> dict[str, Any]:
    """All figures of one variant; the peak of memory is that of batch 1."""
    bits = recipe(expert_bits)
    bandwidth, rate = copy_bandwidth(device), decode_rate(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    plan = random_plan(config, bits, device)
    held = torch.cuda.memory_allocated(device)
    print(f"experts at {expert_bits} bits: weights {held / 1e9:.2f} GB, copy {bandwidth / 1e9:,.0f} GB/s")
    weights = bytes_of_weights(config, bits)
    result: dict[str, Any] = {"expert_bits": expert_bits, "weights_bytes": held, "steps": []}
    for batch in BATCHES:
        runtime = PackedRuntime(plan, max_tokens=CONTEXT, batch=batch)
        if batch == 1:
            result["prompts"] = measure_prompts(runtime, PROMPTS)
        for context in CONTEXTS:
            row = measure_steps(runtime, context, weights, bandwidth, rate)
            result["steps"].append(row)
            print(
                f"  batch {batch} context {context:>6}: {row['tokens_per_second']:>7,.0f} tokens/s, "
                f"{row['step_milliseconds']:.3f} ms; floors {row['bytes_floor_milliseconds']:.3f} (bytes), "
                f"{row['decode_floor_milliseconds']:.3f} (decoding)",
                flush=True,
            )
        if batch == 1:
            result["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
            result["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
            print(f"  peak memory {result['peak_allocated_bytes'] / 1e9:.2f} GB with room for {CONTEXT} tokens")
            if profile:
                result["kernels"] = profile_step(runtime)
        del runtime
        torch.cuda.empty_cache()
    return {**result, "copy_bytes_per_second": bandwidth, "decode_floor_weights_per_second": rate}


def profile_step(runtime: PackedRuntime) -> list[dict[str, Any]]:
    """Time per kernel of one token step, longest first."""
    runtime.seek(4096)
    runtime.start_sampling()
    runtime.step_sample()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(4):
            runtime.step_sample()
        torch.cuda.synchronize()
    kernels = sorted(profiler.key_averages(), key=lambda item: -item.self_device_time_total)
    rows = [
        {"kernel": item.key, "launches": item.count / 4, "microseconds": item.self_device_time_total / 4}
        for item in kernels
        if item.self_device_time_total > 0
    ]
    for row in rows[:25]:
        print(f"  {row['microseconds']:>9.1f} us  {row['launches']:>5.0f}x  {row['kernel'][:90]}")
    return rows


def main() -> None:
    """Measure the variants and print as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, default=SHAPE.num_hidden_layers)
    parser.add_argument("--expert-bits", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--profile", action="store_true", help="also print the time of each kernel")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no NVIDIA GPU was found")
    config = dataclasses.replace(
        SHAPE, num_hidden_layers=arguments.layers, moe_layer_end_index=arguments.layers - 1
    )
    device = torch.device("cuda", torch.cuda.current_device())
    variants = [measure(config, bits, device, profile=arguments.profile) for bits in arguments.expert_bits]
    if arguments.out:
        command = f"python benchmarks/gpu_runtime.py --layers {arguments.layers} --out FILE"
        write_result(
            arguments.out,
            {"machine": {**describe_machine(), **describe_gpu()}, "command": command, "variants": variants},
        )


if __name__ == "__main__":
    main()
