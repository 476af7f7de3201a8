"""Encode matrices that read the same input: rotate, scale, LDLQ, fit the scales, pack."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ernieq.encode.batch_matrix import check_shapes, cut_apart, encode_in_pieces
from ernieq.encode.block_order import block_orders, columns_of
from ernieq.encode.curvature import Basis, check_finite
from ernieq.encode.feedback import block_ldl_factor, encode_ldlq
from ernieq.encode.options import EncodeOptions, EncodingResult
from ernieq.encode.scales import initial_scale, refit_scale
from ernieq.trellis import TrellisCode, pack_symbols


def encode_matrices(
    weights: Mapping[str, Tensor],
    hessian: Tensor,
    signs: NDArray[np.int8],
    code: TrellisCode,
    options: EncodeOptions,
    on_block: Callable[[int], None] | None = None,
) -> dict[str, EncodingResult]:
    """Encode matrices that share an input, a Hessian and a code; their rows are searched together.

    Args:
        weights: name -> (out_features, in_features) float32; sides are multiples of 16.
        hessian: (in_features, in_features) float32, mean of x x^T over tokens, in the model's own basis.
        signs: (in_features,) int8 of the rotation.
        code: the trellis code.
        options: see ``EncodeOptions``.
        on_block: called with the number of weights after each block of columns.

    The device of the Hessian does the work; the weights may lie elsewhere, and what they decode to lies there.

    Returns:
        name -> result, in the order of ``weights``.

    Raises:
        ShapeError: a side of a matrix is not a multiple of 16.
        NonFiniteError: the Hessian has NaN or infinite numbers (an activation overflowed).
    """
    check_shapes(weights)
    if hessian.is_cuda:
        return encode_in_pieces(weights, hessian, signs, code, options, on_block)
    check_finite([hessian], [next(iter(weights))])
    stacked = torch.cat([weight.float() for weight in weights.values()])
    basis = Basis(signs, hessian.device)
    rotated, rotated_hessian = basis.rotated(stacked), basis.rotated_hessian(hessian)
    scale = initial_scale(rotated, code.bits_per_weight)
    order = block_orders([rotated_hessian], options.damping)[0] if options.order_blocks else None
    columns = slice(None) if order is None else columns_of(order)
    symbols, normalised = encode_ldlq(
        rotated[:, columns],
        block_ldl_factor(rotated_hessian[columns][:, columns], options.damping),
        scale.float(),
        code,
        first_pass_steps=options.first_pass_steps,
        backend=options.backend,
        threads=options.threads,
        on_block=on_block,
    )
    if order is not None:
        back = order.argsort()
        symbols, normalised = symbols[:, back.numpy()], normalised[:, columns_of(back)]
    scale = refit_scale(rotated, normalised, rotated_hessian, scale)
    decoded = normalised * scale.float()[:, None]
    packed = pack_symbols(symbols, code)
    own_basis = basis.own(decoded)

    def error_of(rows: slice) -> float:
        return proxy_error(rotated[rows], decoded[rows], rotated_hessian)

    return cut_apart(weights, packed, scale.numpy(), own_basis, signs, code, error_of)


def proxy_error(weight: Tensor, decoded: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T); the plain squared error where the Hessian is zero."""
    difference = weight - decoded
    loss = _total((difference @ hessian) * difference)
    power = _total((weight @ hessian) * weight)
    if power <= 0:
        loss, power = _total(difference.square()), _total(weight.square())
    return float(loss / power) if power > 0 else 0.0


def _total(terms: Tensor) -> Tensor:
    """Sum of a matrix, row by row: threads share out rows, where they would cut a single sum into parts."""
    total: Tensor = terms.sum(dim=1).sum()
    return total
