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
from ernieq.calibrate.moments import Moments, TokenWeights, corrected_weight, shrinkage, shrunk_gram
from ernieq.calibrate.narrow import narrow_layer, shared_copy
from ernieq.calibrate.streams import Streams, stay_on_gpu, stream_dtype
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
    "TokenWeights",
    "collect_layer",
    "corrected_weight",
    "hidden_of",
    "narrow_layer",
    "read_text_file",
    "sample_windows",
    "shared_copy",
    "shrinkage",
    "shrunk_gram",
    "stay_on_gpu",
    "stream_dtype",
]
