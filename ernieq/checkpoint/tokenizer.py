"""The tokenizer of a checkpoint, as transformers reads it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ernieq.checkpoint.files import aux_files
from ernieq.errors import CheckpointError


def load_tokenizer(directory: str | Path) -> Any:
    """Load a tokenizer; code that a checkpoint brings along is never run.

    Args:
        directory: of a source or a packed checkpoint.

    Returns:
        What ``transformers.AutoTokenizer`` makes of it.

    Raises:
        CheckpointError: there is none, or transformers can't read it.
    """
    directory = Path(directory)
    if not any(directory.glob("tokenizer*")) and not any(directory.glob("*.model")):
        raise CheckpointError(f"{directory} holds no tokenizer; tokenizer.json or tokenizer.model is needed")
    aux_files(directory)  # the library would wait for a pipe
    from transformers import AutoTokenizer  # slow to import, and most uses of a checkpoint need no text

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises bare Exception
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise CheckpointError(f"the tokenizer of {directory} can't be read: {reason}") from error
    # Whole texts are tokenised and cut into windows afterwards: no reason to warn that they are long.
    tokenizer.model_max_length = sys.maxsize
    return tokenizer
