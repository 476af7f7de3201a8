"""Modules whose weights stay in the trellis code; they take the place of torch's in a model.

    weight.py      what they share: buffers that view the packed file, rotation, product, decoded rows
    linear.py      TrellisLinear in place of nn.Linear
    experts.py     TrellisExperts in place of the model's Experts
    embedding.py   TrellisEmbedding in place of nn.Embedding; TrellisHead, a head that is tied to it
    gpu.py         the products on a GPU: which kernel for how many rows
    stack.py       all experts of a layer in one tensor, as the GPU's kernels want them

``.to("cuda")`` moves a module to a GPU, where tiles are held as 32-bit words. Left out: gradients.
"""

from __future__ import annotations

from ernieq.decode.embedding import TrellisEmbedding, TrellisHead
from ernieq.decode.experts import TrellisExperts
from ernieq.decode.linear import TrellisLinear
from ernieq.decode.weight import TrellisWeight

__all__ = ["TrellisEmbedding", "TrellisExperts", "TrellisHead", "TrellisLinear", "TrellisWeight"]
