"""How good is a model: perplexity, divergence from its base, routing fidelity.

The model comes as a stream of layers, one in memory at a time, so that one larger than memory can be
measured. What is measured is fixed by a protocol (`windows`), which is stated beside every number.

* `text`: names and files to text; `tokens`: text to token ids; `windows`: token ids to windows.
* `stream`: windows through the layers; `score`: hidden states to losses and divergences, token by token.
* `statistics`: those to means, errors and intervals; `measure`: all of it for one text.
* `base`: where the base model of a packed checkpoint lies.

Tasks (multiple choice and the like) are left out.
"""

from ernieq.evaluate.base import resolve_base
from ernieq.evaluate.measure import Budget, StreamScores, evaluate_stream, evaluate_text
from ernieq.evaluate.score import TokenScores
from ernieq.evaluate.stream import LayerStream
from ernieq.evaluate.text import EvaluationText, load_text, text_names
from ernieq.evaluate.tokens import TokenizedText, tokenize_text
from ernieq.evaluate.windows import Protocol, Windows, make_windows

__all__ = [
    "Budget",
    "EvaluationText",
    "LayerStream",
    "Protocol",
    "StreamScores",
    "TokenScores",
    "TokenizedText",
    "Windows",
    "evaluate_stream",
    "evaluate_text",
    "load_text",
    "make_windows",
    "resolve_base",
    "text_names",
    "tokenize_text",
]
