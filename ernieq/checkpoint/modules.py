"""Parts of the model, filled from a checkpoint one at a time.

Every tensor is checked (shape, dtype, finite) and copied out of the file, whose mapping is let go of before the
function returns: memory holds one part, however many there are.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from ernieq.checkpoint.checkpoint import Checkpoint
from ernieq.model import (
    DecoderLayer,
    ParameterRole,
    ParameterSpec,
    RmsNorm,
    TokenEmbedding,
    expected_parameters,
    layer_parameters,
)

_EMBEDDING = "model.embed_tokens.weight"
_ModuleT = TypeVar("_ModuleT", bound=nn.Module)
_ROUTER_ROLES = (ParameterRole.ROUTER, ParameterRole.ROUTER_BIAS)


def load_layer(checkpoint: Checkpoint, index: int, dtype: torch.dtype | None = torch.float32) -> DecoderLayer:
    """Decoder layer ``index``; its router stays float32 whatever ``dtype`` is.

    With None for ``dtype`` every other tensor keeps the one that it is stored in.

    Raises:
        MissingTensorError, ShapeError, NonFiniteError, CheckpointError: as `Checkpoint.parameter`.
    """
    with torch.device("meta"):
        layer = DecoderLayer(checkpoint.config, index)
    return _fill(layer, checkpoint, layer_parameters(checkpoint.config, index), f"model.layers.{index}.", dtype)


def load_embedding(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> nn.Embedding:
    """The token embedding. Raises as `load_layer`."""
    config = checkpoint.config
    with torch.device("meta"):
        embedding = TokenEmbedding(config.vocab_size, config.hidden_size)
    return _fill(embedding, checkpoint, _specs(checkpoint, "model.embed_tokens."), "model.embed_tokens.", dtype)


def load_final_norm(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> RmsNorm:
    """The norm before the head. Raises as `load_layer`."""
    with torch.device("meta"):
        norm = RmsNorm(checkpoint.config.hidden_size, checkpoint.config.rms_norm_eps)
    return _fill(norm, checkpoint, _specs(checkpoint, "model.norm."), "model.norm.", dtype)


def load_head(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """The head; if it is tied, a linear with the embedding's weight. Raises as `load_layer`."""
    config = checkpoint.config
    specs = _specs(checkpoint, "lm_head.")
    with torch.device("meta"):
        head = nn.Linear(config.hidden_size, config.vocab_size, bias="lm_head.bias" in specs)
    if config.tie_word_embeddings:
        specs["lm_head.weight"] = expected_parameters(config)[_EMBEDDING]
    return _fill(head, checkpoint, specs, "lm_head.", dtype, tied=config.tie_word_embeddings)


def _specs(checkpoint: Checkpoint, prefix: str) -> dict[str, ParameterSpec]:
    expected = expected_parameters(checkpoint.config)
    return {name: spec for name, spec in expected.items() if name.startswith(prefix)}


def _fill(
    module: _ModuleT,
    checkpoint: Checkpoint,
    specs: dict[str, ParameterSpec],
    prefix: str,
    dtype: torch.dtype | None,
    *,
    tied: bool = False,
) -> _ModuleT:
    """Give a module on the meta device its parameters; their names in the file begin with ``prefix``."""
    state: dict[str, Tensor] = {}
    for name, spec in specs.items():
        stored = _EMBEDDING if tied and name == "lm_head.weight" else name
        kept = checkpoint.read(stored).dtype if dtype is None else dtype
        wanted = torch.float32 if spec.role in _ROUTER_ROLES else kept
        state[name.removeprefix(prefix)] = checkpoint.parameter(stored, spec, wanted)
    module.load_state_dict(state, strict=True, assign=True)
    checkpoint.release()
    return module.requires_grad_(False).eval()
