"""Packed modules in place of those of transformers' model, before and after its loader has run."""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeExperts

from ernieq.errors import MissingTensorError, UsageError
from ernieq.integrations.transformers.modules import (
    PackedEmbedding,
    PackedExperts,
    PackedHead,
    PackedLinear,
    PackedMatrix,
    checkpoint_name,
)
from ernieq.load.source import PackedSource
from ernieq.model import Mlp
from ernieq.pack import PackedReader

_MODELS = ("Ernie4_5ForCausalLM", "Ernie4_5_MoeForCausalLM")
_HEAD = "lm_head"


def insert_packed(model: PreTrainedModel, source: PackedSource) -> None:
    """Replace modules of a model on the meta device by packed ones that wait for their tensors.

    Raises:
        UsageError: the model is not one of those that packed checkpoints hold.
    """
    if type(model).__name__ not in _MODELS:
        raise UsageError(
            f"a packed checkpoint holds a causal language model, not a {type(model).__name__}; "
            "load it with AutoModelForCausalLM"
        )
    reader = source.reader
    quantized = frozenset(reader.modules())
    for name, module in list(model.named_modules()):
        if isinstance(module, Ernie4_5_MoeExperts):
            model.set_submodule(name, _experts(name, source))
        elif name in quantized and isinstance(module, nn.Embedding):
            model.set_submodule(name, PackedEmbedding(reader.spec_of(name), module))
        elif name in quantized and isinstance(module, nn.Linear):
            model.set_submodule(name, PackedLinear(reader.spec_of(name), module))
    embedding = model.get_input_embeddings()
    if source.config.tie_word_embeddings and isinstance(embedding, PackedEmbedding):
        head = model.get_submodule(_HEAD)
        assert isinstance(head, nn.Linear)
        model.set_submodule(_HEAD, PackedHead(embedding, head))
        # Nothing is left to tie: transformers would look for parameters of these names.
        model._tied_weights_keys, model.all_tied_weights_keys = {}, {}
    _expect_carried(model, reader)
    assert _packed_names(model) == quantized, "every packed matrix of the checkpoint has found its module"


def finish_packed(model: PreTrainedModel) -> None:
    """Turn the loaded tensors into modules that compute.

    Raises:
        MissingTensorError: transformers has left a tensor of the model as it was.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not getattr(tensor, "_is_hf_initialized", False):  # transformers' mark of what it has filled
            raise MissingTensorError(
                f"transformers has not found {checkpoint_name(name)} in the packed checkpoint; "
                "the model would compute with random numbers"
            )
    for kind in (PackedExperts, PackedLinear | PackedEmbedding):  # experts unwrap their own linears
        for module in list(model.modules()):
            if isinstance(module, kind):
                module.finish()
    model.requires_grad_(False)  # codes have no gradients: a loss must not seem to reach what lies before them


def _experts(name: str, source: PackedSource) -> PackedExperts:
    """Experts of a layer by themselves, on the meta device, packed where the checkpoint has packed them."""
    config, reader = source.config, source.reader
    experts = []
    for number in range(config.moe_num_experts):
        with torch.device("meta"):
            mlp = Mlp(config.hidden_size, config.moe_intermediate_size, bias=False)
        for part, linear in list(mlp.named_children()):
            module = f"{name}.{number}.{part}"
            assert isinstance(linear, nn.Linear)
            if source.is_quantized(module):
                setattr(mlp, part, PackedLinear(reader.spec_of(module), linear))
        experts.append(mlp)
    return PackedExperts(config, experts)


def _expect_carried(model: PreTrainedModel, reader: PackedReader) -> None:
    """Let transformers know that the checkpoint holds tensors that its model has no use for."""
    coverage = reader.manifest.coverage
    assert coverage is not None, "a manifest that was read has its coverage"
    known = model._keys_to_ignore_on_load_unexpected or ()
    model._keys_to_ignore_on_load_unexpected = {*known, *(f"^{re.escape(name)}$" for name in coverage.carried)}


def _packed_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, PackedMatrix)}
