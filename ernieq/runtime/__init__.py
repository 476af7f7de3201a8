"""The fast way to run a packed model on one GPU: a plan, a captured token step, a prompt in large parts.

    plan.py            the tensors of a model in the order in which the kernels read them
    gather.py          from a loaded model to its plan; which models can't have one, and why
    cache.py           keys and values in float16, the place of each sequence, buffers of fixed addresses
    step.py            one token of every sequence, as kernels in a row
    graph.py           a row of kernels captured once and replayed
    sampling.py        logits to tokens without leaving the GPU
    products.py        products with many rows: decode to float16, multiply
    routed.py          the routed experts of a prompt
    prefill.py         a prompt, in parts
    runtime.py         PackedRuntime: the above behind four calls
    traffic.py         bytes that a token has to read
    speed.py           measures a model's speed, with the runtime or with the plain forward pass

The truth is the model's own forward pass: logits are compared with it. Left out: sequences of different
lengths in one batch, more than eight sequences, several GPUs.
"""

from __future__ import annotations

from ernieq.runtime.runtime import PackedRuntime

__all__ = ["PackedRuntime"]
