"""What the kernels need of a model, layer by layer, with nothing left to look up.

Shapes: H hidden width, I inner width of an MLP, E experts, k experts per token. Packed tiles are 32-bit words,
(rows / 16, columns / 16, 8 K) int32; scales are float16, one per row; all other weights are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ernieq.model import ModelConfig
from ernieq.trellis import TILE_SIDE, TrellisCode


@dataclass(frozen=True, eq=False)
class Rotation:
    """The basis that matrices of one input are quantized in: signs (columns,) int8, side of the blocks."""

    signs: Tensor
    block: int


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """One matrix of one code: words (rows / 16, columns / 16, 8 K), scale (rows,)."""

    words: Tensor
    scale: Tensor
    code: TrellisCode

    @property
    def rows(self) -> int:
        """Output channels."""
        return self.scale.shape[0]

    @property
    def columns(self) -> int:
        """Input channels."""
        return self.words.shape[1] * TILE_SIDE

    @property
    def nbytes(self) -> int:
        """Bytes of words and scales."""
        return self.words.nbytes + self.scale.nbytes


@dataclass(frozen=True, eq=False)
class Product:
    """A product with matrices that stand below each other and read one rotated input.

    There is one part unless the matrices have different codes. ``bias`` is (rows,) float32 or None.
    """

    rotation: Rotation
    parts: tuple[PackedMatrix, ...]
    bias: Tensor | None = None

    @property
    def rows(self) -> int:
        """Output channels of all parts."""
        return sum(part.rows for part in self.parts)

    @property
    def columns(self) -> int:
        """Input channels."""
        return self.parts[0].columns


@dataclass(frozen=True, eq=False)
class GatedPlan:
    """An MLP that every token passes: ``gate_up`` gives 2 I numbers, gate first; ``down`` gives H."""

    gate_up: Product
    down: Product


@dataclass(frozen=True, eq=False)
class ExpertStack:
    """One matrix of every expert: words (E, rows / 16, columns / 16, 8 K), scale (E, rows)."""

    rotation: Rotation
    words: Tensor
    scale: Tensor
    code: TrellisCode

    @property
    def rows(self) -> int:
        """Output channels of one expert."""
        return self.scale.shape[1]

    @property
    def columns(self) -> int:
        """Input channels."""
        return self.words.shape[2] * TILE_SIDE


@dataclass(frozen=True, eq=False)
class RoutedPlan:
    """The router, (E, H) with its correction bias (E,), and the experts that it chooses from."""

    router: Tensor
    bias: Tensor
    gate_up: ExpertStack
    down: ExpertStack

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.router.shape[0]


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """A decoder layer; ``gated`` is the dense MLP or the shared experts, ``routed`` None in a dense layer."""

    input_norm: Tensor
    qkv: Product
    output: Product
    feed_forward_norm: Tensor
    gated: GatedPlan | None
    routed: RoutedPlan | None

    @property
    def feed_forward_rotation(self) -> Rotation:
        """Rotation of the input of the routed experts, or of the MLP where there are none."""
        if self.routed is not None:
            return self.routed.gate_up.rotation
        assert self.gated is not None, "a layer has a feed-forward part"
        return self.gated.gate_up.rotation


@dataclass(frozen=True, eq=False)
class ModelPlan:
    """A whole model; ``embedding`` and ``head`` may hold the same tensors."""

    config: ModelConfig
    embedding: Product
    layers: tuple[LayerPlan, ...]
    norm: Tensor
    head: Product
