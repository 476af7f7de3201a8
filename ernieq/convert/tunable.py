"""A model whose code words are fixed while row scales, norms and routers can learn.

A quantized matrix is ``diag(scale) Q`` with Q what its code words stand for, so a product is ``(x Q^T) scale``:
the gradient of the scales needs the outputs alone, and none is as large as a matrix. Forward passes see all
that learns rounded as the file stores it; gradients pass through the rounding unchanged (straight-through,
arXiv 1308.3432).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ernieq.calibrate.narrow import ExactRouter
from ernieq.checkpoint import Checkpoint
from ernieq.convert.export import decode_rows
from ernieq.convert.groups import EMBEDDING, HEAD
from ernieq.convert.learnt import (
    LearntWeight,
    Recomputed,
    ScaledEmbedding,
    ScaledLinear,
    TunableNorm,
    TunableRouter,
)
from ernieq.convert.scale_bank import ScaleBank
from ernieq.model import (
    ErnieForCausalLM,
    ModelConfig,
    ParameterRole,
    StackedExperts,
    expected_parameters,
)
from ernieq.model.mlp import Router
from ernieq.trellis import EncodedMatrix

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class TunableModel:
    """The quantized model, and what of it can learn.

    Args:
        checkpoint: the source; whatever is not quantized comes from it.
        matrices: module name -> what the encoder found.
        device: where the model lies.
        routers: whether routers learn too.
        narrow: whether the matrices of the layers are held and multiplied in bfloat16, and layers compute twice
            rather than hold their activations: for a model that would not fit otherwise.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        matrices: Mapping[str, EncodedMatrix],
        device: torch.device,
        *,
        routers: bool = True,
        narrow: bool = False,
    ) -> None:
        self._device, self._matrices, self._narrow = device, matrices, narrow
        with torch.device("meta"):
            self.model = ErnieForCausalLM(checkpoint.config).requires_grad_(False)
        stacks = _stacks(checkpoint.config, matrices) if device.type == "cuda" else {}
        stacked = [block for blocks in stacks.values() for block in blocks]
        together = {name for block in stacked for name in block}
        single = [name for name in matrices if name not in together]
        stored = {name: matrix.scale for name, matrix in matrices.items()}
        self.scales = ScaleBank(stored, [*([name] for name in single), *stacked], device)
        self.weights: dict[str, LearntWeight] = {}
        self._fill(checkpoint, {ParameterRole.NORM} | ({ParameterRole.ROUTER} if routers else set()))
        for name in single:
            self._put_matrix(name)
        for path, blocks in stacks.items():
            self._put_stack(path, blocks)
        if narrow:
            for index, layer in enumerate(self.model.model.layers):
                self.model.model.layers[index] = Recomputed(layer)

    def states(self, token_ids: Tensor) -> Tensor:
        """Input of the head: (windows, length) int64 to (windows, length, hidden_size) float32."""
        states: Tensor = self.model.model(token_ids.to(self._device))
        return states

    def log_probs(self, states: Tensor) -> Tensor:
        """Log probabilities of the next token: (rows, hidden_size) to (rows, vocabulary) float32."""
        logits: Tensor = self.model.lm_head(states)
        return logits.log_softmax(dim=-1)

    def changes(self) -> Iterator[nn.Parameter]:
        """All that learns: zero where nothing has changed."""
        yield self.scales.change
        yield from (weight.change for weight in self.weights.values())

    def _fill(self, checkpoint: Checkpoint, learning: Collection[ParameterRole]) -> None:
        """Load whatever is not quantized, in float32."""
        eps = checkpoint.config.rms_norm_eps
        for name, spec in expected_parameters(checkpoint.config).items():
            module = name.removesuffix(".weight")
            if module in self._matrices:
                continue
            tensor = checkpoint.parameter(name, spec, torch.float32).to(self._device)
            if spec.role in learning:
                weight = LearntWeight(tensor, _DTYPES[checkpoint.info(name).dtype])
                self.weights[name] = weight
                norm = spec.role is ParameterRole.NORM
                _put(self.model, module, TunableNorm(weight, eps) if norm else TunableRouter(weight))
                continue
            owner, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
        for name, module in list(self.model.named_modules()):
            if isinstance(module, Router):
                _put(self.model, name, ExactRouter(module))
        checkpoint.release()
        if checkpoint.config.tie_word_embeddings:
            self.model.tie_head()

    def _put_matrix(self, name: str) -> None:
        values, scale = self._values(name), self.scales.leaf([name])
        if name != EMBEDDING:
            _put(self.model, name, ScaledLinear(values, scale, _bias(self.model, name)))
            return
        self.model.model.embed_tokens = ScaledEmbedding(values, scale)
        if self.model.config.tie_word_embeddings:
            self.model.lm_head = ScaledLinear(values, scale, _bias(self.model, HEAD))

    def _put_stack(self, path: str, blocks: Sequence[Sequence[str]]) -> None:
        gate, up, down = (torch.stack([self._values(name) for name in block]) for block in blocks)
        scales = [self.scales.leaf(block) for block in blocks]
        _put(self.model, path, StackedExperts((gate, up, down), (scales[0], scales[1], scales[2])))

    def _values(self, name: str) -> Tensor:
        """The decoded matrix in the model's own basis with all scales 1."""
        # 8 bits of a logit would be too few: embedding and head stay wide.
        narrow = self._narrow and name not in (EMBEDDING, HEAD)
        matrix = self._matrices[name]
        unit = dataclasses.replace(matrix, scale=np.ones_like(matrix.scale))
        dtype = torch.bfloat16 if narrow else torch.float32
        return torch.cat([rows.to(dtype) for rows in decode_rows(unit)]).to(self._device)


def _stacks(config: ModelConfig, matrices: Mapping[str, EncodedMatrix]) -> dict[str, list[list[str]]]:
    """Paths of the routed experts of layers, all of which are quantized -> their matrices by projection."""
    stacks = {}
    for index in filter(config.is_moe_layer, range(config.num_hidden_layers)):
        path, experts = f"model.layers.{index}.mlp.experts", range(config.moe_num_experts)
        blocks = [[f"{path}.{expert}.{name}" for expert in experts] for name in _PROJECTIONS]
        if all(name in matrices for block in blocks for name in block):
            stacks[path] = blocks
    return stacks


def _bias(model: ErnieForCausalLM, name: str) -> Tensor | None:
    bias = model.get_submodule(name).bias
    return bias if isinstance(bias, Tensor) else None


def _put(model: ErnieForCausalLM, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
