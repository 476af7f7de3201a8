"""The routed experts of a layer, all in the trellis code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from ernieq.decode.linear import TrellisLinear
from ernieq.model import Mlp, Routing


class TrellisExperts(nn.ModuleList):
    """Weighted sum of the experts that each token selected, in place of the model's ``Experts``.

    The gate and up matrices of all experts read the same input. Where their signs are equal, as the encoder
    makes them, a token is rotated once and not once per expert; where they differ, each matrix rotates by
    itself.

    Shapes: N tokens, E experts, k experts per token, H hidden width.

    Args:
        experts: one ``Mlp`` per expert, its three linears ``TrellisLinear``.
    """

    def __init__(self, experts: Iterable[Mlp]) -> None:
        super().__init__(experts)
        readers = [cast(TrellisLinear, linear) for mlp in self for linear in (mlp.gate_proj, mlp.up_proj)]
        first = readers[0]
        self._one_rotation = all(
            reader.rotation_block == first.rotation_block and torch.equal(reader.signs, first.signs)
            for reader in readers
        )

    def forward(self, states: Tensor, routing: Routing) -> Tensor:
        """Run each selected expert once over its own tokens.

        The sum of a token is formed in the order of expert numbers, in float32, so that it does not depend on
        the other tokens.

        Args:
            states: (N, H).
            routing: of the same N tokens.

        Returns:
            (N, H) in the dtype of ``states``.
        """
        inputs = self._rotated(states)
        total = torch.zeros(states.shape, dtype=torch.float32)
        choices = routing.selected.shape[1]
        order = routing.selected.flatten().argsort(stable=True)  # (N k,) places in `selected`, expert by expert
        weights = routing.weights.float().flatten()[order, None]  # (N k, 1)
        counts = routing.selected.flatten().bincount(minlength=len(self)).tolist()
        start = 0
        for expert, count in enumerate(counts):
            if count:
                part = slice(start, start + count)
                tokens = order[part] // choices
                output = self._run(cast(Mlp, self[expert]), inputs.index_select(0, tokens))
                total.index_add_(0, tokens, output * weights[part])
                start += count
        return total.to(states.dtype)

    def _rotated(self, states: Tensor) -> Tensor:
        states = states.float()
        first = cast(TrellisLinear, cast(Mlp, self[0]).gate_proj)
        return first.rotate(states) if self._one_rotation else states

    def _run(self, mlp: Mlp, inputs: Tensor) -> Tensor:
        gate, up = cast(TrellisLinear, mlp.gate_proj), cast(TrellisLinear, mlp.up_proj)
        down = cast(TrellisLinear, mlp.down_proj)
        if self._one_rotation:
            inner = mlp.activate(gate.forward_rotated(inputs), up.forward_rotated(inputs))
        else:
            inner = mlp.activate(gate(inputs), up(inputs))
        output: Tensor = down(inner)
        return output
