"""From weights to code words: incoherence, scales, block LDLQ over the trellis code."""

from ernieq.encode.batch_matrix import encode_batch, working_bytes
from ernieq.encode.decoded import decode_stack
from ernieq.encode.emulate import emulated_errors
from ernieq.encode.incoherence import input_signs, rotation_block
from ernieq.encode.matrix import encode_matrices
from ernieq.encode.memory import Batches, out_of_memory
from ernieq.encode.options import EncodeOptions, EncodingResult
from ernieq.encode.scales import CODEBOOK_SCALE
from ernieq.trellis.distortion import SQUARED_ERROR

__all__ = [
    "CODEBOOK_SCALE",
    "SQUARED_ERROR",
    "Batches",
    "EncodeOptions",
    "EncodingResult",
    "decode_stack",
    "emulated_errors",
    "encode_batch",
    "encode_matrices",
    "input_signs",
    "out_of_memory",
    "rotation_block",
    "working_bytes",
]
