"""Modules that receive packed tensors under their names in the checkpoint, and then compute with them.

transformers' loader fills buffers that it finds by name, and accelerate hangs its hooks on modules before the
loader is done. So these modules stay where they are: ``finish`` turns their filled buffers into a module of
``ernieq.decode``, which does the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from ernieq.decode import TrellisEmbedding, TrellisExperts, TrellisLinear, TrellisWeight
from ernieq.model import Experts, Mlp, ModelConfig, Routing
from ernieq.pack import ModuleSpec
from ernieq.pack.layout import PACKED_SUFFIXES, packed_shape, unpack_signs
from ernieq.trellis import EncodedMatrix

_BUFFERS = [suffix.removeprefix(".") for suffix in PACKED_SUFFIXES]
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class PackedMatrix(nn.Module):
    """Base of the modules that hold one packed matrix.

    Args:
        spec: its code and rotation.
        shape: (out_features, in_features).
    """

    def __init__(self, spec: ModuleSpec, shape: tuple[int, int]) -> None:
        super().__init__()
        self.spec = spec
        self.shape = shape
        self.trellis: Any = None
        tiles = packed_shape(*shape, spec.code)
        empty = (
            torch.empty(tiles, dtype=torch.int16, device="meta"),
            torch.empty(shape[0], dtype=torch.float16, device="meta"),
            torch.empty(shape[1] // 8, dtype=torch.uint8, device="meta"),
        )
        for name, tensor in zip(_BUFFERS, empty, strict=True):
            self.register_buffer(name, tensor)

    def take_matrix(self) -> tuple[EncodedMatrix, torch.device]:
        """The tensors that were loaded, and where they were put; they are let go here."""
        loaded = [cast(Tensor, self._buffers.pop(name)) for name in _BUFFERS]
        packed, scale, signs = (tensor.cpu().numpy() for tensor in loaded)
        matrix = EncodedMatrix(packed, scale, unpack_signs(signs), self.spec.rotation_block, self.spec.code)
        return matrix, loaded[0].device


class PackedLinear(PackedMatrix):
    """In place of ``nn.Linear``.

    Args:
        spec: code and rotation of the weight.
        linear: what it replaces.
    """

    def __init__(self, spec: ModuleSpec, linear: nn.Linear) -> None:
        super().__init__(spec, (linear.out_features, linear.in_features))
        self.bias = linear.bias

    def finish(self) -> None:
        """Make the loaded tensors a ``TrellisLinear``; the bias stays a parameter of this module, too."""
        matrix, device = self.take_matrix()
        self.trellis = TrellisLinear(matrix).to(device)
        self.trellis.bias = self.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features) of the same dtype."""
        output: Tensor = self.trellis(x)
        return output


class PackedEmbedding(PackedMatrix):
    """In place of ``nn.Embedding``.

    Args:
        spec: code and rotation of the table.
        embedding: what it replaces.
    """

    def __init__(self, spec: ModuleSpec, embedding: nn.Embedding) -> None:
        super().__init__(spec, (embedding.num_embeddings, embedding.embedding_dim))
        self.dtype = embedding.weight.dtype

    def finish(self) -> None:
        """Make the loaded tensors a ``TrellisEmbedding``."""
        matrix, device = self.take_matrix()
        self.trellis = TrellisEmbedding(matrix, self.dtype).to(device)

    def forward(self, token_ids: Tensor) -> Tensor:
        """(...) int64 -> (..., width)."""
        rows: Tensor = self.trellis(token_ids)
        return rows

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Rows take part in a change of the model's dtype, though the table does not."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.trellis is not None:
            self.trellis.dtype = fn(torch.empty(0, dtype=self.trellis.dtype)).dtype
        return self


class PackedHead(nn.Module):
    """A head that is tied to a packed embedding, in place of the head's ``nn.Linear``.

    Args:
        embedding: holds the table; it stays a part of the model's other half only.
        head: what this replaces.
    """

    def __init__(self, embedding: PackedEmbedding, head: nn.Linear) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that its tensors are not listed a second time
        self.bias = head.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., width) -> (..., vocabulary) float32, on the device of ``hidden``."""
        table: TrellisEmbedding = self._embedding[0].trellis
        logits = table.project(hidden.to(table.scale.device)).to(hidden.device)
        return logits if self.bias is None else logits + self.bias.float()


class PackedExperts(nn.Module):
    """In place of transformers' fused experts of a layer: one gated MLP per expert, named as in the checkpoint.

    Shapes: N tokens, k experts per token, H hidden width.

    Args:
        config: the model's shape.
        experts: one MLP per expert, of packed and plain linears.
    """

    def __init__(self, config: ModelConfig, experts: list[Mlp]) -> None:
        super().__init__()
        self._config = config
        self.trellis: Any = None
        for number, mlp in enumerate(experts):
            self.add_module(str(number), mlp)

    def finish(self) -> None:
        """Join the loaded experts: as ``TrellisExperts`` where all are packed, else in the model's own loop."""
        experts = [cast(Mlp, self._modules.pop(str(number))) for number in range(self._config.moe_num_experts)]
        device = next(iter(experts[0].state_dict().values())).device
        for mlp in experts:
            for name in _PROJECTIONS:
                linear = getattr(mlp, name)
                if isinstance(linear, PackedLinear):
                    setattr(mlp, name, TrellisLinear(linear.take_matrix()[0]))
        if all(isinstance(getattr(mlp, name), TrellisLinear) for mlp in experts for name in _PROJECTIONS):
            self.trellis = TrellisExperts(experts).to(device)
            return
        with torch.device("meta"):
            self.trellis = Experts(self._config)
        for number, mlp in enumerate(experts):
            self.trellis[number] = mlp.to(device)

    def forward(self, hidden: Tensor, selected: Tensor, weights: Tensor) -> Tensor:
        """(N, H), (N, k) experts of each token and their weights -> (N, H)."""
        no_probabilities = weights.new_empty(0)  # the experts need none of them
        output: Tensor = self.trellis(hidden, Routing(selected, weights, no_probabilities))
        return output


def packed_weights(model: nn.Module) -> dict[str, TrellisWeight]:
    """The packed matrices of a loaded model by the names of their modules in the checkpoint."""
    return {
        checkpoint_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, TrellisWeight)
    }


def checkpoint_name(name: str) -> str:
    """Name in the checkpoint of a module or parameter of transformers' model with packed modules."""
    parts = [part for part in name.split(".") if part != "trellis"]
    return ".".join(parts).replace(".mlp.gate.moe_statics.", ".mlp.moe_statics.")
