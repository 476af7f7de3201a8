"""From a directory to something that computes: a whole model, or a stream of its layers.

source.py       one view of packed and ordinary checkpoints
place.py        where a model runs: device and kernels
memory.py       how much of a GPU's memory it takes
materialize.py  fills a module that was built on the meta device
whole.py        load_model: everything at once, packed weights stay packed and mapped
stream.py       open_stream: one decoder layer in memory at a time
"""

from __future__ import annotations

from ernieq.load.stream import ModelStream, open_stream
from ernieq.load.whole import load_model

__all__ = ["ModelStream", "load_model", "open_stream"]
