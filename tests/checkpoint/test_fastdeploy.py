"""A WINT2 checkpoint of FastDeploy reads as the ordinary checkpoint that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ernieq.checkpoint import InputOrder, open_checkpoint, open_fastdeploy
from ernieq.errors import CheckpointError, ErnieqError, MissingTensorError, ShapeError, UnsupportedModelError
from tests.checkpoint.wint2_files import Wint2Files

EXPERT = "ernie.layers.2.mlp.experts.1.up_gate_proj"


@pytest.fixture
def files() -> Wint2Files:
    return Wint2Files()


@pytest.mark.parametrize("kernel_order", [False, True])
@pytest.mark.parametrize("prefix", ["ernie.", "model."])
def test_every_tensor_is_read_as_the_one_that_is_meant(tmp_path: Path, kernel_order: bool, prefix: str) -> None:
    files = Wint2Files(kernel_order=kernel_order, prefix=prefix)
    checkpoint = open_fastdeploy(files.write(tmp_path / "wint2"))
    assert checkpoint.order is (InputOrder.KERNEL if kernel_order else InputOrder.PLAIN)
    assert checkpoint.names() == sorted(files.meant)
    for name, tensor in files.meant.items():
        found, info = checkpoint.read(name), checkpoint.info(name)
        assert torch.equal(found, tensor), name
        assert found.dtype is tensor.dtype
        assert (info.shape, info.nbytes) == (tuple(tensor.shape), tensor.nbytes)
        assert bytes(checkpoint.read_bytes(name)) == bytes(
            tensor.contiguous().view(torch.uint8).numpy().tobytes()
        )
    assert checkpoint.audit().unknown == ()
    assert {storage.name: count for storage, count in checkpoint.storage_counts().items()} == {
        "WINT2": 2 * 4 * 3,
        "INT4": 4 * 3,
        "INT8": 4 * 4 + 3 + 3 * 3,
        "TRANSPOSED": 3 + 1,
        "SAME": 2 + 2 * 4 + 3,
    }


def test_a_stated_order_goes_before_what_the_weights_tell(files: Wint2Files, tmp_path: Path) -> None:
    directory = files.write(tmp_path / "wint2")
    stated = open_fastdeploy(directory, order=InputOrder.KERNEL)
    name = "model.layers.2.mlp.experts.0.down_proj.weight"
    assert not torch.equal(stated.read(name), files.meant[name])
    assert torch.equal(
        stated.read(name).double().sum(dim=1), open_fastdeploy(directory).read(name).double().sum(dim=1)
    )


def test_the_multi_token_head_is_left_out_and_named(files: Wint2Files, tmp_path: Path) -> None:
    files.stored["ernie.mtp_block.0.self_attn.o_proj.weight"] = torch.zeros(4, 4)
    checkpoint = open_fastdeploy(files.write(tmp_path / "wint2"))
    assert checkpoint.left_out == ("ernie.mtp_block.0.self_attn.o_proj.weight",)
    assert "mtp" not in " ".join(checkpoint.names())


def test_signed_bytes_mean_the_same_as_unsigned_ones(files: Wint2Files, tmp_path: Path) -> None:
    for part in ("quant_weight", "weight_scale"):
        files.stored[f"{EXPERT}.{part}"] = files.stored[f"{EXPERT}.{part}"].view(torch.int8)
    checkpoint = open_fastdeploy(files.write(tmp_path / "wint2"))
    name = "model.layers.2.mlp.experts.1.up_proj.weight"
    assert torch.equal(checkpoint.read(name), files.meant[name])


def halve(files: Wint2Files, name: str) -> None:
    files.stored[name] = files.stored[name][: len(files.stored[name]) // 2]


def turn(files: Wint2Files, name: str) -> None:
    files.stored[name] = files.stored[name].T


def widen(files: Wint2Files, name: str) -> None:
    files.stored[name] = files.stored[name].to(torch.int32)


def drop(files: Wint2Files, name: str) -> None:
    del files.stored[name]


def add(files: Wint2Files, name: str) -> None:
    files.stored[name] = torch.zeros(2)


def to_float8(files: Wint2Files, name: str) -> None:
    files.stored[name] = torch.zeros(files.stored[name].shape).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("damage", "name", "kind", "words"),
    [
        (halve, f"{EXPERT}.quant_weight", ShapeError, "(32, 256) is needed"),
        (halve, f"{EXPERT}.weight_scale", ShapeError, "take the whole one"),
        (halve, f"{EXPERT}.code_zp", ShapeError, "(256,) is needed"),
        (turn, "ernie.layers.0.mlp.down_proj.quant_weight", None, ""),  # square: shapes can't tell
        (turn, "ernie.layers.0.self_attn.qkv_proj.quant_weight", ShapeError, "(256, 128) is needed"),
        (turn, "ernie.layers.2.mlp.gate.weight", ShapeError, "(128, 4) is needed"),
        (widen, f"{EXPERT}.quant_weight", CheckpointError, "U8 or I8 is needed"),
        (to_float8, "ernie.layers.0.self_attn.o_proj.quant_weight", CheckpointError, "U8 or I8 is needed"),
        (drop, f"{EXPERT}.super_scales", MissingTensorError, "which belongs to"),
        (drop, "ernie.layers.2.self_attn.qkv_proj.quant_weight", MissingTensorError, "q_proj"),
        (drop, "ernie.norm.weight", MissingTensorError, "lacks ernie.norm.weight"),
        (add, "ernie.layers.2.self_attn.cachek_matmul.activation_scale", UnsupportedModelError, "no place"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    files: Wint2Files,
    tmp_path: Path,
    damage: Callable[[Wint2Files, str], None],
    name: str,
    kind: type[ErnieqError] | None,
    words: str,
) -> None:
    damage(files, name)
    directory = files.write(tmp_path / "wint2")
    if kind is None:
        open_fastdeploy(directory)
        return
    with pytest.raises(kind) as caught:
        open_fastdeploy(directory)
    assert words in str(caught.value)
    assert name.rsplit(".", 1)[0].removesuffix(".qkv_proj") in str(caught.value)


def test_a_scale_that_is_not_finite_is_named_when_it_is_read(files: Wint2Files, tmp_path: Path) -> None:
    name = "ernie.layers.3.mlp.experts.2.down_proj"
    files.stored[f"{name}.super_scales"][3] = float("nan")
    checkpoint = open_fastdeploy(files.write(tmp_path / "wint2"))
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.experts\.2\.down_proj in .*NaN or infinite"):
        checkpoint.read("model.layers.3.mlp.experts.2.down_proj.weight")


def test_slices_pickles_and_other_checkpoints_are_refused(
    files: Wint2Files, tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    directory = files.write(tmp_path / "sliced")
    (directory / "rank0").mkdir()
    with pytest.raises(CheckpointError, match=r"cut into slices for several GPUs are not read\); take baidu/"):
        open_fastdeploy(directory)
    for path in directory.glob("model*"):
        path.rename(directory / "rank0" / path.name)
    (directory / "rank0").rename(directory / "elsewhere")  # what a download of the large files' names leaves
    with pytest.raises(CheckpointError, match=r"slices for several GPUs are not read"):
        open_fastdeploy(directory)
    pickled = files.write(tmp_path / "pickled")
    for path in pickled.glob("model*"):
        path.unlink()
    (pickled / "model_state.pdparams").touch()
    with pytest.raises(CheckpointError, match=r"model_state\.pdparams is a pickle, which could run code"):
        open_fastdeploy(pickled)
    with pytest.raises(UnsupportedModelError, match=r"holds no WINT2 matrix .* quantize reads ordinary"):
        open_fastdeploy(tiny(hidden=128, layers=1, moe=False))
    with pytest.raises(CheckpointError, match="does not exist"):
        open_fastdeploy(tmp_path / "nowhere")


def test_quantize_points_to_the_import(files: Wint2Files, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="ernieq import-wint2 reads it"):
        open_checkpoint(files.write(tmp_path / "wint2"))
