"""WINT2, the 2-bit code of FastDeploy (CCQ, arXiv 2507.07145): four weights a byte, and four kinds of scales.

A byte ``b`` of output channel ``n`` stands for four inputs in a row:

    c   = floor(b * code_scale[n] + code_zp[n] + 0.5)
    w_i = (((c >> {9, 6, 3, 0}[i]) & 63) - 32) * local_scale[g, n] * super_scale[n]

so neighbours share three of their six bits: a convolutional code that is decoded with a shift. ``local_scale``
has 4 bits for 64 inputs; two of them are a byte, the even group in its high nibble. WINT2.md says where this
was read and what could not be checked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ernieq.errors import CheckpointError

GROUP = 64  # inputs of a local scale
WEIGHTS_PER_BYTE = 4
GROUPS_PER_BYTE = 2

_SHIFTS = (9, 6, 3, 0)
_WEIGHT_MASK, _WEIGHT_MIDDLE = 63, 32
_SCALE_MASK, _SCALE_BITS = 15, 4
# Below this, float32 holds every whole number and every half: the rounding is the one that is meant. Only the
# low 15 bits of a code word count.
_LARGEST_CODE = 2**22


def decode_wint2(
    packed: Tensor, local_scale: Tensor, super_scale: Tensor, code_scale: Tensor, code_zp: Tensor
) -> Tensor:
    """Decode a matrix, or some of its output channels.

    Args:
        packed: (in / 4, out) uint8.
        local_scale: (in / 128, out) uint8.
        super_scale: (out,) bfloat16, float16 or float32.
        code_scale: (out,) float32.
        code_zp: (out,) float32.

    Returns:
        (out, in) float32. With a 16-bit super scale every product is exact; the code word is computed in
        float32, rounded after the product and after each sum.

    Raises:
        CheckpointError: a scale is not finite, or a code word is so large that float32 can't round it.
    """
    scale, zero_point = code_scale.float(), code_zp.float()
    _check_scales(scale, zero_point, super_scale)
    code = (
        (packed.T.float() * scale[:, None] + zero_point[:, None] + 0.5).floor().to(torch.int32)
    )  # (out, in / 4)
    nibbles = torch.stack((local_scale >> _SCALE_BITS, local_scale & _SCALE_MASK), dim=1)  # (in / 128, 2, out)
    scales = nibbles.flatten(0, 1).T.to(torch.int32)[:, :, None]  # (out, in / 64, 1)
    weight = torch.empty((*code.shape, WEIGHTS_PER_BYTE))
    for place, shift in enumerate(_SHIFTS):
        values = ((code >> shift) & _WEIGHT_MASK) - _WEIGHT_MIDDLE
        grouped = values.view(len(code), -1, GROUP // WEIGHTS_PER_BYTE) * scales  # integers: no minus zero
        weight[..., place] = grouped.view(code.shape)
    return weight.flatten(1).mul_(super_scale.float()[:, None])


def natural_inputs(in_features: int) -> Tensor:
    """Where each input lies in a matrix that is stored in the order of FastDeploy's tensor-core kernel.

    Inside every 64 inputs the stored place 16 a + 2 b + c (a < 4, b < 8, c < 2) holds input 8 b + 2 a + c: a
    lane of the instruction finds its 16 weights side by side.

    Returns:
        (in_features,) int64, so that ``natural = stored[..., natural_inputs(in_features)]``.
    """
    return torch.arange(in_features).view(-1, 4, 8, 2).transpose(1, 2).reshape(-1)


def _check_scales(code_scale: Tensor, code_zp: Tensor, super_scale: Tensor) -> None:
    ends = torch.stack((code_zp, code_zp + 255 * code_scale))
    if not (ends.isfinite().all() and super_scale.isfinite().all()):
        raise CheckpointError("a code_scale, code_zp or super_scales is NaN or infinite; get the file again")
    if ends.abs().max() > _LARGEST_CODE:
        raise CheckpointError(
            f"code_scale and code_zp make code words up to {float(ends.abs().max()):.6g}; only 15 bits of one "
            "count"
        )
