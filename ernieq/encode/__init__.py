"""From weights to code words: incoherence, scales, block LDLQ over the trellis code."""

from ernieq.encode.incoherence import input_signs, rotation_block
from ernieq.encode.matrix import EncodeOptions, EncodingResult, encode_matrices
from ernieq.encode.scales import CODEBOOK_SCALE

__all__ = [
    "CODEBOOK_SCALE",
    "EncodeOptions",
    "EncodingResult",
    "encode_matrices",
    "input_signs",
    "rotation_block",
]
