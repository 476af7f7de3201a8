"""Do the quantized layers still choose the same experts?"""

from __future__ import annotations

import torch
from torch import Tensor

from ernieq.evaluate.stream import RoutingTrace
from ernieq.records import RoutingRecord


class RoutingTally:
    """Sums of agreement over groups of windows, layer by layer.

    Args:
        num_experts: experts per MoE layer.
    """

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._kept: dict[int, int] = {}
        self._loads: dict[int, Tensor] = {}

    def add(self, measured: RoutingTrace, base: RoutingTrace) -> None:
        """Count the tokens of one group; both traces must be of the same tokens."""
        for layer, chosen in measured.selected.items():
            chosen_mask = self._mask(chosen)
            base_mask = self._mask(base.selected[layer])
            self._kept[layer] = self._kept.get(layer, 0) + int((chosen_mask & base_mask).sum())
            loads = torch.stack((chosen_mask.sum(0), base_mask.sum(0))).double()  # (2, experts)
            self._loads[layer] = self._loads.get(layer, torch.zeros_like(loads)) + loads

    def records(self) -> tuple[RoutingRecord, ...]:
        """One record per MoE layer, in order."""
        rows = []
        for layer in sorted(self._kept):
            shares = self._loads[layer] / self._loads[layer].sum(1, keepdim=True)
            shift = 0.5 * float((shares[0] - shares[1]).abs().sum())
            rows.append(RoutingRecord(layer, self._kept[layer] / float(self._loads[layer][1].sum()), shift))
        return tuple(rows)

    def _mask(self, selected: Tensor) -> Tensor:
        """(tokens, k) expert numbers to (tokens, experts) bool."""
        mask = torch.zeros(selected.shape[0], self._num_experts, dtype=torch.bool)
        return mask.scatter_(1, selected.long(), True)
