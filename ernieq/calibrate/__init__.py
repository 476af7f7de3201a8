"""From text to Hessians: tokens, hidden states of one layer at a time, moments of what projections read."""

from ernieq.calibrate.attention import AttentionPass
from ernieq.calibrate.hessians import (
    ATTENTION_CONTEXT,
    ATTENTION_INPUT,
    EXPERTS_HIDDEN,
    MLP_INPUT,
    LayerStatistics,
    collect_layer,
    hidden_of,
)
from ernieq.calibrate.mlp import MlpPass
from ernieq.calibrate.moments import Moments, corrected_weight, shrinkage, shrunk_gram
from ernieq.calibrate.streams import Streams, stream_dtype
from ernieq.calibrate.texts import CalibrationSample, TextFile, read_text_file, sample_windows

__all__ = [
    "ATTENTION_CONTEXT",
    "ATTENTION_INPUT",
    "EXPERTS_HIDDEN",
    "MLP_INPUT",
    "AttentionPass",
    "CalibrationSample",
    "LayerStatistics",
    "MlpPass",
    "Moments",
    "Streams",
    "TextFile",
    "collect_layer",
    "corrected_weight",
    "hidden_of",
    "read_text_file",
    "sample_windows",
    "shrinkage",
    "shrunk_gram",
    "stream_dtype",
]
