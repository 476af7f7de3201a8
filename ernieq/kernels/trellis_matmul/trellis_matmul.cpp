// Python entries of the trellis products: checks, reordered inputs, threads, the final reduction.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "isa.hpp"
#include "trellis_matmul.hpp"

namespace nb = nanobind;

namespace ernieq {
namespace trellis_matmul {
namespace {

using Packed = nb::ndarray<const int16_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using HalfBits = nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>;  // float16
using Input = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// A thread start costs about as much as this many decoded weights.
constexpr long kWeightsPerThread = 1L << 18;
constexpr float kValueUnit = 128.0f;  // ernieq/trellis/codebook.py

Path path_of(Isa isa, int pair_bits) {
#ifdef ERNIEQ_X86
    if (isa == Isa::Avx512) return path_avx512(pair_bits);
    if (isa == Isa::Avx2) return path_avx2(pair_bits);
#endif
    (void)isa;
    return path_scalar(pair_bits);
}

float from_half(uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                            : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                            : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
    return half & 0x8000 ? -magnitude : magnitude;
}

void check(const Packed& packed, const HalfBits& scale, int pair_bits, int state_bits) {
    if (!is_code(pair_bits, state_bits))
        throw std::invalid_argument("unsupported trellis code");
    if (packed.shape(2) != static_cast<size_t>(units_per_tile(pair_bits)))
        throw std::invalid_argument("a packed tile must have 16 units per bit of a weight");
    if (scale.dtype().code != static_cast<uint8_t>(nb::dlpack::dtype_code::Float) || scale.dtype().bits != 16)
        throw std::invalid_argument("scale must be float16");
    if (scale.shape(0) != packed.shape(0) * kTileSide)
        throw std::invalid_argument("scale and packed tiles do not fit together");
}

// scale / 128 of the rows of the row tiles first..first+count-1.
std::vector<float> row_scales(const HalfBits& scale, long first, long count) {
    const uint16_t* from = static_cast<const uint16_t*>(scale.data()) + first * kTileSide;
    std::vector<float> factors(count * kTileSide);
    for (size_t i = 0; i < factors.size(); ++i) factors[i] = from_half(from[i]) / kValueUnit;
    return factors;
}

int useful_threads(int threads, long row_tiles, long column_tiles) {
    const long weights = row_tiles * column_tiles * kTileSide * kTileSide;
    return static_cast<int>(std::min<long>(threads, 1 + weights / kWeightsPerThread));
}

// (tokens, columns) -> [token][column tile][pattern][lane % 4].
void reorder(const float* x, long tokens, long column_tiles, float* to) {
    for (long tile = 0; tile < tokens * column_tiles; ++tile)
        for (int pattern = 0; pattern < 4; ++pattern)
            for (int lane = 0; lane < 4; ++lane)
                *to++ = x[tile * kTileSide + 2 * lane + pattern % 2 + 8 * (pattern / 2)];
}

// At most kFusedTokens inputs, each row tile decoded once.
void multiply_few(const Path& path, const Matrix& matrix, long row_tiles, const float* x, long tokens, float* out,
                  int threads) {
    int padded = 1;
    while (padded < tokens) padded *= 2;
    std::vector<float> inputs(padded * matrix.column_tiles * kTileSide, 0.0f);
    reorder(x, tokens, matrix.column_tiles, inputs.data());
    parallel_for(row_tiles, threads, [&](long row_tile) {
        float sums[kFusedTokens * kPartialSums];
        path.multiply(matrix, row_tile, inputs.data(), padded, sums);
        const float* scale = matrix.row_scale + row_tile * kTileSide;
        for (long token = 0; token < tokens; ++token)
            for (int row = 0; row < kTileSide; ++row) {
                const float* part = sums + token * kPartialSums + 4 * row;
                const float sum = (part[0] + part[1]) + (part[2] + part[3]);
                out[(token * row_tiles + row_tile) * kTileSide + row] = sum * scale[row];
            }
    });
}

void multiply(Input x, Packed packed, HalfBits scale, int pair_bits, int state_bits, Output out, const std::string& isa,
              int threads) {
    check(packed, scale, pair_bits, state_bits);
    const long tokens = static_cast<long>(x.shape(0)), row_tiles = static_cast<long>(packed.shape(0));
    const long column_tiles = static_cast<long>(packed.shape(1)), width = column_tiles * kTileSide;
    if (static_cast<long>(x.shape(1)) != width || out.shape(0) != x.shape(0) ||
        static_cast<long>(out.shape(1)) != row_tiles * kTileSide)
        throw std::invalid_argument("input, matrix and output do not fit together");
    const Path path = path_of(parse_isa(isa), pair_bits);
    const float* from = x.data();
    float* to = out.data();
    const int useful = useful_threads(threads, row_tiles, column_tiles);
    nb::gil_scoped_release release;
    const std::vector<float> scales = row_scales(scale, 0, row_tiles);
    const Matrix matrix{reinterpret_cast<const uint16_t*>(packed.data()), scales.data(), column_tiles,
                        (uint32_t{1} << state_bits) - 1};
    for (long first = 0; first < tokens; first += kFusedTokens)
        multiply_few(path, matrix, row_tiles, from + first * width, std::min<long>(kFusedTokens, tokens - first),
                     to + first * row_tiles * kTileSide, useful);
}

void decode(Packed packed, HalfBits scale, int pair_bits, int state_bits, long first_row_tile, Output weights,
            const std::string& isa, int threads) {
    check(packed, scale, pair_bits, state_bits);
    const long column_tiles = static_cast<long>(packed.shape(1)), width = column_tiles * kTileSide;
    const long row_tiles = static_cast<long>(weights.shape(0)) / kTileSide;
    if (weights.shape(0) % kTileSide || static_cast<long>(weights.shape(1)) != width || first_row_tile < 0 ||
        first_row_tile + row_tiles > static_cast<long>(packed.shape(0)))
        throw std::invalid_argument("the rows to decode and the output do not fit the matrix");
    const Path path = path_of(parse_isa(isa), pair_bits);
    const uint16_t* units = reinterpret_cast<const uint16_t*>(packed.data());
    float* to = weights.data();
    const int useful = useful_threads(threads, row_tiles, column_tiles);
    nb::gil_scoped_release release;
    const std::vector<float> scales = row_scales(scale, first_row_tile, row_tiles);
    const Matrix matrix{units + first_row_tile * column_tiles * units_per_tile(pair_bits), scales.data(), column_tiles,
                        (uint32_t{1} << state_bits) - 1};
    parallel_for(row_tiles, useful,
                 [&](long row_tile) { path.decode(matrix, row_tile, to + row_tile * kTileSide * width); });
}

}  // namespace
}  // namespace trellis_matmul

// noconvert: an array of another layout is refused, not copied; a copy of an output would lose the result.
void register_trellis_matmul(nb::module_& module) {
    module.def("trellis_multiply", &trellis_matmul::multiply, nb::arg("x").noconvert(),
               nb::arg("packed").noconvert(), nb::arg("scale").noconvert(), nb::arg("pair_bits"), nb::arg("state_bits"),
               nb::arg("out").noconvert(), nb::arg("isa"), nb::arg("threads"));
    module.def("trellis_decode", &trellis_matmul::decode, nb::arg("packed").noconvert(),
               nb::arg("scale").noconvert(), nb::arg("pair_bits"), nb::arg("state_bits"), nb::arg("first_row_tile"),
               nb::arg("weights").noconvert(), nb::arg("isa"), nb::arg("threads"));
}

}  // namespace ernieq
