"""Numbers for people, and the typed results that the measuring and the reporting packages share.

Imports neither torch nor numpy, so that a report can be built on any machine. All byte units are decimal
(1 MB = 1,000,000 bytes), as in file managers and on data sheets.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")
_COUNT_UNITS = ("", " k", " M", " B", " T")


def _scaled(value: float, units: tuple[str, ...]) -> str:
    """Divide by 1000 until three digits suffice; a value that rounds up to 1000 moves to the next unit."""
    last = len(units) - 1
    step = 0
    while step < last and float(f"{abs(value):.3g}") >= 1000:
        value /= 1000
        step += 1
    if abs(value) >= 100 or step == 0:
        return f"{value:,.0f}{units[step]}"
    return f"{value:.{1 if abs(value) >= 10 else 2}f}{units[step]}"


def format_bytes(count: int) -> str:
    """Write a number of bytes in decimal units: ``512 B``, ``32.8 MB``, ``6.01 GB``."""
    return _scaled(count, tuple(f" {unit}" for unit in _BYTE_UNITS))


def format_count(count: int) -> str:
    """Write a number of things: exact below 10,000 (``9,216``), else ``16.2 M`` or ``21.8 B``."""
    return f"{count:,}" if abs(count) < 10_000 else _scaled(count, _COUNT_UNITS)


def format_rate(per_second: float, unit: str) -> str:
    """Write a speed: ``257 k weights/s``, ``4.30 M weights/s``, ``8.2 tokens/s``."""
    if abs(per_second) < 100:
        return f"{per_second:.1f} {unit}/s"
    return f"{_scaled(per_second, _COUNT_UNITS)} {unit}/s"


def format_seconds(seconds: float) -> str:
    """Write a duration: ``0.42 s``, ``12.3 s``, ``3 min 05 s``, ``2 h 04 min``."""
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def bits_per_weight(byte_count: int, weights: int) -> float:
    """Bits spent on each of ``weights`` numbers that take ``byte_count`` bytes; NaN where there are none."""
    return 8 * byte_count / weights if weights else math.nan


def format_bits(bits: float) -> str:
    """Write bits per weight with two decimals: ``2.06``; NaN (no such weights) as a dash."""
    return "-" if math.isnan(bits) else f"{bits:.2f}"


def format_significant(value: float, digits: int = 3) -> str:
    """Write a value with ``digits`` significant digits and no exponent: ``0.0217``, ``89.97``, ``0.301``."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


@dataclass(frozen=True)
class Interval:
    """A 95% interval."""

    low: float
    high: float

    def __str__(self) -> str:
        """Both ends with three digits, as they stand in tables."""
        return f"{format_significant(self.low)} to {format_significant(self.high)}"


@dataclass(frozen=True)
class TextRecord:
    """Which text was measured, and by which protocol.

    Args:
        name: the name or file as given.
        sha256: of the bytes that were tokenised (after any cut).
        text_bytes: number of those bytes.
        tokens: tokens of the whole text, with the begin-of-text token.
        protocol: ``gptq`` or ``llama.cpp``.
        window: tokens per window.
        windows: number of windows measured.
        scored_tokens: tokens that count in the figures.
        begins_with_bos: whether the tokenizer has a begin-of-text token, which then comes first.
    """

    name: str
    sha256: str
    text_bytes: int
    tokens: int
    protocol: str
    window: int
    windows: int
    scored_tokens: int
    begins_with_bos: bool


@dataclass(frozen=True)
class PerplexityRecord:
    """Perplexity with its standard errors, both by the delta method (perplexity times that of the mean NLL).

    Args:
        mean_nll: nats per scored token.
        perplexity: exp(mean_nll).
        token_error: standard error if tokens were independent.
        window_error: standard error from the spread of window means (tokens of one window depend on each
            other); None with a single window.
        bits_per_byte: of the text that the scored tokens cover; None if the tokenizer gives no offsets.
    """

    mean_nll: float
    perplexity: float
    token_error: float
    window_error: float | None
    bits_per_byte: float | None


@dataclass(frozen=True)
class DivergenceRecord:
    """How far the measured model is from its base; intervals are 95%, by bootstrap over windows.

    Args:
        mean_kl: mean of KL(base || measured) over scored tokens, nats per token.
        kl_interval: of the mean; None with a single window.
        median_kl: median over tokens.
        p99_kl: 99th percentile over tokens.
        max_kl: largest of all tokens.
        top1_agreement: share of scored positions where both prefer the same token.
        perplexity_ratio: measured perplexity / base perplexity.
        ratio_interval: of the ratio, windows paired; None with a single window.
    """

    mean_kl: float
    kl_interval: Interval | None
    median_kl: float
    p99_kl: float
    max_kl: float
    top1_agreement: float
    perplexity_ratio: float
    ratio_interval: Interval | None


@dataclass(frozen=True)
class RoutingRecord:
    """Routing of one MoE layer against the base, each model on its own hidden states.

    Args:
        layer: index of the decoder layer.
        experts_kept: share of the base's selected experts that the measured model selects too.
        load_shift: half the sum of absolute differences of the experts' shares of tokens (0 to 1).
    """

    layer: int
    experts_kept: float
    load_shift: float


@dataclass(frozen=True)
class WeightsRecord:
    """What a checkpoint's weights take.

    Args:
        file_bytes: of all weight files.
        decoder_bytes: of everything but embedding and head.
        parameters: numbers that the checkpoint stands for.
        quantized_bytes: of the quantized matrices, with their scales and signs.
        quantized_parameters: numbers in them; 0 for an unquantized checkpoint.
    """

    file_bytes: int
    decoder_bytes: int
    parameters: int
    quantized_bytes: int
    quantized_parameters: int

    @property
    def bits(self) -> float:
        """Bits per weight over all parameters, with everything that the files hold."""
        return bits_per_weight(self.file_bytes, self.parameters)

    @property
    def quantized_bits(self) -> float:
        """Bits per weight over the quantized parameters; NaN where there are none."""
        return bits_per_weight(self.quantized_bytes, self.quantized_parameters)


@dataclass(frozen=True)
class EvaluationRecord:
    """Everything measured on one text.

    ``base``, ``divergence`` and ``routing`` are there only with a base model; ``noise`` is the divergence of
    the base in bfloat16 arithmetic from the base in float32, if it was measured.
    """

    text: TextRecord
    perplexity: PerplexityRecord
    base: PerplexityRecord | None
    divergence: DivergenceRecord | None
    routing: tuple[RoutingRecord, ...]
    seconds: float
    noise: DivergenceRecord | None = None


def to_plain(record: Any) -> dict[str, Any]:
    """Turn a record into dicts, lists and numbers, as JSON takes them."""
    return dataclasses.asdict(record)
