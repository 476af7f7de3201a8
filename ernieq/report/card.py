"""The model card: the README.md of a packed checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import ernieq
from ernieq.records import EvaluationRecord, format_bits, format_bytes, format_count, format_significant
from ernieq.report.comparison import protocol_line


def model_card(
    *,
    name: str,
    base: str,
    recipe: Mapping[str, Any],
    parts: Sequence[Mapping[str, Any]],
    output_bytes: int,
    bits_per_weight: float,
    licence: str | None = None,
    evaluations: Sequence[EvaluationRecord] = (),
) -> str:
    """Write the card in Markdown, with the metadata block of the Hugging Face hub.

    Args:
        name: of the packed checkpoint.
        base: name or path of the source checkpoint.
        recipe: the recipe as plain values.
        parts: of every group of tensors the name ("part"), "parameters", "bits" per weight and "bytes".
        output_bytes: of all weight files.
        bits_per_weight: over all parameters.
        licence: of the base, as a Hugging Face licence name; None if it is unknown.
        evaluations: measurements; those with a base are printed.
    """
    sections = [
        _metadata(base, licence),
        f"# {name}\n\n{base}, quantized with ernieq {ernieq.__version__} (a trellis code after a rotation).",
        _sizes(parts, output_bytes, bits_per_weight),
        _loading(name),
        _quality(evaluations),
        _recipe(recipe),
        _licence(licence),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def card_for_hub(card: str, name: str, repository: str) -> str:
    """The card with the hub's id where it says how to load; one that was rewritten by hand stays as it is.

    Args:
        card: as `model_card` wrote it.
        name: of the directory that it was written for.
        repository: ``user/name``.
    """
    return card.replace(_loading(name), _loading(repository))


def _metadata(base: str, licence: str | None) -> str:
    lines = ["---", "library_name: ernieq", "pipeline_tag: text-generation"]
    if base.count("/") == 1 and not base.startswith(("/", ".", "~")):
        lines.extend([f"base_model: {base}", "base_model_relation: quantized"])
    if licence:
        lines.append(f"license: {licence}")
    return "\n".join([*lines, "---"])


def _sizes(parts: Sequence[Mapping[str, Any]], output_bytes: int, bits: float) -> str:
    lines = ["## Size", "", "| part | parameters | bits per weight | size |", "| --- | ---: | ---: | ---: |"]
    for part in parts:
        label = str(part["part"]).replace("_", " ")
        figures = (format_count(part["parameters"]), format_bits(part["bits"]), format_bytes(part["bytes"]))
        lines.append(f"| {label} | {' | '.join(figures)} |")
    parameters = format_count(sum(part["parameters"] for part in parts))
    lines.append(f"| **all** | {parameters} | {format_bits(bits)} | {format_bytes(output_bytes)} |")
    return "\n".join(lines)


def _loading(name: str) -> str:
    return f"""## How to load

With the Python package ernieq installed (`pip install 'ernieq[transformers]'`):

```python
import ernieq  # first: it teaches transformers the format
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})
tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})
```

`import ernieq` is needed: without it transformers starts the weights at random, with no more than a warning.
Without transformers: `ernieq.load_model({json.dumps(name)})`, or `ernieq generate {name} "Once"`.

To serve it: `vllm serve {name}`, with ernieq installed beside vLLM; "Unknown quantization method: ernieq" means
that it is not."""


def _quality(evaluations: Sequence[EvaluationRecord]) -> str:
    compared = [record for record in evaluations if record.base and record.divergence]
    if not compared:
        return ""
    lines = [
        "## Quality against the base",
        "",
        "| text and protocol | perplexity | base | ratio | KL, nats per token |",
    ]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for record in compared:
        base, divergence = record.base, record.divergence
        assert base is not None
        assert divergence is not None
        kl = format_significant(divergence.mean_kl)
        kl += f" [{divergence.kl_interval}]" if divergence.kl_interval else ""
        figures = (
            f"{record.perplexity.perplexity:,.2f}",
            f"{base.perplexity:,.2f}",
            f"{divergence.perplexity_ratio:.4f}",
            kl,
        )
        lines.append(f"| {protocol_line(record)} | {' | '.join(figures)} |")
    return "\n".join(lines)


def _recipe(recipe: Mapping[str, Any]) -> str:
    values = json.dumps(dict(recipe), indent=2, ensure_ascii=False, default=str)
    return f"## Recipe\n\n```json\n{values}\n```"


def _licence(licence: str | None) -> str:
    if licence:
        return f"## Licence\n\nThe weights keep the licence of the base model: {licence}."
    return "## Licence\n\nThe weights keep the licence of the base model; see there."
