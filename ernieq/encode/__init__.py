"""From weights to code words: incoherence, scales, block LDLQ over the trellis code."""

from ernieq.encode.incoherence import input_signs, rotation_block
from ernieq.encode.matrix import EncodeOptions, EncodingResult, encode_matrices

__all__ = ["EncodeOptions", "EncodingResult", "encode_matrices", "input_signs", "rotation_block"]
