"""The basis in which matrices are quantized, and their Hessians in it, on the device that works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ernieq.encode.batch_feedback import block_ldl_factors
from ernieq.encode.block_order import block_orders, columns_of
from ernieq.encode.incoherence import rotate_hessian, rotation_block, symmetric
from ernieq.encode.options import EncodeOptions
from ernieq.errors import NonFiniteError
from ernieq.kernels.hadamard import rotate, unrotate


class Basis:
    """The rotation of a group, on the device that works."""

    def __init__(self, signs: NDArray[np.int8], device: torch.device) -> None:
        self.device = device
        self.block = rotation_block(len(signs))
        self._on_device = torch.from_numpy(signs).to(device)

    def rotated(self, weight: Tensor) -> Tensor:
        """(rows, in_features) float32 in the basis that is quantized."""
        return rotate(weight.to(self.device), self._on_device, self.block)

    def own(self, decoded: Tensor) -> Tensor:
        """Back to the model's own basis."""
        return unrotate(decoded, self._on_device, self.block)

    def rotated_hessian(self, hessian: Tensor) -> Tensor:
        """(in_features, in_features) float32 in the basis that is quantized."""
        return symmetric(rotate_hessian(hessian.float(), self._on_device, self.block))


@dataclass(frozen=True)
class Curvature:
    """Rotated Hessians of B matrices, or stacks of matrices, and what LDLQ needs of them.

    Args:
        hessians: (in_features, in_features) float32 each.
        factors: (B, in_features, in_features) float32, of the Hessians with their blocks in ``orders``.
        orders: (B, in_features / 16) int64; None for the natural order.
    """

    hessians: list[Tensor]
    factors: Tensor
    orders: Tensor | None

    @classmethod
    def of(
        cls, hessians: Sequence[Tensor], names: Sequence[str], basis: Basis, options: EncodeOptions
    ) -> Curvature:
        """Rotate and factor.

        Raises:
            NonFiniteError: a Hessian has NaN or infinite numbers; ``names`` say which matrices read it.
        """
        check_finite(hessians, names)
        rotated = [basis.rotated_hessian(hessian) for hessian in hessians]
        if not options.order_blocks:
            return cls(rotated, block_ldl_factors(rotated, options.damping), None)
        orders = block_orders(rotated, options.damping)
        ordered = [
            hessian[columns][:, columns]
            for hessian, columns in zip(rotated, map(columns_of, orders), strict=True)
        ]
        return cls(rotated, block_ldl_factors(ordered, options.damping), orders)

    def ordered(self, weights: Tensor) -> Tensor:
        """(B, rows, in_features) with the blocks of columns as LDLQ is to meet them."""
        if self.orders is None:
            return weights
        pairs = zip(weights, self.orders, strict=True)
        return torch.stack([weight[:, columns_of(order)] for weight, order in pairs])

    def put_back(self, symbols: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Symbols and values as in the file.

        Args:
            symbols: (B, rows / 16, in_features / 16, 256).
            values: (B, rows, in_features).
        """
        if self.orders is None:
            return symbols, values
        back = list(self.orders.argsort(dim=1))
        found = [own[:, order] for own, order in zip(symbols, back, strict=True)]
        chosen = [own[:, columns_of(order)] for own, order in zip(values, back, strict=True)]
        return torch.stack(found), torch.stack(chosen)


def check_finite(hessians: Sequence[Tensor], names: Sequence[str]) -> None:
    """Refuse Hessians with NaN or infinite numbers, with one wait for the device in all.

    Raises:
        NonFiniteError: an activation overflowed; ``names`` say which matrices read it.
    """
    finite = torch.stack([torch.isfinite(hessian).all() for hessian in hessians]).tolist()
    for name, is_finite in zip(names, finite, strict=True):
        if not is_finite:
            raise NonFiniteError(f"the Hessian of the input of {name} has NaN or infinite numbers")
