"""lm-evaluation-harness with packed checkpoints: its command line in a process that has imported ernieq.

    python -m ernieq.integrations.transformers.lm_eval --model hf --model_args pretrained=PATH --tasks TASK

Arguments are those of ``lm_eval``. From Python, ``import ernieq`` before ``lm_eval.simple_evaluate`` will do.
"""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Run ``lm_eval`` with the arguments of this process."""
    if importlib.util.find_spec("lm_eval") is None:
        sys.exit("lm-evaluation-harness is not installed; pip install 'ernieq[lm-eval]' brings it")
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
