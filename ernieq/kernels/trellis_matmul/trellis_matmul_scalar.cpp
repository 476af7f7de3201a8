// The portable path: one lane at a time, its eight states from one 64-bit run of the ring.
#include "trellis_matmul.hpp"

namespace ernieq::trellis_matmul {
namespace {

// The 64 bits that end with unit `last`, wrapping around the ring.
template <int K>
uint64_t bits_up_to(const uint16_t* ring, int last) {
    uint64_t run = 0;
    for (int back = 3; back >= 0; --back) run = run << 16 | ring[(last - back + 16 * K) % (16 * K)];
    return run;
}

// The eight values of a lane. A lane needs its own 8 K bits and the 16 - K before them: 7 K + 16 <= 58.
template <int K>
void lane_values(const uint16_t* ring, int lane, uint32_t mask, float* values) {
    const int end = (lane + 1) * kWeightsPerLane * K;  // a multiple of 8 bits
    const int last = (end - 1) / 16;
    const uint64_t run = bits_up_to<K>(ring, last);
    const int below = (last + 1) * 16 - end;
    for (int j = 0; j < kWeightsPerLane; ++j) {
        const uint32_t state = static_cast<uint32_t>(run >> (below + (kWeightsPerLane - 1 - j) * K)) & mask;
        const uint32_t product = kMultiplier * state;
        const uint32_t pairs = (product & 0x00FF00FFu) + (product >> 8 & 0x00FF00FFu);
        values[j] = static_cast<float>(static_cast<int>((pairs & 0xFFFFu) + (pairs >> 16)) - kByteSumMean);
    }
}

template <int K>
void multiply(const Matrix& matrix, long row_tile, const float* x, int tokens, float* sums) {
    for (int i = 0; i < tokens * kPartialSums; ++i) sums[i] = 0.0f;
    for (long column = 0; column < matrix.column_tiles; ++column) {
        const uint16_t* ring = matrix.ring(row_tile, column, K);
        for (int lane = 0; lane < kLanesPerTile; ++lane) {
            float values[kWeightsPerLane];
            lane_values<K>(ring, lane, matrix.state_mask, values);
            for (int token = 0; token < tokens; ++token) {
                const float* inputs = x + (token * matrix.column_tiles + column) * kTileSide + lane % 4;
                float* sum = sums + token * kPartialSums + lane;
                for (int j = 0; j < kWeightsPerLane; ++j)
                    sum[kLanesPerTile * (j / 2 % 2)] += values[j] * inputs[4 * pattern_of(j)];
            }
        }
    }
}

template <int K>
void decode(const Matrix& matrix, long row_tile, float* weights) {
    const long width = matrix.column_tiles * kTileSide;
    const float* scale = matrix.row_scale + row_tile * kTileSide;
    for (long column = 0; column < matrix.column_tiles; ++column) {
        const uint16_t* ring = matrix.ring(row_tile, column, K);
        for (int lane = 0; lane < kLanesPerTile; ++lane) {
            float values[kWeightsPerLane];
            lane_values<K>(ring, lane, matrix.state_mask, values);
            for (int j = 0; j < kWeightsPerLane; ++j) {
                const int row = lane / 4 + 8 * (j / 2 % 2);
                const int place = 2 * (lane % 4) + j % 2 + 8 * (j / 4);
                weights[row * width + column * kTileSide + place] = values[j] * scale[row];
            }
        }
    }
}

template <int K>
constexpr Path kPath{multiply<K>, decode<K>};

}  // namespace

Path path_scalar(int bits) {
    constexpr Path paths[] = {kPath<2>, kPath<3>, kPath<4>, kPath<5>, kPath<6>};
    return paths[bits - 2];
}

}  // namespace ernieq::trellis_matmul
