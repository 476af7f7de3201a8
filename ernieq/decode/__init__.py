"""Modules whose weights stay in the trellis code; they take the place of torch's in a model.

    weight.py      what they share: buffers that view the packed file, rotation, product, decoded rows
    linear.py      TrellisLinear in place of nn.Linear
    experts.py     TrellisExperts in place of the model's Experts
    embedding.py   TrellisEmbedding in place of nn.Embedding; TrellisHead, a head that is tied to it

Left out: gradients, and processors other than the CPU.
"""

from __future__ import annotations

from ernieq.decode.embedding import TrellisEmbedding, TrellisHead
from ernieq.decode.experts import TrellisExperts
from ernieq.decode.linear import TrellisLinear
from ernieq.decode.weight import TrellisWeight

__all__ = ["TrellisEmbedding", "TrellisExperts", "TrellisHead", "TrellisLinear", "TrellisWeight"]
