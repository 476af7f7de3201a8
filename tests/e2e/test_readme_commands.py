"""The whole path: the README's commands, run in their order, and the bundled model at two bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ernieq.bundled import bundled_model, calibration_texts, resolve_source
from ernieq.calibrate import read_text_file
from ernieq.checkpoint import load_tokenizer, open_checkpoint
from ernieq.convert import Conversion, apply_overrides, default_recipe
from ernieq.encode import EncodeOptions
from ernieq.evaluate import evaluate_text, load_text
from ernieq.load import open_stream
from tests.documents import README, commands
from tests.e2e.quick import ELSEWHERE, THREADS, prepared, write_sources


def test_every_command_of_the_readme_runs_in_its_order(tmp_path: Path) -> None:
    write_sources(tmp_path)
    typed = commands(README, "ernieq")
    assert {arguments[0] for arguments in typed} >= {"quantize", "eval-ppl", "generate", "verify", "export"}
    for arguments in typed:
        if arguments[0] in ELSEWHERE:
            assert Path(ELSEWHERE[arguments[0]]).is_file()
            continue
        finished = subprocess.run(
            [sys.executable, "-c", "from ernieq.cli import main; main()", *prepared(arguments, tmp_path)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": str(THREADS),
                "PYTHONWARNINGS": "ignore",
            },
        )
        assert finished.returncode == 0, f"ernieq {' '.join(arguments)}: {finished.stderr}"
        assert finished.stdout.strip(), f"ernieq {' '.join(arguments)} prints nothing"
    made = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert made == {
        "hub",
        "ernie-21b-2bit",
        "ernie-21b-6gb",
        "ernieq-nano-2bit",
        "ernieq-nano-2bit-decoded",
        "ernieq-nano-3bit",
        "ernieq-nano-close",
        "ernieq-nano-hessians",
    }


@pytest.fixture(scope="module")
def nano_2bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model by the default recipe for two bits, but with 12 state bits and little text."""
    out = tmp_path_factory.mktemp("nano") / "ernieq-nano-2bit"
    quick = {"encode": {"state_bits": 12}, "calibration": {"windows": 16, "window": 512}}
    recipe = apply_overrides(default_recipe(2), quick, "test")
    texts = [read_text_file(text.path) for text in calibration_texts()]
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    Conversion(
        open_checkpoint(bundled_model()), "bundled:ernieq-nano", recipe, texts, EncodeOptions(threads=THREADS)
    ).run(out, overwrite=False, card=lambda _: "# nano\n")
    torch.set_num_threads(before)
    return out


def test_nano_at_two_bits_is_small(nano_2bit: Path) -> None:
    packed = sum(path.stat().st_size for path in nano_2bit.glob("*.safetensors"))
    assert packed < 7_100_000
    assert packed < (bundled_model() / "model.safetensors").stat().st_size / 4.5


# Measured with these settings: KL 0.2125, ratio of perplexities 1.140. The margin of a fifth is for other
# processors, whose float sums differ in their last bits and so choose other paths through the trellis.
LARGEST_KL = 0.255
LARGEST_RATIO = 1.17


def test_nano_at_two_bits_stays_close_to_its_base_on_a_text_it_was_not_calibrated_on(nano_2bit: Path) -> None:
    stream = open_stream(nano_2bit, threads=THREADS)
    assert stream.base is not None
    record = evaluate_text(
        stream,
        load_text("english_books"),
        load_tokenizer(nano_2bit),
        window=512,
        max_windows=4,
        base_stream=open_stream(resolve_source(stream.base), threads=THREADS),
    )
    assert record.divergence is not None
    assert 0 < record.divergence.mean_kl < LARGEST_KL
    assert 1 < record.divergence.perplexity_ratio < LARGEST_RATIO
