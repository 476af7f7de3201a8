// The vector paths, once. A `Simd` type supplies
//   kLanes                       lanes of a vector: 8 or 16
//   Float                        a vector of floats
//   Words<R>, load_words<R>      the 32-bit windows of a group of kLanes lanes (see windows.hpp)
//   values<R, J>                 the values of weight J of every lane, as Float
//   zero, multiply_add, scaled, repeat4, row_scales, store, store_pairs
#include <utility>

#include "trellis_matmul.hpp"

namespace ernieq::trellis_matmul {

// Calls body(integral_constant<J>) for J = 0..7, unrolled.
template <class Body, int... J>
inline void for_each_weight(const Body& body, std::integer_sequence<int, J...>) {
    (body(std::integral_constant<int, J>{}), ...);
}

using LaneWeights = std::make_integer_sequence<int, kWeightsPerLane>;

template <class Simd, int kPairBits, int Tokens>
void multiply_tokens(const Matrix& matrix, long row_tile, const float* x, float* sums) {
    const auto mask = Simd::mask(matrix.state_mask);
    for (int group = 0; group < kLanesPerTile / Simd::kLanes; ++group) {
        typename Simd::Float partial[Tokens][2];
        for (auto& token : partial) token[0] = token[1] = Simd::zero();
        for (long column = 0; column < matrix.column_tiles; ++column) {
            const auto words = Simd::template load_words<kPairBits>(matrix.ring(row_tile, column, kPairBits), group);
            const float* inputs = x + column * kTileSide;
            for_each_weight(
                [&](auto weight) {
                    constexpr int j = decltype(weight)::value;
                    const auto values = Simd::template values<kPairBits, j>(words, mask);
                    for (int token = 0; token < Tokens; ++token) {
                        const float* from = inputs + token * matrix.column_tiles * kTileSide + 4 * pattern_of(j);
                        auto& sum = partial[token][j / 2 % 2];
                        sum = Simd::multiply_add(values, Simd::repeat4(from), sum);
                    }
                },
                LaneWeights{});
        }
        for (int token = 0; token < Tokens; ++token)
            for (int upper = 0; upper < 2; ++upper)
                Simd::store(sums + token * kPartialSums + kLanesPerTile * upper + group * Simd::kLanes,
                            partial[token][upper]);
    }
}

template <class Simd, int kPairBits>
void multiply_row_tile(const Matrix& matrix, long row_tile, const float* x, int tokens, float* sums) {
    switch (tokens) {
        case 1: return multiply_tokens<Simd, kPairBits, 1>(matrix, row_tile, x, sums);
        case 2: return multiply_tokens<Simd, kPairBits, 2>(matrix, row_tile, x, sums);
        case 4: return multiply_tokens<Simd, kPairBits, 4>(matrix, row_tile, x, sums);
        default: return multiply_tokens<Simd, kPairBits, kFusedTokens>(matrix, row_tile, x, sums);
    }
}

template <class Simd, int kPairBits>
void decode_row_tile(const Matrix& matrix, long row_tile, float* weights) {
    const auto mask = Simd::mask(matrix.state_mask);
    const long width = matrix.column_tiles * kTileSide;
    for (int group = 0; group < kLanesPerTile / Simd::kLanes; ++group) {
        const int row = group * Simd::kLanes / 4;
        const float* scale = matrix.row_scale + row_tile * kTileSide + row;
        const typename Simd::Float scales[2] = {Simd::row_scales(scale), Simd::row_scales(scale + 8)};
        for (long column = 0; column < matrix.column_tiles; ++column) {
            const auto words = Simd::template load_words<kPairBits>(matrix.ring(row_tile, column, kPairBits), group);
            float* tile = weights + row * width + column * kTileSide;
            for_each_weight(
                [&](auto weight) {
                    constexpr int j = decltype(weight)::value;
                    if constexpr (j % 2 == 0) {  // weights j and j + 1 of a lane are neighbours in a row
                        const auto factor = scales[j / 2 % 2];
                        const auto even = Simd::scaled(Simd::template values<kPairBits, j>(words, mask), factor);
                        const auto odd = Simd::scaled(Simd::template values<kPairBits, j + 1>(words, mask), factor);
                        Simd::store_pairs(tile + 8 * (j / 2 % 2) * width + 8 * (j / 4), width, even, odd);
                    }
                },
                LaneWeights{});
        }
    }
}

template <class Simd, int... kPairBits>
Path path_of(int pair_bits, std::integer_sequence<int, kPairBits...>) {
    Path path{};
    ((pair_bits == kPairBits ? void(path = {multiply_row_tile<Simd, kPairBits>, decode_row_tile<Simd, kPairBits>})
                             : void()),
     ...);
    return path;
}

}  // namespace ernieq::trellis_matmul
