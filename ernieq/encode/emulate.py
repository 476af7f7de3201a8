"""What an encoded matrix would get wrong, drawn at random without a search.

LDLQ leaves ``(E L)`` white: every block's rounding error is that of the code, independent of the others, and
the feedback spreads it by ``L^-1`` (``feedback.py``; QuIP, arXiv 2307.13304, section 3). A Gaussian matrix led
through ``L^-1`` therefore has the size and the direction of a real error, at the price of one triangular solve.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ernieq.encode.curvature import Basis
from ernieq.encode.feedback import block_ldl_factor
from ernieq.kernels.precision import float32_products


def emulated_errors(
    weights: Mapping[str, Tensor], hessian: Tensor | None, signs: NDArray[np.int8], damping: float, seed: int
) -> dict[str, Tensor]:
    """Errors of matrices that read one input, for a code whose mean squared error is one per unit variance.

    The error of a code with mean squared error ``c`` is ``sqrt(c)`` times the result.

    Args:
        weights: name -> (out_features, in_features), on the device that works.
        hessian: (in_features, in_features) float32, mean of x x^T in the model's own basis, on the same device;
            None where the encoder works without one (the embedding).
        signs: (in_features,) int8 of the rotation.
        damping: as in ``EncodeOptions``.
        seed: of the noise; a matrix draws by its name, so that the others don't matter.

    Returns:
        name -> (out_features, in_features) float32 in the model's own basis.

    Raises:
        NonFiniteError: the Hessian has NaN or infinite numbers.
    """
    noise = {name: _noise(weight, name, seed) for name, weight in weights.items()}
    if hessian is None:
        return noise  # white in one basis, white in every other
    basis = Basis(signs, hessian.device)
    with float32_products(hessian.device, tensor_cores=False):
        factor = block_ldl_factor(basis.rotated_hessian(hessian), damping)
        return {
            name: basis.own(
                torch.linalg.solve_triangular(factor, white, upper=False, left=False, unitriangular=True)
            )
            for name, white in noise.items()
        }


def _noise(weight: Tensor, name: str, seed: int) -> Tensor:
    """Gaussian, each row with the root mean square of the weight's; drawn by the CPU: the same everywhere."""
    key = int.from_bytes(hashlib.sha256(f"{seed}:error:{name}".encode()).digest()[:7], "little")
    white = torch.randn(weight.shape, generator=torch.Generator().manual_seed(key)).to(weight.device)
    return white * weight.float().square().mean(dim=1, keepdim=True).sqrt()
