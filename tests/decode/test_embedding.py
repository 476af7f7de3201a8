"""Packed embeddings against plain tables with the decoded weight."""

import pytest
import torch

from ernieq.decode import TrellisEmbedding, TrellisHead
from ernieq.errors import UsageError
from tests.decode.encoded_matrices import plain_weight, random_matrix

VOCABULARY = 16 * 100  # more bands than are decoded at a time


@pytest.mark.parametrize("bits", [1.5, 2, 6, 8])
def test_rows_looked_up_are_those_of_the_decoded_table(bits: float) -> None:
    matrix = random_matrix(VOCABULARY, 64, bits)
    ids = torch.tensor([[0, 15, 16, 700, 700], [VOCABULARY - 1, 3, 1024, 1023, 0]])
    expected = plain_weight(matrix)[ids]
    torch.testing.assert_close(TrellisEmbedding(matrix)(ids), expected, rtol=0, atol=1e-6)


def test_a_lookup_of_the_whole_vocabulary_is_the_table() -> None:
    matrix = random_matrix(VOCABULARY, 32, 3)
    ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(TrellisEmbedding(matrix)(ids), plain_weight(matrix)[ids], rtol=0, atol=1e-6)


def test_a_lookup_decodes_only_the_bands_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = TrellisEmbedding(random_matrix(VOCABULARY, 32))
    decoded = []
    decode_bands = TrellisEmbedding._decode_bands

    def counted(self: TrellisEmbedding, bands: torch.Tensor) -> torch.Tensor:
        decoded.extend(bands.tolist())
        return decode_bands(self, bands)

    monkeypatch.setattr(TrellisEmbedding, "_decode_bands", counted)
    embedding(torch.tensor([17, 31, 800, 18]))
    assert decoded == [1, 50]


def test_a_row_does_not_depend_on_what_else_is_looked_up() -> None:
    embedding = TrellisEmbedding(random_matrix(VOCABULARY, 64))
    ids = torch.arange(0, VOCABULARY, 7)
    assert torch.equal(embedding(ids)[23], embedding(ids[23:24])[0])


def test_a_tied_head_multiplies_with_the_same_table() -> None:
    matrix = random_matrix(160, 64, 4)
    hidden, bias = torch.randn(2, 3, 64), torch.randn(160)
    expected = hidden @ plain_weight(matrix).T
    head = TrellisHead(TrellisEmbedding(matrix))
    torch.testing.assert_close(head(hidden), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(
        TrellisHead(TrellisEmbedding(matrix), bias)(hidden), expected + bias, rtol=0, atol=2e-5
    )


def test_rows_come_in_the_dtype_asked_for() -> None:
    assert TrellisEmbedding(random_matrix(160, 32), torch.bfloat16)(torch.tensor([1])).dtype is torch.bfloat16


@pytest.mark.parametrize("token", [-1, 160])
def test_a_token_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(UsageError, match="allowed are 0 to 159"):
        TrellisEmbedding(random_matrix(160, 32))(torch.tensor([3, token]))
