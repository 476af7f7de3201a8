// Rates of the trellis code, in bits per pair of weights. Their home is ernieq/trellis/code.py; the parity tests,
// which run over all of its rates, hold the two equal.
#pragma once

#include <utility>

namespace ernieq {

// What the kernels are compiled for: 1.5 to 6 bits a weight in halves, 7 and 8.
using PairBits = std::integer_sequence<int, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16>;

template <int... kPairBits>
constexpr bool contains(std::integer_sequence<int, kPairBits...>, int pair_bits) {
    return ((pair_bits == kPairBits) || ...);
}

// Whether the code exists: a state of at most 16 bits holds two symbols.
constexpr bool is_code(int pair_bits, int state_bits) {
    return contains(PairBits{}, pair_bits) && state_bits <= 16 && state_bits >= 2 * ((pair_bits + 1) / 2);
}

}  // namespace ernieq
