"""Which trellis: the two numbers that fix a code, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass

from ernieq.errors import UsageError

# Rates of the code, in bits per weight. A half bit is a shift that alternates between the two neighbours; above
# 6 bits a weight is nearly what it was, and a half more buys nothing.
RATES: tuple[float, ...] = (1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 7, 8)
RATES_IN_WORDS = "1.5 to 6 in halves, 7 or 8"
_STATE_BITS = (10, 11, 12, 13, 14, 16)


@dataclass(frozen=True)
class TrellisCode:
    """A bitshift trellis code over tiles of 256 weights.

    At a whole rate K every weight shifts K bits into the state. At a rate between two whole numbers the shift
    alternates: in a pair of weights (2i, 2i + 1) the first shifts in floor(K) bits and the second ceil(K).

    Args:
        bits_per_weight: K, one of ``RATES``; a whole rate is kept as an int.
        state_bits: L, 16 for real use; 10 to 14 for tests and speed.

    Raises:
        UsageError: either number is out of range, or a state is shorter than two symbols.
    """

    bits_per_weight: float
    state_bits: int = 16

    def __post_init__(self) -> None:
        if self.bits_per_weight not in RATES:
            raise UsageError(
                f"bits per weight is {self.bits_per_weight!r}; the trellis code takes {RATES_IN_WORDS}"
            )
        if self.bits_per_weight == int(self.bits_per_weight):
            object.__setattr__(self, "bits_per_weight", int(self.bits_per_weight))
        if self.state_bits not in _STATE_BITS:
            raise UsageError(f"state bits is {self.state_bits}; the trellis code takes one of {_STATE_BITS}")
        if self.state_bits < 2 * self.shifts[1]:
            raise UsageError(
                f"{self.state_bits} state bits are too few for {self.bits_per_weight} bits per weight "
                "(a state must hold two symbols)"
            )

    @property
    def pair_bits(self) -> int:
        """Bits of a pair of weights, 2 K."""
        return int(2 * self.bits_per_weight)

    @property
    def shifts(self) -> tuple[int, int]:
        """Bits that even and odd weights shift in: (floor(K), ceil(K))."""
        return self.pair_bits // 2, self.pair_bits - self.pair_bits // 2

    @property
    def states(self) -> int:
        """Number of states, 2^L."""
        return 1 << self.state_bits

    @property
    def units_per_tile(self) -> int:
        """16-bit units that hold the ring of one tile, 16 K."""
        return 8 * self.pair_bits

    def nodes_before(self, weight: int) -> int:
        """Number of nodes between weight - 1 and weight: 2^(L - shift of the weight)."""
        return 1 << (self.state_bits - self.shifts[weight % 2])

    def symbols_at(self, weight: int) -> int:
        """Number of symbols that a weight can take, 2^shift; also of branches into a node before it."""
        return 1 << self.shifts[weight % 2]
