"""Routed experts of one shape as three batched products: what a GPU does in a few launches, forth and back.

Shapes: N tokens, k experts per token, E experts, C places of an expert, H hidden width, I expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ernieq.model.mlp import Experts, Mlp, Routing


class StackedExperts(nn.Module):
    """Takes the place of ``Experts``; the sum of a token is formed in the same order.

    Every expert has as many places as the one with the most tokens needs. Whatever is read twice is copied, not
    added up by atomic operations: the same tokens have the same gradients, bit for bit.

    Args:
        values: of gate and up (E, I, H) and down (E, H, I).
        scales: of their rows, if ``values`` has none: (E I,), (E I,) and (E H,) float32.
    """

    def __init__(
        self, values: tuple[Tensor, Tensor, Tensor], scales: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> None:
        super().__init__()
        self._values, self._scales = values, scales

    @classmethod
    def of(cls, experts: Experts) -> StackedExperts:
        """The same experts, stacked; a copy."""
        mlps = [expert for expert in experts if isinstance(expert, Mlp)]
        gate = torch.stack([mlp.gate_proj.weight.data for mlp in mlps])
        up = torch.stack([mlp.up_proj.weight.data for mlp in mlps])
        return cls((gate, up, torch.stack([mlp.down_proj.weight.data for mlp in mlps])))

    def forward(self, states: Tensor, routing: Routing) -> Tensor:
        """(N, H) to (N, H) in the dtype of ``states``."""
        (tokens, choices), (experts, _, hidden) = routing.selected.shape, self._values[0].shape
        selected, order = routing.selected.sort(dim=1)  # by expert, as the reference adds up
        flat = selected.flatten()
        counts = flat.bincount(minlength=experts)
        room = int(counts.max())
        by_expert = flat.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        rank = torch.empty_like(flat)
        rank[by_expert] = torch.arange(len(flat), device=flat.device) - starts.repeat_interleave(
            counts, output_size=len(flat)
        )
        places = flat * room + rank  # (N k,), each another one
        copies = states[:, None].expand(-1, choices, -1).reshape(-1, hidden)
        inputs = states.new_zeros(experts * room, hidden).index_copy(0, places, copies)
        outputs = self._run(inputs.view(experts, room, hidden)).reshape(-1, hidden)
        chosen = outputs.index_select(0, places).view(tokens, choices, hidden)
        weighted = chosen * routing.weights.gather(1, order)[..., None]
        return weighted.float().sum(dim=1).to(states.dtype)

    def _run(self, states: Tensor) -> Tensor:
        """(E, C, H) to the same: place by place through the expert."""
        gate, up = (self._product(index, states) for index in (0, 1))
        return self._product(2, Mlp.activate(gate, up))

    def _product(self, index: int, states: Tensor) -> Tensor:
        values = self._values[index]
        products = torch.bmm(states.to(values.dtype), values.mT).to(states.dtype)
        if self._scales is None:
            return products
        return products * self._scales[index].view(len(values), 1, -1)
