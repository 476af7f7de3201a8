"""The work that an estimate counts is the work that is done, and a probe leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ernieq.calibrate import Streams
from ernieq.checkpoint import Checkpoint, load_layer, open_checkpoint
from ernieq.convert import LayerQuantizer, estimate_time, make_plan
from ernieq.convert.snapshots import Mark
from ernieq.convert.speed import Speed, TargetsAlone
from ernieq.convert.workload import calibration_products, calibration_work, encoded_groups
from ernieq.encode import EncodeOptions
from ernieq.kernels.precision import one_thread
from ernieq.model import Rotary
from tests.convert.conversions import quick_recipe

Tiny = Callable[..., Path]
CPU = torch.device("cpu")


class ProductCounter(TorchDispatchMode):
    """Counts multiplications of matrix products (torch's own counter knows none that work in place)."""

    count: int = 0

    def __torch_dispatch__(self, function: Any, _types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = function.overloadpacket.__name__
        matrices = [value for value in arguments if isinstance(value, Tensor)]
        if name in ("mm", "bmm", "addmm", "addmm_"):
            self.count += matrices[-2].numel() * matrices[-1].shape[-1]
        elif "attention" in name:  # scores and what they sum up, half of it behind the mask
            self.count += matrices[0].numel() * matrices[1].shape[-2]
        return function(*arguments, **(options or {}))


def counted_products(checkpoint: Checkpoint, index: int, windows: int, length: int) -> int:
    """Multiplications of matrix products while a layer is calibrated, counted as they are made."""
    config = checkpoint.config
    quantizer = LayerQuantizer(config, quick_recipe().encode, TargetsAlone())
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(windows, length, config.hidden_size, generator=draw)
    rotary = Rotary(config).angles(torch.arange(length))
    counter = ProductCounter()  # type: ignore[no-untyped-call]
    with torch.no_grad(), one_thread(CPU), counter:  # other threads' products would not be counted
        streams = Streams(hidden, hidden.clone())
        quantizer.run(Mark(index), load_layer(checkpoint, index), streams, rotary)
    return counter.count


@pytest.mark.parametrize(("index", "windows"), [(0, 2), (1, 2), (1, 24)])
@pytest.mark.parametrize("options", [{}, {"shared_experts": 0}, {"expert_width": 128, "hidden": 64}])
def test_the_products_of_a_layer_are_those_that_are_made(
    tiny: Tiny, options: dict[str, Any], index: int, windows: int
) -> None:
    checkpoint, length = open_checkpoint(tiny(**options)), 256
    found = counted_products(checkpoint, index, windows, length)
    expected = calibration_products(checkpoint.config, index, windows * length, length, CPU)
    assert expected == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("options", [{}, {"moe": False}, {"tied": False}, {"interval": 2}])
def test_every_quantized_weight_is_in_one_group_of_its_bits(tiny: Tiny, options: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(tiny(**options))
    plan = make_plan(checkpoint, quick_recipe(modules={"*.v_proj": 5, "*.2.mlp.*up_proj": 3}))
    weights: dict[float, int] = {}
    for module, bits in plan.modules.items():
        weights[bits] = weights.get(bits, 0) + prod(checkpoint.info(f"{module}.weight").shape)
    found: dict[float, int] = {}
    for shape, count in encoded_groups(checkpoint.config, plan.modules).items():
        found[shape.bits] = found.get(shape.bits, 0) + count * shape.rows * shape.columns
    assert found == weights


def test_windows_tuning_and_hashing_each_add_to_the_estimate(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, recipe, options = open_checkpoint(tiny()), quick_recipe(), EncodeOptions(threads=1)
    plan = make_plan(checkpoint, recipe)
    monkeypatch.setattr("ernieq.convert.speed._timed", lambda *_: 0.01)  # the same in every estimate
    monkeypatch.setattr("ernieq.convert.speed._WORK", {"cpu": 1})  # a probe of the fewest tokens
    monkeypatch.setattr("ernieq.convert.estimate._hash_seconds", lambda: 1e-9)

    def seconds(**changes: Any) -> float:
        return estimate_time(checkpoint.config, plan, recipe, options, **{"windows": 4} | changes).seconds

    assert 0 < seconds(windows=0) < seconds() < seconds(windows=40)
    assert seconds(tuned=True) > seconds()
    assert seconds(source_bytes=10**9) == pytest.approx(seconds() + 1)


def test_a_probe_draws_from_no_generator_but_its_own(tiny: Tiny) -> None:
    checkpoint, recipe = open_checkpoint(tiny()), quick_recipe()
    before = torch.get_rng_state()
    plan = make_plan(checkpoint, recipe)
    assert estimate_time(checkpoint.config, plan, recipe, EncodeOptions(threads=1)).seconds > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_is_too_large_to_probe_is_calibrated_narrower_and_with_fewer_experts(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, seen = open_checkpoint(tiny(experts=8)).config, []
    genuine = Speed._layer_seconds

    def watched(self: Speed, smaller: Any, *arguments: Any) -> float:
        seen.append((smaller.hidden_size, smaller.moe_num_experts))
        return genuine(self, smaller, *arguments)

    def calibration(work: float) -> float:
        monkeypatch.setattr("ernieq.convert.speed._WORK", {"cpu": work})
        return Speed(config, quick_recipe(), EncodeOptions(threads=1), CPU).calibration(128, 32)

    monkeypatch.setattr(Speed, "_layer_seconds", watched)
    assert calibration(1e9) > 0
    monkeypatch.setattr("ernieq.convert.speed._EXPERT_WEIGHTS", {"cpu": 3 * 32 * 16 * 3})
    assert calibration(1e9) > 0
    assert calibration(calibration_work(config, 1, 128, 32, CPU) / 3) > 0
    assert seen == [(32, 8), (32, 3), (16, 8)]


def test_hessians_that_go_in_batches_are_probed_in_one(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ernieq.convert.speed._HESSIANS", {"cpu": 3})  # as on a GPU
    checkpoint = open_checkpoint(tiny())
    plan = make_plan(checkpoint, quick_recipe())
    options = EncodeOptions(threads=1)
    assert estimate_time(checkpoint.config, plan, quick_recipe(), options, windows=0).seconds > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none")
def test_a_gpu_is_probed_with_the_same_steps(tiny: Tiny) -> None:
    checkpoint = open_checkpoint(tiny(hidden=128, expert_width=64, intermediate=128))
    plan = make_plan(checkpoint, quick_recipe())
    gpu = torch.device("cuda", 0)
    assert 0 < estimate_time(checkpoint.config, plan, quick_recipe(), EncodeOptions(), gpu).seconds < 600
