"""Which trellis: the two numbers that fix a code, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass

from ernieq.errors import UsageError

MIN_BITS = 2
MAX_BITS = 6
_STATE_BITS = (10, 11, 12, 13, 14, 16)


@dataclass(frozen=True)
class TrellisCode:
    """A bitshift trellis code over tiles of 256 weights.

    Args:
        bits_per_weight: K, 2 to 6.
        state_bits: L, 16 for real use; 10 to 14 for tests and speed.

    Raises:
        UsageError: either number is out of range, or a state is shorter than two symbols.
    """

    bits_per_weight: int
    state_bits: int = 16

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits_per_weight <= MAX_BITS:
            raise UsageError(
                f"bits per weight is {self.bits_per_weight}; the trellis code takes {MIN_BITS} to {MAX_BITS}"
            )
        if self.state_bits not in _STATE_BITS:
            raise UsageError(f"state bits is {self.state_bits}; the trellis code takes one of {_STATE_BITS}")
        if self.state_bits < 2 * self.bits_per_weight:
            raise UsageError(
                f"{self.state_bits} state bits are too few for {self.bits_per_weight} bits per weight "
                "(a state must hold two symbols)"
            )

    @property
    def states(self) -> int:
        """Number of states, 2^L."""
        return 1 << self.state_bits

    @property
    def nodes(self) -> int:
        """Number of nodes between two weights, 2^(L-K)."""
        return 1 << (self.state_bits - self.bits_per_weight)

    @property
    def symbols(self) -> int:
        """Number of symbols a weight can take, 2^K; also the number of branches into a node."""
        return 1 << self.bits_per_weight

    @property
    def units_per_tile(self) -> int:
        """16-bit units that hold the ring of one tile, 16 K."""
        return 16 * self.bits_per_weight
