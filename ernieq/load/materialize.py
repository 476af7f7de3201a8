"""Filling a module that was built on the meta device, tensor by tensor, from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ernieq.decode import TrellisEmbedding, TrellisExperts, TrellisHead, TrellisLinear
from ernieq.errors import FormatError, ShapeError
from ernieq.kernels import Backend
from ernieq.load.memory import FLOAT32_ROLES
from ernieq.load.source import WeightSource
from ernieq.model import ErnieForCausalLM, ParameterRole, ParameterSpec, SparseMlp

_WEIGHT = ".weight"
_LINEARS = frozenset(
    {
        ParameterRole.ROUTED_EXPERT,
        ParameterRole.SHARED_EXPERT,
        ParameterRole.ATTENTION,
        ParameterRole.DENSE_MLP,
        ParameterRole.HEAD,
    }
)
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class LoadOptions:
    """How weights are held and multiplied.

    Args:
        dtype: dtype of the weights that are not packed, except the router, which stays float32.
        backend: implementation of the kernels.
        threads: threads of the kernels; all processors by default.
        device: where weights are put, the CPU or a GPU.
    """

    dtype: torch.dtype = torch.float32
    backend: Backend = Backend.AUTO
    threads: int | None = None
    device: torch.device = _CPU


def materialize(
    module: nn.Module,
    specs: Mapping[str, ParameterSpec],
    source: WeightSource,
    options: LoadOptions,
    *,
    prefix: str = "",
) -> None:
    """Give a module on the meta device its weights; quantized matrices become modules of ``ernieq.decode``.

    Args:
        module: the whole model or one decoder layer.
        specs: all its parameters by checkpoint name.
        source: where they are.
        options: how they are held.
        prefix: what the names start with and the module's own names lack (``model.layers.3.``).

    Raises:
        MissingTensorError: a tensor is not there.
        ShapeError: a tensor or matrix has a wrong shape.
        NonFiniteError: a weight is NaN or infinite.
        FormatError: a tensor that is never quantized is.
    """
    quantized = [
        name for name in specs if name.endswith(_WEIGHT) and source.is_quantized(name.removesuffix(_WEIGHT))
    ]
    for name in quantized:
        _place_matrix(module, name.removesuffix(_WEIGHT), specs[name], source, options, prefix)
    for name in specs.keys() - set(quantized):
        dtype = torch.float32 if specs[name].role in FLOAT32_ROLES else options.dtype
        _assign(module, name.removeprefix(prefix), source.parameter(name, specs[name], dtype, options.device))
    source.release()
    _join_experts(module)
    if isinstance(module, ErnieForCausalLM) and module.config.tie_word_embeddings:
        _tie_head(module)
    if options.device.type != "cpu":
        module.to(options.device)  # only packed matrices are left: they move as they are, experts by experts
    left = [name for name, tensor in module.state_dict(keep_vars=True).items() if tensor.is_meta]
    assert not left, f"never loaded: {left}"


def _place_matrix(
    module: nn.Module, name: str, spec: ParameterSpec, source: WeightSource, options: LoadOptions, prefix: str
) -> None:
    matrix = source.encoded(name)
    found = (matrix.out_features, matrix.in_features)
    if found != spec.shape:
        raise ShapeError(f"{name} is a packed matrix of {found}; the configuration calls for {spec.shape}")
    replacement: nn.Module
    if spec.role is ParameterRole.EMBEDDING:
        replacement = TrellisEmbedding(matrix, options.dtype, backend=options.backend, threads=options.threads)
    elif spec.role in _LINEARS:
        replacement = TrellisLinear(matrix, backend=options.backend, threads=options.threads)
    else:
        raise FormatError(f"{name} is quantized, but a {spec.role.value.replace('_', ' ')} never may be")
    _assign(module, name.removeprefix(prefix), replacement)


def _assign(module: nn.Module, name: str, value: nn.Module | Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    if isinstance(value, Tensor):
        value = nn.Parameter(value, requires_grad=False)
    setattr(module.get_submodule(owner), leaf, value)


def _join_experts(module: nn.Module) -> None:
    """Replace the ``experts`` of layers in which every expert matrix is packed."""
    for part in list(module.modules()):
        if isinstance(part, SparseMlp) and all(
            isinstance(linear, TrellisLinear)
            for mlp in part.experts
            for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        ):
            part.experts = TrellisExperts(part.experts)


def _tie_head(model: ErnieForCausalLM) -> None:
    embedding = model.model.embed_tokens
    if isinstance(embedding, TrellisEmbedding):
        bias = model.lm_head.bias
        model.lm_head = TrellisHead(embedding, bias if isinstance(bias, Tensor) else None)
    else:
        model.tie_head()
