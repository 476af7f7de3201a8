"""A model whose code words are fixed while row scales and norms can learn.

A quantized matrix is ``diag(scale) Q`` with Q what its code words stand for, so a product is ``(x Q^T) scale``:
the gradient of the scales needs the outputs alone, and none is as large as a matrix. Forward passes see scales
and norms rounded as the file stores them; gradients pass through the rounding unchanged (straight-through,
arXiv 1308.3432).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as checkpoint_gradient

from ernieq.calibrate.narrow import ExactRouter
from ernieq.checkpoint import Checkpoint
from ernieq.convert.export import decode_rows
from ernieq.convert.groups import EMBEDDING, HEAD
from ernieq.encode.scales import SMALLEST_SCALE
from ernieq.model import ErnieForCausalLM, ParameterRole, RmsNorm, expected_parameters
from ernieq.model.mlp import Router
from ernieq.trellis import EncodedMatrix

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class RowScale(nn.Module):
    """Scales of the rows of a matrix, learnt as the logarithm of their change.

    Args:
        stored: (out_features,) float16, what the encoder found.
        device: where it learns.
    """

    def __init__(self, stored: NDArray[np.float16], device: torch.device) -> None:
        super().__init__()
        self._stored = torch.from_numpy(stored.astype(np.float32)).to(device)
        self.change = nn.Parameter(torch.zeros_like(self._stored))

    def forward(self) -> Tensor:
        """(out_features,) float32, each a positive number of float16 as long as the change is a number."""
        scale = (self._stored * self.change.exp()).clamp(SMALLEST_SCALE, torch.finfo(torch.float16).max)
        return _as_stored(scale, torch.float16)

    def rounded(self) -> NDArray[np.float16]:
        """What the file stores, (out_features,)."""
        scale: NDArray[np.float16] = self().detach().half().cpu().numpy()
        return scale


class ScaledLinear(nn.Module):
    """Products with a quantized matrix.

    Args:
        values: (out_features, in_features), the decoded matrix with all scales 1; products have its dtype.
        scale: of its rows.
        bias: (out_features,), or None.
    """

    def __init__(self, values: Tensor, scale: RowScale, bias: Tensor | None) -> None:
        super().__init__()
        self._values, self._bias, self.scale = values, bias, scale

    def forward(self, states: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        products = functional.linear(states.to(self._values.dtype), self._values)
        output: Tensor = products.to(states.dtype) * self.scale()
        return output if self._bias is None else output + self._bias


class ScaledEmbedding(nn.Module):
    """Rows of a quantized table, by number.

    Args:
        values: (vocabulary, width), the decoded table with all scales 1.
        scale: of its rows.
    """

    def __init__(self, values: Tensor, scale: RowScale) -> None:
        super().__init__()
        self._values, self.scale = values, scale

    def forward(self, token_ids: Tensor) -> Tensor:
        """(...) int64 to (..., width)."""
        scales = functional.embedding(token_ids, self.scale()[:, None])  # (..., 1)
        return functional.embedding(token_ids, self._values).float() * scales


class TunableNorm(nn.Module):
    """A norm whose weight learns relative to its own root mean square.

    Args:
        weight: (width,) float32, as in the source.
        eps: of the model.
        stored: dtype in which the source stores the weight.
    """

    def __init__(self, weight: Tensor, eps: float, stored: torch.dtype) -> None:
        super().__init__()
        with weight.device:
            self._unit = RmsNorm(weight.numel(), eps).requires_grad_(False)
        self._source, self._step, self._stored = weight, weight.square().mean().sqrt(), stored
        self.change = nn.Parameter(torch.zeros_like(weight))

    def weight(self) -> Tensor:
        """(width,) float32, each a number of the source's dtype."""
        return _as_stored(self._source + self._step * self.change, self._stored)

    def rounded(self) -> Tensor:
        """What the file stores, (width,) in the source's dtype."""
        return self.weight().detach().to(self._stored).cpu()

    def forward(self, states: Tensor) -> Tensor:
        """(..., width) to the same."""
        output: Tensor = self.weight() * self._unit(states)
        return output


class Recomputed(nn.Module):
    """A decoder layer whose activations are computed again for the gradient, and not held until then."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = layer

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], _cache: None = None) -> Tensor:
        """As the layer itself, without a cache."""
        output: Tensor = checkpoint_gradient(self._layer, hidden, rotary, use_reentrant=False)
        return output


class TunableModel:
    """The quantized model, and what of it can learn.

    Args:
        checkpoint: the source; norms, router and whatever else is not quantized come from it.
        matrices: module name -> what the encoder found.
        device: where the model lies.
        narrow: whether the matrices of the layers are held and multiplied in bfloat16, and layers compute twice
            rather than hold their activations: for a model that would not fit otherwise.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        matrices: Mapping[str, EncodedMatrix],
        device: torch.device,
        *,
        narrow: bool = False,
    ) -> None:
        self._device = device
        self.scales = {name: RowScale(matrix.scale, device) for name, matrix in matrices.items()}
        self.norms: dict[str, TunableNorm] = {}
        with torch.device("meta"):
            self.model = ErnieForCausalLM(checkpoint.config).requires_grad_(False)
        self._fill(checkpoint)
        for name, matrix in matrices.items():
            # 8 bits of a logit would be too few: embedding and head stay wide.
            rounded = narrow and name not in (EMBEDDING, HEAD)
            values = _unit_rows(matrix, torch.bfloat16 if rounded else torch.float32).to(device)
            _replace_matrix(self.model, name, values, self.scales[name])
        for name, router in list(self.model.named_modules()):
            if isinstance(router, Router):
                _put(self.model, name, ExactRouter(router))
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
        yield from (scale.change for scale in self.scales.values())
        yield from (norm.change for norm in self.norms.values())

    def _fill(self, checkpoint: Checkpoint) -> None:
        """Load whatever is not quantized, in float32."""
        for name, spec in expected_parameters(checkpoint.config).items():
            module = name.removesuffix(".weight")
            if module in self.scales:
                continue
            tensor = checkpoint.parameter(name, spec, torch.float32).to(self._device)
            owner, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
            if spec.role is ParameterRole.NORM:
                stored, eps = _DTYPES[checkpoint.info(name).dtype], checkpoint.config.rms_norm_eps
                self.norms[name] = TunableNorm(tensor, eps, stored)
                _put(self.model, module, self.norms[name])
        checkpoint.release()
        if checkpoint.config.tie_word_embeddings:
            self.model.tie_head()


def _as_stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value + (value.to(dtype).to(value.dtype) - value).detach()


def _unit_rows(matrix: EncodedMatrix, dtype: torch.dtype) -> Tensor:
    """The decoded matrix in the model's own basis with all scales 1."""
    unit = dataclasses.replace(matrix, scale=np.ones_like(matrix.scale))
    return torch.cat([rows.to(dtype) for rows in decode_rows(unit)])


def _replace_matrix(model: ErnieForCausalLM, name: str, values: Tensor, scale: RowScale) -> None:
    if name != EMBEDDING:
        bias = model.get_submodule(name).bias
        _put(model, name, ScaledLinear(values, scale, bias if isinstance(bias, Tensor) else None))
        return
    model.model.embed_tokens = ScaledEmbedding(values, scale)
    if model.config.tie_word_embeddings:
        bias = model.lm_head.bias
        model.lm_head = ScaledLinear(values, scale, bias if isinstance(bias, Tensor) else None)


def _put(model: ErnieForCausalLM, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
