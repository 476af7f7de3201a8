// Tail-biting Viterbi search over the bitshift trellis, in 16-bit integers.
//
// README.md in this folder derives the arithmetic; reference.py is the truth that every path equals bit for bit.
#pragma once

#include <cstdint>

namespace ernieq::viterbi {

constexpr int kTileWeights = 256;
constexpr int kTilesTogether = 2;    // tiles side by side share every load of the value table
constexpr int kRenormaliseEvery = 16;
constexpr int kTargetUnit = 32;      // targets and values are counted in 1/32 of a value unit

// In a pair of weights the even one shifts floor(K) bits into the state and the odd one ceil(K).
struct Code {
    int pair_bits;   // 2 K
    int state_bits;  // L
    int shift(int parity) const { return parity ? pair_bits - pair_bits / 2 : pair_bits / 2; }
    // Nodes before a weight of this parity, and branches into each.
    long nodes(int parity) const { return 1L << (state_bits - shift(parity)); }
    long symbols(int parity) const { return 1L << shift(parity); }
};

// The value table in the order in which the search reads it, one for the steps of each parity (the same one where
// they shift alike).
struct Tables {
    const int16_t* at[2];
};

// One group of at most kTilesTogether tiles: targets (tiles, 256) int16 in units of 1/kTargetUnit, within +-16383 -> symbols.
using EncodeGroup = void (*)(const Code& code, const Tables& values, const int16_t* targets, int tiles,
                             int first_pass_steps, uint8_t* symbols);

void encode_group_scalar(const Code&, const Tables&, const int16_t*, int, int, uint8_t*);
void encode_group_avx2(const Code&, const Tables&, const int16_t*, int, int, uint8_t*);
void encode_group_avx512(const Code&, const Tables&, const int16_t*, int, int, uint8_t*);

// Nodes that one vector holds; the value table is laid out in blocks of this many nodes.
constexpr int kLanesScalar = 16;
constexpr int kLanesAvx2 = 16;
constexpr int kLanesAvx512 = 32;

}  // namespace ernieq::viterbi
