"""Completing a text: token by token, with a KV cache.

    options.py   what can be asked for          loop.py   prompt in, tokens or pieces of text out
    sampling.py  logits to a token              text.py   tokens to text as it comes; stop strings
    documents.py text of the model's own, many sequences at once
    engine.py    tokens to logits, by the model itself or by the runtime of a GPU

Left out: batches of prompts, beams, speculative decoding.
"""

from __future__ import annotations

from ernieq.generate.documents import sample_documents, stack_experts
from ernieq.generate.loop import encode_prompt, generate_text, generate_tokens
from ernieq.generate.options import GenerateOptions
from ernieq.generate.sampling import Sampler

__all__ = [
    "GenerateOptions",
    "Sampler",
    "encode_prompt",
    "generate_text",
    "generate_tokens",
    "sample_documents",
    "stack_experts",
]
