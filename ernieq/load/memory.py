"""How much memory of a GPU a model takes, asked before anything is put there."""

from __future__ import annotations

import re
from collections import Counter

import torch

from ernieq.decode.gpu import BUFFER_BYTES
from ernieq.load.source import WeightSource
from ernieq.model import ParameterRole, expected_parameters

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_WEIGHT = ".weight"
FLOAT32_ROLES = frozenset({ParameterRole.ROUTER, ParameterRole.ROUTER_BIAS})

# Besides the weights: two buffers of decoded weights, one more for activations and the libraries' workspaces.
_WORKING_BYTES = 3 * BUFFER_BYTES


def model_bytes(source: WeightSource, dtype: torch.dtype) -> int:
    """Bytes of a whole model on a GPU, with room to work."""
    return sum(_bytes_by_part(source, dtype).values()) + _WORKING_BYTES


def stream_bytes(source: WeightSource, dtype: torch.dtype) -> int:
    """Bytes of the largest layer on a GPU, or of embedding and head if they are larger, with room to work."""
    return max(_bytes_by_part(source, dtype).values()) + _WORKING_BYTES


def _bytes_by_part(source: WeightSource, dtype: torch.dtype) -> Counter[str]:
    """Bytes of each decoder layer by its number, and of all the rest under an empty name."""
    stored = source.tensor_bytes()
    parts: Counter[str] = Counter()
    for name, spec in expected_parameters(source.config).items():
        layer = _LAYER.match(name)
        if source.is_quantized(name.removesuffix(_WEIGHT)):
            size = stored[name]
        else:
            held = torch.float32 if spec.role in FLOAT32_ROLES else dtype
            size = torch.Size(spec.shape).numel() * held.itemsize
        parts[layer[1] if layer else ""] += size
    return parts
