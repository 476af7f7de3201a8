"""Draw the calibration sample of a model, and collect the Hessians of a model that stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ernieq.calibrate import (
    CalibrationSample,
    LayerStatistics,
    Moments,
    Streams,
    TextFile,
    collect_layer,
    narrow_layer,
    sample_windows,
    stream_dtype,
)
from ernieq.checkpoint import Checkpoint, load_embedding, load_tokenizer
from ernieq.convert.overlap import read_layers
from ernieq.convert.recipe import Recipe
from ernieq.convert.workplace import Workplace
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
    files: dict[str, str] = {}
    for path, digest in sample.files:
        name, number = Path(path).name, 1
        while name in files:  # texts of one name from two folders
            number += 1
            name = f"{Path(path).name} ({number})"
        files[name] = digest
    return CalibrationRecord(files, sample.tokens, sample.windows.shape[0], sample.seed)


def head_gram(norm: nn.Module, streams: Streams, stream: Tensor) -> Tensor:
    """Mean x x^T of the head's input, (hidden_size, hidden_size).

    Args:
        norm: the final norm, on the device that computes.
        streams: hidden states behind the last layer.
        stream: one of the two.
    """
    moments = Moments(streams.shape[2], device=streams.device)
    for batch in streams.batches():
        moments.add(norm(streams.load(stream, batch).float()).flatten(0, 1))
    return moments.mean_gram()


@torch.no_grad()
def collect_statistics(
    checkpoint: Checkpoint,
    sample: CalibrationSample,
    shrinkage_strength: float,
    on_layer: Callable[[int, LayerStatistics], None],
    workplace: Workplace | None = None,
    on_notice: Callable[[str], None] = lambda _: None,
    begin: tuple[int, Streams] | None = None,
    on_streams: Callable[[int, Streams], None] = lambda *_: None,
) -> None:
    """Run the sample through the unquantized model, one layer in memory at a time.

    Args:
        checkpoint: the source.
        sample: calibration windows.
        shrinkage_strength: tokens per channel at which an expert's own Hessian counts as much as its layer's.
        on_layer: receives every layer's number and statistics; they are not kept.
        workplace: the device that does the work, the CPU by default.
        on_notice: receives a sentence when GPU memory has run out and less is done at a time.
        begin: number of the first layer that is wanted, and the hidden states before it.
        on_streams: receives the number of every next layer, and the hidden states before it.

    Raises:
        BackendUnavailableError: the GPU has too little memory.
    """
    place, config = workplace or Workplace.on(torch.device("cpu")), checkpoint.config
    first, before = begin or (0, _embedded(checkpoint, sample))
    with place.limited():
        streams = place.place(before)
        del before, begin
        cosine, sine = Rotary(config).angles(torch.arange(streams.shape[1]))
        rotary = cosine.to(streams.device), sine.to(streams.device)
        batches = place.expert_batches(config, sample.tokens, on_notice)
        for index, layer in enumerate(read_layers(checkpoint, place.device, first), first):
            if place.is_gpu:
                narrow_layer(layer, place.device)
            on_layer(
                index, collect_layer(config, index, layer, streams, rotary, shrinkage_strength, batches.run)
            )
            on_streams(index + 1, streams)


def _embedded(checkpoint: Checkpoint, sample: CalibrationSample) -> Streams:
    """Hidden states before the first layer, the same in both streams."""
    table = load_embedding(checkpoint).weight.data
    dtype = stream_dtype(sample.tokens, table.shape[1])
    hidden = nn.functional.embedding(sample.windows, table).to(dtype)
    return Streams(hidden, hidden.clone())
