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

struct Code {
    int bits;        // K
    int state_bits;  // L
    long nodes() const { return 1L << (state_bits - bits); }
    long symbols() const { return 1L << bits; }
};

// One group of at most kTilesTogether tiles: targets (tiles, 256) int16 in units of 1/kTargetUnit, within +-16383 -> symbols.
using EncodeGroup = void (*)(const Code& code, const int16_t* values, const int16_t* targets, int tiles,
                             int first_pass_steps, uint8_t* symbols);

void encode_group_scalar(const Code&, const int16_t*, const int16_t*, int, int, uint8_t*);
void encode_group_avx2(const Code&, const int16_t*, const int16_t*, int, int, uint8_t*);
void encode_group_avx512(const Code&, const int16_t*, const int16_t*, int, int, uint8_t*);

// Nodes that one vector holds; the value table is laid out in blocks of this many nodes.
constexpr int kLanesScalar = 16;
constexpr int kLanesAvx2 = 16;
constexpr int kLanesAvx512 = 32;

}  // namespace ernieq::viterbi
