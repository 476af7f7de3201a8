"""Same inputs, recipe and seed give the same bytes, whatever threads and instructions do the work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ernieq.bundled import bundled_model, calibration_texts
from ernieq.calibrate import read_text_file
from ernieq.calibrate.moments import corrected_weight
from ernieq.checkpoint import open_checkpoint
from ernieq.convert import CalibrationSettings, Conversion, EncodeSettings, Recipe, default_recipe
from ernieq.convert.recipe import KEEP, TuneSettings
from ernieq.encode import EncodeOptions
from ernieq.encode.feedback import block_ldl_factor
from ernieq.encode.matrix import proxy_error
from ernieq.kernels.backend import Backend, unusable_backend
from ernieq.pack import Manifest, PackedReader
from tests.convert.conversions import quick_recipe, write_words

pytestmark = pytest.mark.usefixtures("threads_put_back")
Tiny = Callable[..., Path]
_VARIABLE = ("seconds", "tuning")  # of a report; threads cut the divergence's sum into parts


def converted(
    source: Path, out: Path, recipe: Recipe, texts: list[Path], threads: int, backend: Backend = Backend.AUTO
) -> Manifest:
    """The manifest of a conversion in which torch and the search have so many threads."""
    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(source)
    options = EncodeOptions(backend=backend, threads=threads)
    conversion = Conversion(checkpoint, str(source), recipe, [read_text_file(text) for text in texts], options)
    conversion.run(out, overwrite=False, card=lambda _: "# a test\n")
    checkpoint.close()
    return PackedReader(out).manifest


def figures(manifest: Manifest) -> dict[str, Any]:
    """What a report says of the result: every error, every count."""
    return {key: value for key, value in manifest.report.items() if key not in _VARIABLE}


def need(backend: Backend) -> None:
    if reason := unusable_backend(backend):
        pytest.skip(reason)


def nano_recipe() -> Recipe:
    """So many tokens that a library would split their sums between threads, and a short state."""
    return dataclasses.replace(
        default_recipe(2),
        modules={"model.embed_tokens": float(KEEP)},  # a quarter of the time, and no sum over tokens
        encode=EncodeSettings(state_bits=12),
        calibration=CalibrationSettings(windows=2, window=2048),
    )


def test_one_and_two_threads_give_the_same_bytes_and_figures(tiny: Tiny, tmp_path: Path) -> None:
    """Untied, dense and routed layers, halves of bits, and tuning."""
    source, text = tiny(tied=False), write_words(tmp_path / "words.txt")
    recipe = dataclasses.replace(quick_recipe(2.5), tune=TuneSettings(enabled=True, steps=3, window=32))
    one, two = (converted(source, tmp_path / f"{n}", recipe, [text], n) for n in (1, 2))
    assert one.report["tuning"] is not None
    assert one.shards == two.shards
    assert figures(one) == figures(two)


def test_another_seed_gives_other_bytes(tiny: Tiny, tmp_path: Path) -> None:
    source, text = tiny(), write_words(tmp_path / "words.txt")
    zero, one = (converted(source, tmp_path / f"{n}", quick_recipe(seed=n), [text], 1) for n in (0, 1))
    assert zero.shards != one.shards


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.SCALAR, Backend.AVX2, Backend.AVX512])
def test_every_instruction_set_gives_the_same_bytes(tiny: Tiny, tmp_path: Path, backend: Backend) -> None:
    need(backend)
    source, text = tiny(layers=2, experts=2), write_words(tmp_path / "words.txt")
    own, best = (
        converted(source, tmp_path / name, quick_recipe(), [text], 2, chosen)
        for name, chosen in (("own", backend), ("best", Backend.AUTO))
    )
    assert own.shards == best.shards
    assert figures(own) == figures(best)


def test_the_bundled_model_comes_out_the_same_with_one_thread_and_older_instructions(tmp_path: Path) -> None:
    """Its matrices are wide enough for torch to share them out among threads."""
    need(Backend.AVX2)
    texts = [text.path for text in calibration_texts()]
    one = converted(bundled_model(), tmp_path / "one", nano_recipe(), texts, 1, Backend.AVX2)
    two = converted(bundled_model(), tmp_path / "two", nano_recipe(), texts, 2)
    assert one.shards == two.shards
    assert figures(one) == figures(two)


@pytest.mark.parametrize(
    "compute",
    [
        pytest.param(lambda hessian: block_ldl_factor(hessian, 0.01), id="factor"),
        pytest.param(lambda hessian: corrected_weight(hessian, hessian, hessian, 0.4), id="correction"),
        pytest.param(lambda gram: torch.tensor(proxy_error(gram, gram + 1, gram)), id="proxy error"),
    ],
)
def test_torch_sums_in_the_same_order_with_any_number_of_threads(compute: Callable[[Tensor], Tensor]) -> None:
    """LAPACK's own threads, and a sum over a whole matrix, do not."""
    inputs = torch.randn(2048, 512, generator=torch.Generator().manual_seed(0))
    hessian, found = inputs.T @ inputs, []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(compute(hessian))
        assert torch.get_num_threads() == threads
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
