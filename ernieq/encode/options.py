"""How matrices are encoded, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ernieq.encode.memory import ignore
from ernieq.kernels.backend import Backend
from ernieq.kernels.viterbi import FULL_FIRST_PASS
from ernieq.trellis import EncodedMatrix


@dataclass(frozen=True)
class EncodeOptions:
    """How a matrix is encoded.

    Args:
        damping: share of the mean diagonal that is added to a Hessian before it is factored.
        first_pass_steps: length of the first tail-biting pass, a multiple of 4 from 96 (quick) to 256.
        order_blocks: round blocks of columns in the order that leaves the least error (``block_order.py``) in
            place of the last to the first; takes as long as a second factorisation of the Hessian.
        backend: implementation of the trellis search.
        threads: threads of the trellis search; all processors by default.
        memory_bytes: GPU memory that matrices at work may take; no bound by default.
        on_notice: receives a sentence when GPU memory has run out and less is done at a time.
    """

    damping: float = 0.01
    first_pass_steps: int = FULL_FIRST_PASS
    order_blocks: bool = True
    backend: Backend = Backend.AUTO
    threads: int | None = None
    memory_bytes: int | None = None
    on_notice: Callable[[str], None] = ignore


@dataclass(frozen=True)
class EncodingResult:
    """An encoded matrix, what it decodes to, and how far that is from the target.

    Args:
        encoded: the hand-over to the packer.
        decoded: (out_features, in_features) in the model's own basis; float32, or float16 from a GPU.
        proxy_error: tr(E H E^T) / tr(W H W^T) with the undamped Hessian, dimensionless.
    """

    encoded: EncodedMatrix
    decoded: Tensor
    proxy_error: float
