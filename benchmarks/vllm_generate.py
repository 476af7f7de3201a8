"""Let vLLM continue prompts greedily, and write its tokens and log-probabilities; ``vllm_cpu.py`` runs this."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

NEW_TOKENS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="directory")
    parser.add_argument("prompts", type=Path, help="JSON: lists of token ids")
    parser.add_argument("out", type=Path, help="JSON to write")
    parser.add_argument("--options", type=json.loads, default={}, help="of vllm.LLM, as JSON")
    arguments = parser.parse_args()
    from vllm import LLM, SamplingParams

    llm = LLM(model=arguments.model, dtype="float32", max_model_len=512, seed=0, **arguments.options)
    sampling = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=5, prompt_logprobs=1
    )
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(arguments.prompts.read_text())]
    outputs = [_sequence(output) for output in llm.generate(prompts, sampling)]
    arguments.out.write_text(json.dumps(outputs))


def _sequence(output: Any) -> dict[str, Any]:
    """Of one prompt: all token ids, how many were given, and per position {token id: log-probability}."""
    (completion,) = output.outputs
    return {
        "ids": [*output.prompt_token_ids, *completion.token_ids],
        "given": len(output.prompt_token_ids),
        "logprobs": [
            {str(token): entry.logprob for token, entry in (position or {}).items()}
            for position in [*output.prompt_logprobs, *completion.logprobs]
        ],
    }


if __name__ == "__main__":  # vLLM starts its processes by importing this file again
    main()
