// The portable path: one lane at a time, its eight states from two 64-bit runs of the ring.
#include "trellis_matmul.hpp"

namespace ernieq::trellis_matmul {
namespace {

// The 64 bits that end with unit `last`, wrapping around the ring.
template <int kPairBits>
uint64_t bits_up_to(const uint16_t* ring, int last) {
    constexpr int kUnits = units_per_tile(kPairBits);
    uint64_t run = 0;
    for (int back = 3; back >= 0; --back) run = run << 16 | ring[(last - back + kUnits) % kUnits];
    return run;
}

// The eight values of a lane, four from each of two runs: 3 K + 16 <= 40 bits, ending anywhere in their last unit.
template <int kPairBits>
void lane_values(const uint16_t* ring, int lane, uint32_t mask, float* values) {
    for (int j = 0; j < kWeightsPerLane; j += 4) {
        const int end = lane * lane_bits(kPairBits) + end_of(kPairBits, j + 3);
        const int last = (end - 1) / 16;
        const uint64_t run = bits_up_to<kPairBits>(ring, last) >> ((last + 1) * 16 - end);
        for (int weight = j; weight < j + 4; ++weight) {
            const int above = end_of(kPairBits, j + 3) - end_of(kPairBits, weight);
            const uint32_t state = static_cast<uint32_t>(run >> above) & mask;
            const uint32_t product = kMultiplier * state;
            const uint32_t pairs = (product & 0x00FF00FFu) + (product >> 8 & 0x00FF00FFu);
            values[weight] = static_cast<float>(static_cast<int>((pairs & 0xFFFFu) + (pairs >> 16)) - kByteSumMean);
        }
    }
}

template <int kPairBits>
void multiply(const Matrix& matrix, long row_tile, const float* x, int tokens, float* sums) {
    for (int i = 0; i < tokens * kPartialSums; ++i) sums[i] = 0.0f;
    for (long column = 0; column < matrix.column_tiles; ++column) {
        const uint16_t* ring = matrix.ring(row_tile, column, kPairBits);
        for (int lane = 0; lane < kLanesPerTile; ++lane) {
            float values[kWeightsPerLane];
            lane_values<kPairBits>(ring, lane, matrix.state_mask, values);
            for (int token = 0; token < tokens; ++token) {
                const float* inputs = x + (token * matrix.column_tiles + column) * kTileSide + lane % 4;
                float* sum = sums + token * kPartialSums + lane;
                for (int j = 0; j < kWeightsPerLane; ++j)
                    sum[kLanesPerTile * (j / 2 % 2)] += values[j] * inputs[4 * pattern_of(j)];
            }
        }
    }
}

template <int kPairBits>
void decode(const Matrix& matrix, long row_tile, float* weights) {
    const long width = matrix.column_tiles * kTileSide;
    const float* scale = matrix.row_scale + row_tile * kTileSide;
    for (long column = 0; column < matrix.column_tiles; ++column) {
        const uint16_t* ring = matrix.ring(row_tile, column, kPairBits);
        for (int lane = 0; lane < kLanesPerTile; ++lane) {
            float values[kWeightsPerLane];
            lane_values<kPairBits>(ring, lane, matrix.state_mask, values);
            for (int j = 0; j < kWeightsPerLane; ++j) {
                const int row = lane / 4 + 8 * (j / 2 % 2);
                const int place = 2 * (lane % 4) + j % 2 + 8 * (j / 4);
                weights[row * width + column * kTileSide + place] = values[j] * scale[row];
            }
        }
    }
}

template <int... kPairBits>
Path path_of(int pair_bits, std::integer_sequence<int, kPairBits...>) {
    Path path{};
    ((pair_bits == kPairBits ? void(path = {multiply<kPairBits>, decode<kPairBits>}) : void()), ...);
    return path;
}

}  // namespace

Path path_scalar(int pair_bits) { return path_of(pair_bits, PairBits{}); }

}  // namespace ernieq::trellis_matmul
