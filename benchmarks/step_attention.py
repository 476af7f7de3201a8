"""One new token of many sequences on a GPU: the attention that is used, and what it was chosen over.

    python benchmarks/step_attention.py --out benchmarks/results/step_attention.json

A whole step of a model of ernieq-mini's shape with random weights in bf16, which writes 460 sequences as
``ernieq sample-text`` does. ``heads``: torch is given the grouped heads as they are; ``folded``: the heads that
share keys stand where tokens would. Both with any of torch's implementations, and without cuDNN's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from machine import describe_gpu, describe_machine, write_result
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ernieq.model import ErnieForCausalLM, KVCache, ModelConfig, attention

MINI = ModelConfig(
    model_type="ernie4_5_moe",
    vocab_size=16384,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    moe_num_experts=16,
    moe_k=4,
    moe_intermediate_size=256,
    moe_num_shared_experts=2,
    moe_layer_start_index=1,
    moe_layer_end_index=5,
)
SEQUENCES, CONTEXTS, STEPS = 460, (16, 1000, 1900), 20
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
ANY = [*WITHOUT_CUDNN, SDPBackend.CUDNN_ATTENTION]


def heads(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Grouped heads as torch takes them."""
    attended = scaled_dot_product_attention(query, key, value, enable_gqa=True)
    return attended.transpose(1, 2).flatten(2)


def folded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The heads that share keys as rows."""
    rows = query.reshape(*key.shape[:2], -1, key.shape[3])
    return scaled_dot_product_attention(rows, key, value).reshape(len(query), 1, -1)


def milliseconds(model: ErnieForCausalLM, past: int) -> float:
    """Of a step, each with one earlier token more than the one before it."""
    cache = KVCache(MINI, SEQUENCES, past + 2 * STEPS, torch.bfloat16, torch.device("cuda"))
    cache.length = past
    tokens = torch.ones(SEQUENCES, 1, dtype=torch.long, device="cuda")
    for count in range(2 * STEPS):
        if count == STEPS:
            torch.cuda.synchronize()
            started = time.monotonic()
        model(tokens, cache, last_only=True)
    torch.cuda.synchronize()
    return 1000 * (time.monotonic() - started) / STEPS


def main() -> None:
    """Time every way at every context."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = ErnieForCausalLM(MINI).to(torch.bfloat16).eval()
    ways: dict[str, tuple[Callable[..., Tensor], list[SDPBackend]]] = {
        "heads": (heads, ANY),
        "heads, no cuDNN": (heads, WITHOUT_CUDNN),
        "folded": (folded, ANY),
        "folded, no cuDNN": (folded, WITHOUT_CUDNN),
    }
    rows = []
    for name, (way, allowed) in ways.items():
        with patch.object(attention, "_attend_once", way), sdpa_kernel(allowed), torch.inference_mode():
            found = {str(past): milliseconds(model, past) for past in CONTEXTS}
        rows.append({"way": name, "milliseconds_of_a_step_by_earlier_tokens": found})
        print(rows[-1], flush=True)
    with torch.inference_mode():
        used = {str(past): milliseconds(model, past) for past in CONTEXTS}
    print("as the model does it", used)
    if options.out:
        result = {
            "machine": describe_machine() | describe_gpu(),
            "command": "python benchmarks/step_attention.py --out FILE",
            "sequences": SEQUENCES,
            "as_the_model_does_it": used,
            "rows": rows,
        }
        write_result(options.out, result)


if __name__ == "__main__":
    main()
