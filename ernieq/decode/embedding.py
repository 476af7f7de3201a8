"""An embedding table in the trellis code: rows by number, and products with all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ernieq.decode import gpu
from ernieq.decode.weight import TrellisWeight
from ernieq.errors import UsageError
from ernieq.kernels import Backend
from ernieq.kernels.trellis_matmul import decode
from ernieq.trellis import TILE_SIDE, EncodedMatrix

# Bands of 16 rows that are decoded at a time in a lookup of many tokens: 10 MB of float32 at a width of 2560.
_BANDS_AT_A_TIME = 64


class TrellisEmbedding(TrellisWeight):
    """Lookup of rows in place of ``nn.Embedding``; only the bands of 16 rows that are needed are decoded.

    Args:
        matrix: the encoded table, (vocabulary, width).
        dtype: dtype of the rows.
        backend: implementation of the kernels.
        threads: threads of the kernels; all processors by default.
    """

    def __init__(
        self,
        matrix: EncodedMatrix,
        dtype: torch.dtype = torch.float32,
        *,
        backend: Backend = Backend.AUTO,
        threads: int | None = None,
    ) -> None:
        super().__init__(matrix, backend=backend, threads=threads)
        self.dtype = dtype

    def forward(self, token_ids: Tensor) -> Tensor:
        """Rows by number: (...) int64 -> (..., width).

        Raises:
            UsageError: a token id is outside the vocabulary.
        """
        ids, places = token_ids.reshape(-1).unique(return_inverse=True)  # sorted
        if ids.numel() and not 0 <= int(ids[0]) <= int(ids[-1]) < self.out_features:
            raise UsageError(
                f"token ids span {int(ids[0])} to {int(ids[-1])}; allowed are 0 to {self.out_features - 1}"
            )
        rows = torch.empty(ids.numel(), self.in_features, device=ids.device)
        bands, band_of_id = torch.div(ids, TILE_SIDE, rounding_mode="floor").unique(return_inverse=True)
        for first in range(0, bands.numel(), _BANDS_AT_A_TIME):
            some = bands[first : first + _BANDS_AT_A_TIME]
            here = (band_of_id >= first) & (band_of_id < first + some.numel())
            row_in_bands = (band_of_id[here] - first) * TILE_SIDE + ids[here] % TILE_SIDE
            rows[here] = self._decode_bands(some).index_select(0, row_in_bands)
        table = self.unrotate(rows).to(self.dtype)  # (ids, width)
        return table.index_select(0, places).view(*token_ids.shape, self.in_features)

    def project(self, hidden: Tensor) -> Tensor:
        """Products with every row, for a head that is tied to the table: (..., width) -> (..., vocabulary)."""
        return self.multiply(hidden)

    def _decode_bands(self, bands: Tensor) -> Tensor:
        """Rotated rows of bands of 16: (n,) -> (16 n, width) float32."""
        scale = self.scale.view(-1, TILE_SIDE).index_select(0, bands).flatten()
        if self.on_gpu:
            return gpu.decode_exactly(self.words.index_select(0, bands), scale, self.code)
        packed = self.packed.index_select(0, bands)
        return decode(packed, scale, self.code, backend=self.backend, threads=self.threads)


class TrellisHead(nn.Module):
    """A head that is tied to a ``TrellisEmbedding``, in place of the head's ``nn.Linear``.

    Args:
        embedding: the table.
        bias: (vocabulary,), or None.
    """

    def __init__(self, embedding: TrellisEmbedding, bias: Tensor | None = None) -> None:
        super().__init__()
        self.embedding = embedding
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., width) -> (..., vocabulary) float32."""
        logits = self.embedding.project(hidden)
        return logits if self.bias is None else logits + self.bias.float()
