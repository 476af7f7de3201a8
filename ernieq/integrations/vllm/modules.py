"""What ``quantization_config`` says about a layer of vLLM, which may be several of the checkpoint's.

vLLM merges matrices that read one input: q, k and v; gate and up; gate and up of all experts. A merged linear
layer may have parts of different rates, and parts that are not quantized; the experts of a layer must be alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ernieq.errors import UnsupportedModelError
from ernieq.pack import ModuleSpec
from ernieq.pack.quantization import parse_quantization_config

_READERS = ("gate_proj", "up_proj")


class PackedModules:
    """Looks up the codes of vLLM's layers.

    Args:
        quantization_config: the object of ``config.json``.

    Raises:
        FormatError: it breaks a rule of FORMAT.md, or is of another version.
    """

    def __init__(self, quantization_config: Mapping[str, Any]) -> None:
        self._specs = parse_quantization_config({"quantization_config": quantization_config}, "config.json")

    def __contains__(self, module: str) -> bool:
        return module in self._specs

    def spec(self, module: str) -> ModuleSpec | None:
        """Code and rotation of a matrix; None if it is not quantized."""
        return self._specs.get(module)

    def parts(self, layer: str, merged: Mapping[str, Sequence[str]]) -> dict[str, ModuleSpec | None]:
        """The checkpoint's modules that make up a linear layer, in order, each with its code.

        Args:
            layer: vLLM's name, ``model.layers.3.self_attn.qkv_proj``.
            merged: what a last component stands for, ``{"qkv_proj": ["q_proj", "k_proj", "v_proj"]}``.
        """
        path, dot, last = layer.rpartition(".")
        names = [f"{path}{dot}{part}" for part in merged.get(last, [last])]
        return {name: self.spec(name) for name in names}

    def experts(self, layer: str, count: int) -> tuple[ModuleSpec, ModuleSpec] | None:
        """The code of gate and up of all routed experts of a layer, and that of their downs.

        Args:
            layer: ``model.layers.3.mlp.experts``.
            count: number of experts.

        Returns:
            None if no expert is quantized.

        Raises:
            UnsupportedModelError: the experts are not alike.
        """
        readers = [f"{layer}.{expert}.{part}" for expert in range(count) for part in _READERS]
        downs = [f"{layer}.{expert}.down_proj" for expert in range(count)]
        if not any(name in self for name in readers + downs):
            return None
        return self._one_spec(readers), self._one_spec(downs)

    def _one_spec(self, names: Sequence[str]) -> ModuleSpec:
        first = self.spec(names[0])
        for name in names:
            spec = self.spec(name)
            if spec is None or spec != first:
                raise UnsupportedModelError(
                    f"{name} has {_described(spec)} and {names[0]} {_described(first)}; vLLM runs the experts "
                    "of a layer together, so they must be packed alike (no [modules] entry for single experts)"
                )
        assert first is not None
        return first


def _described(spec: ModuleSpec | None) -> str:
    return "no packed weight" if spec is None else f"{spec.code.bits_per_weight} bits"
