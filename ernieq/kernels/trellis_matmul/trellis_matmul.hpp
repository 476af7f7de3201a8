// Products with, and decoding of, matrices in the trellis code. README.md in this folder explains the vector layout.
#pragma once

#include <cstdint>

#include "rates.hpp"

namespace ernieq::trellis_matmul {

constexpr int kTileSide = 16;
constexpr int kLanesPerTile = 32;   // a lane owns eight consecutive weights of the sequence
constexpr int kWeightsPerLane = 8;
constexpr int kPartialSums = 64;    // per token and row tile: [row 0..15][lane % 4]
constexpr int kFusedTokens = 8;     // tokens that share one decoding

// The home of these two is ernieq/trellis/codebook.py; the parity test with it holds them equal.
constexpr uint32_t kMultiplier = 0x83DCD12Du;
constexpr int kByteSumMean = 510;

constexpr int units_per_tile(int pair_bits) { return 8 * pair_bits; }
constexpr int lane_bits(int pair_bits) { return kWeightsPerLane / 2 * pair_bits; }

// Where weight j of a lane ends in its run of bits: even weights shift floor(K) bits in, odd ones ceil(K).
constexpr int end_of(int pair_bits, int j) { return j / 2 * pair_bits + (j % 2 ? pair_bits : pair_bits / 2); }

struct Matrix {
    const uint16_t* packed;  // (row tiles, column tiles, 16 K): the rings
    const float* row_scale;  // (rows,): what a value is multiplied by
    long column_tiles;
    uint32_t state_mask;     // 2^L - 1
    const uint16_t* ring(long row_tile, long column_tile, int pair_bits) const {
        return packed + (row_tile * column_tiles + column_tile) * units_per_tile(pair_bits);
    }
};

// Index of the four-column pattern of x that weight j of a lane meets: columns 2 (lane % 4) + j % 2 + 8 (j / 4).
constexpr int pattern_of(int j) { return j % 2 + 2 * (j / 4); }

// One row tile times `tokens` (1, 2, 4 or 8) inputs. x: [token][column tile][pattern][lane % 4];
// sums: [token][kPartialSums], written.
using MultiplyRowTile = void (*)(const Matrix& matrix, long row_tile, const float* x, int tokens, float* sums);

// One row tile -> (16, columns) row-major weights.
using DecodeRowTile = void (*)(const Matrix& matrix, long row_tile, float* weights);

struct Path {
    MultiplyRowTile multiply;
    DecodeRowTile decode;
};

// The implementation for a rate.
Path path_scalar(int pair_bits);
Path path_avx2(int pair_bits);
Path path_avx512(int pair_bits);

}  // namespace ernieq::trellis_matmul
