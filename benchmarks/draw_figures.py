"""The pictures of docs/mathematics.md, from the package itself and from the results that are stored.

    python benchmarks/draw_figures.py docs/figures

Text stays text in the SVGs, so that they are small and can be searched; the same versions draw the same bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from ernieq.bundled import bundled_model, calibration_texts
from ernieq.calibrate import MLP_INPUT, Streams, collect_layer, hidden_of, read_text_file
from ernieq.checkpoint import Checkpoint, load_embedding, load_layer, open_checkpoint
from ernieq.convert import apply_overrides, default_recipe, draw_sample
from ernieq.encode import EncodeOptions, encode_matrices, input_signs, rotation_block
from ernieq.kernels.hadamard import rotate
from ernieq.model import Rotary
from ernieq.trellis import VALUE_RMS, TrellisCode, pack_symbols, state_values, tile_values

RESULTS = Path(__file__).parent / "results"
# Gaussian source: what a scalar quantizer reaches at best (Lloyd-Max), mean squared error per unit variance.
LLOYD_MAX = {2: 0.1175, 3: 0.0345, 4: 0.0095}
_LAYER = 0  # of the bundled model: the one whose keys have the heaviest tails, and whose MLP is dense


def ring(axis: Axes) -> None:
    """Bits of a ring at K = 2, and the states of two neighbouring weights."""
    code = TrellisCode(bits_per_weight=2, state_bits=16)
    symbols = np.random.default_rng(0).integers(0, 4, (1, 256)).astype(np.uint8)
    packed = pack_symbols(symbols, code)
    bits = np.unpackbits(np.ascontiguousarray(packed).view(np.uint16).astype(">u2").view(np.uint8))
    values = tile_values(packed, code)[0]
    first, shown = 20, 28
    for place in range(shown):
        axis.text(place + 0.5, 0.5, str(bits[first - 4 + place]), ha="center", va="center", fontsize=9)
        axis.add_patch(Rectangle((place, 0), 1, 1, fill=False, linewidth=0.4))
    for row, colour in ((0, "tab:blue"), (1, "tab:orange")):
        begin = 4 + 2 * row
        weight = (first + 2 * row + code.state_bits) // 2 - 1
        low = -1.1 - 1.2 * row
        axis.add_patch(Rectangle((begin, low), 16, 0.8, color=colour, alpha=0.35, linewidth=0))
        axis.add_patch(Rectangle((begin + 14, low), 2, 0.8, color=colour, alpha=0.6, linewidth=0))
        words = f"state of weight {weight}, value {values[weight]}"
        axis.text(begin + 7, low + 0.4, words, ha="center", va="center", fontsize=9)
        axis.text(begin + 15, low + 0.4, "new", ha="center", va="center", fontsize=8)
    axis.set(xlim=(-0.2, shown + 0.2), ylim=(-2.5, 1.2))
    axis.axis("off")


def codebook(axis: Axes) -> None:
    """Values of all states against the Gaussian that they stand for."""
    values = state_values(16)
    axis.hist(values, bins=[*range(-510, 512, 20)], density=True, color="tab:blue", alpha=0.5)
    places = np.linspace(-510, 510, 200)
    density = np.exp(-0.5 * (places / VALUE_RMS) ** 2) / (VALUE_RMS * np.sqrt(2 * np.pi))
    axis.plot(places, density, color="black", linewidth=1, label="Gaussian of the same power")
    axis.set(xlabel="value of a state", ylabel="share of the 65,536 states, per unit", yticks=[])
    axis.legend(frameon=False)


def rates(axis: Axes) -> None:
    """Error of the code at every rate, as a multiple of the rate-distortion bound."""
    rows = json.loads((RESULTS / "gaussian_rates.json").read_text(encoding="utf-8"))["rows"]
    points = sorted((row["bits_per_weight"], row["mse"] / row["rate_distortion_bound"]) for row in rows)
    axis.plot(*zip(*points, strict=True), "o-", markersize=4, label="this code, L = 16")
    scalar = [(bits, error * 4.0**bits) for bits, error in LLOYD_MAX.items()]
    axis.plot(*zip(*scalar, strict=True), "s--", markersize=4, label="best scalar quantizer")
    axis.axhline(1, color="black", linewidth=0.8, label="rate-distortion bound")
    axis.set(xlabel="bits per weight", ylabel="squared error, multiple of the bound", ylim=(0.9, None))
    axis.legend(frameon=False)


def rotation(axis: Axes) -> None:
    """Tails of a matrix's entries before and behind signs and Hadamard rotation."""
    checkpoint = open_checkpoint(bundled_model())
    weight = load_layer(checkpoint, _LAYER).get_parameter("self_attn.k_proj.weight").data.float()
    checkpoint.close()
    signs = torch.from_numpy(input_signs(0, "figure", weight.shape[1]))
    rotated = rotate(weight.contiguous(), signs, rotation_block(weight.shape[1]))
    gaussian = torch.randn(weight.numel(), generator=torch.Generator().manual_seed(0)).view(weight.shape)
    for name, matrix, style in (
        ("as trained", weight, "-"),
        ("rotated", rotated, "-"),
        ("Gaussian", gaussian, "k:"),
    ):
        sizes = (matrix / matrix.square().mean(1, keepdim=True).sqrt()).abs().flatten().sort().values
        share = 1 - torch.arange(len(sizes)) / len(sizes)
        every = np.unique(np.geomspace(1, len(sizes), 150).astype(int)) - 1
        axis.plot(sizes.flip(0)[every], share.flip(0)[every], style, label=name)
    axis.set(xlabel="size, in root mean squares of the row", ylabel="share of weights beyond", yscale="log")
    axis.legend(frameon=False)


def _grams(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Hessians of the first layer's inputs from 16 windows of 512 calibration tokens."""
    texts = [read_text_file(text.path) for text in calibration_texts()]
    settings = {"calibration": {"windows": 16, "window": 512}}
    sample = draw_sample(checkpoint, texts, apply_overrides(default_recipe(2), settings, "figure"))
    with torch.no_grad():
        hidden = load_embedding(checkpoint)(sample.windows)
        angles = Rotary(checkpoint.config).angles(torch.arange(sample.windows.shape[1]))
        layer = load_layer(checkpoint, _LAYER)
        return collect_layer(
            checkpoint.config, _LAYER, layer, Streams(hidden, hidden.clone()), angles, 1.0
        ).grams


def feedback(axis: Axes) -> None:
    """Error at the output and in the weights, with and without error feedback, at two bits."""
    checkpoint = open_checkpoint(bundled_model())
    grams, layer = _grams(checkpoint), load_layer(checkpoint, _LAYER)
    code, options = TrellisCode(bits_per_weight=2, state_bits=12), EncodeOptions(threads=1)
    bars: dict[str, list[float]] = {"output, plain": [], "output, feedback": [], "weights, feedback": []}
    names = {"mlp.up_proj": MLP_INPUT, "mlp.down_proj": hidden_of("mlp")}
    for name, source in names.items():
        weight, gram = layer.get_parameter(f"{name}.weight").data.float(), grams[source]
        identity = torch.eye(weight.shape[1])
        signs = input_signs(0, f"model.layers.{_LAYER}.{source}", weight.shape[1])
        plain = encode_matrices({name: weight}, identity, signs, code, options)[name].decoded - weight
        fed = encode_matrices({name: weight}, gram, signs, code, options)[name].decoded - weight
        for label, error, measure in (
            ("output, plain", plain, gram),
            ("output, feedback", fed, gram),
            ("weights, feedback", fed, identity),
        ):
            power = ((weight @ measure) * weight).sum()
            bars[label].append(float(((error @ measure) * error).sum() / power))
    checkpoint.close()
    for index, (label, errors) in enumerate(bars.items()):
        drawn = axis.bar(np.arange(len(names)) + 0.27 * (index - 1), errors, width=0.25, label=label)
        axis.bar_label(drawn, fmt="%.3f", fontsize=8)
    axis.set(xticks=range(len(names)), xticklabels=list(names), ylabel="squared error / power")
    axis.margins(y=0.15)
    axis.legend(frameon=False)


FIGURES: dict[str, tuple[Callable[[Axes], None], tuple[float, float]]] = {
    "ring": (ring, (8, 1.9)),
    "codebook": (codebook, (6, 3)),
    "rates": (rates, (6, 3.2)),
    "rotation": (rotation, (6, 3.2)),
    "feedback": (feedback, (6, 3.2)),
}


def main() -> None:
    """Draw all, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=sorted(FIGURES), action="append")
    arguments = parser.parse_args()
    plt.rc("svg", fonttype="none", hashsalt="ernieq")
    for name in arguments.only or FIGURES:
        drawing, size = FIGURES[name]
        figure, axis = plt.subplots(figsize=size)
        drawing(axis)
        figure.tight_layout()
        figure.savefig(arguments.folder / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
