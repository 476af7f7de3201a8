"""``ErnieqConfig``: tells vLLM how each layer of a packed checkpoint is quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from ernieq.integrations.vllm.embedding import ErnieqEmbeddingMethod
from ernieq.integrations.vllm.experts import ErnieqExpertsMethod
from ernieq.integrations.vllm.linear import ErnieqLinearMethod
from ernieq.integrations.vllm.modules import PackedModules
from ernieq.kernels.device import OLDEST_CAPABILITY

_EMBEDDING = "model.embed_tokens"
_NORM_MIN = 1e-12  # of configurations that do not state it


class ErnieqConfig(QuantizationConfig):  # type: ignore[misc]
    """The ``quantization_config`` of a packed checkpoint.

    Args:
        modules: the packed matrices and their codes.
    """

    def __init__(self, modules: PackedModules) -> None:
        super().__init__()
        self.modules = modules
        self.tied = False
        self.norm_min = _NORM_MIN

    @classmethod
    def get_name(cls) -> str:
        """The name in ``quant_method``."""
        return "ernieq"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Dtypes of activations; products are formed in float32 (float16 inputs on a GPU) whatever they are."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Oldest GPU, as vLLM counts: 80 is Ampere."""
        major, minor = OLDEST_CAPABILITY
        return 10 * major + minor

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything stands in ``config.json``."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ErnieqConfig:
        """Read the object of ``config.json``.

        Raises:
            FormatError: it is of another format version, or breaks a rule.
        """
        return cls(PackedModules(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Take from the model's configuration what a layer needs to know."""
        del model_name, revision
        self.tied = bool(getattr(hf_config, "tie_word_embeddings", False))
        self.norm_min = float(getattr(hf_config, "moe_norm_min", None) or _NORM_MIN)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer; None where vLLM's own will do.

        Raises:
            UnsupportedModelError: the routed experts of the layer are not packed alike.
        """
        if isinstance(layer, LinearBase):
            parts = self.modules.parts(prefix, self.packed_modules_mapping)
            packed = any(spec is not None for spec in parts.values())
            return ErnieqLinearMethod(parts) if packed else UnquantizedLinearMethod()
        if isinstance(layer, RoutedExperts):
            specs = self.modules.experts(prefix, layer.moe_config.num_logical_experts)
            return specs and ErnieqExpertsMethod(layer.moe_config, prefix, specs, self.norm_min)
        if isinstance(layer, VocabParallelEmbedding):
            tied = isinstance(layer, ParallelLMHead) and self.tied
            module = _EMBEDDING if tied or not prefix else prefix  # the dense model's embedding has no prefix
            spec = self.modules.spec(module)
            return spec and ErnieqEmbeddingMethod(module, spec, own_weight=not tied)
        return None
