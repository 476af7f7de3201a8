"""Draw the calibration sample of a model, and collect the Hessians of a model that stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from ernieq.calibrate import (
    CalibrationSample,
    LayerStatistics,
    Streams,
    TextFile,
    collect_layer,
    sample_windows,
    stream_dtype,
)
from ernieq.checkpoint import Checkpoint, load_embedding, load_layer, load_tokenizer
from ernieq.convert.recipe import Recipe
from ernieq.model import Rotary
from ernieq.pack import CalibrationRecord


def draw_sample(checkpoint: Checkpoint, texts: Sequence[TextFile], recipe: Recipe) -> CalibrationSample:
    """Tokenise texts with the model's tokenizer and cut them into windows that fit the model.

    Raises:
        TextError: the texts are shorter than one window.
        CheckpointError: the tokenizer can't be loaded.
    """
    settings = recipe.calibration
    length = min(settings.window, checkpoint.config.max_position_embeddings)
    tokenizer = load_tokenizer(checkpoint.directory)
    return sample_windows(texts, tokenizer, windows=settings.windows, length=length, seed=recipe.seed)


def calibration_record(sample: CalibrationSample) -> CalibrationRecord:
    """What the manifest says of a sample."""
    files = {Path(path).name: digest for path, digest in sample.files}
    return CalibrationRecord(files, sample.tokens, sample.windows.shape[0], sample.seed)


@torch.no_grad()
def collect_statistics(
    checkpoint: Checkpoint,
    sample: CalibrationSample,
    shrinkage_strength: float,
    on_layer: Callable[[int, LayerStatistics], None],
) -> None:
    """Run the sample through the unquantized model, one layer in memory at a time.

    Args:
        checkpoint: the source.
        sample: calibration windows.
        shrinkage_strength: tokens per channel at which an expert's own Hessian counts as much as its layer's.
        on_layer: receives every layer's number and statistics; they are not kept.
    """
    table = load_embedding(checkpoint).weight.data
    dtype = stream_dtype(sample.tokens, table.shape[1])
    hidden = nn.functional.embedding(sample.windows, table).to(dtype)
    streams = Streams(hidden, hidden.clone())
    rotary = Rotary(checkpoint.config).angles(torch.arange(hidden.shape[1]))
    for index in range(checkpoint.config.num_hidden_layers):
        layer = load_layer(checkpoint, index)
        on_layer(index, collect_layer(checkpoint.config, index, layer, streams, rotary, shrinkage_strength))
        checkpoint.release()
