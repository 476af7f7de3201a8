"""vLLM serves packed checkpoints: ``vllm serve PACKED`` with ernieq installed beside it.

vLLM calls ``register`` in each of its processes, through the entry point group ``vllm.general_plugins``.

    config.py            ErnieqConfig: which method a layer gets
    linear.py            linear layers, merged or not
    embedding.py         embedding and head
    experts.py           the routed experts of a layer
    modules.py           what quantization_config says about a layer
    slices.py            tensor parallelism: what one process holds of a matrix
    storage.py           where the stored tensors of a layer go
    expert_storage.py    the same for the routed experts
    geometry.py          the matrices of a merged layer as numbers
    operators.py         products and lookups as operators of torch
    experts_operator.py  the routed experts as one

The first four need vLLM; the others do without. Everything that is not packed is vLLM's own.
"""

from __future__ import annotations

import logging

METHOD = "ernieq"
TESTED_VLLM = "0.32 and 0.33"


def register() -> None:
    """Make vLLM know the quantization method ``ernieq``; may be called more than once.

    A vLLM that lacks what the plugin builds on keeps working for other models: it is told in one line.
    """
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from ernieq.integrations.vllm.config import ErnieqConfig
    except ImportError as error:
        logging.getLogger("vllm.ernieq").error(
            "ernieq's plugin is for vLLM %s and can't use this one (%s), so packed checkpoints can't be "
            "served: install that vLLM, or an ernieq that names yours in docs/vllm.md",
            TESTED_VLLM,
            error,
        )
        return
    register_quantization_config(METHOD)(ErnieqConfig)
