// Block Hadamard rotation of rows, with the signs before it (rotate) or after it (unrotate).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "isa.hpp"

namespace nb = nanobind;

namespace ernieq {
namespace hadamard {
namespace {

using Input = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Signs = nb::ndarray<const int8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// A thread start costs about as much as rotating this many numbers.
constexpr long kNumbersPerThread = 1L << 16;

// Four neighbours; a compiler extension of gcc and clang that maps to SSE, NEON or plain code.
typedef float Four __attribute__((vector_size(16)));

Four load(const float* from) {
    Four four;
    std::memcpy(&four, from, sizeof four);
    return four;
}

void store(float* to, Four four) { std::memcpy(to, &four, sizeof four); }

// The first two stages within four neighbours: partners at distance 1, then 2.
Four transform_four(Four x) {
    const Four first{1, -1, 1, -1}, second{1, 1, -1, -1};
    x = Four{x[1], x[0], x[3], x[2]} + x * first;
    return Four{x[2], x[3], x[0], x[1]} + x * second;
}

void transform_pair(float* block) {
    const float sum = block[0] + block[1];
    block[1] = block[0] - block[1];
    block[0] = sum;
}

// Unnormalised Walsh-Hadamard transform in Sylvester order, in place.
void transform(float* block, long side) {
    if (side == 2) transform_pair(block);
    if (side < 4) return;
    for (long i = 0; i < side; i += 4) store(block + i, transform_four(load(block + i)));
    for (long half = 4; half < side; half *= 2)
        for (long start = 0; start < side; start += 2 * half)
            for (long i = start; i < start + half; i += 4) {
                const Four a = load(block + i), b = load(block + i + half);
                store(block + i, a + b);
                store(block + i + half, a - b);
            }
}

void rotate_row(const float* from, const int8_t* signs, long width, long side, bool inverse, float* to) {
    const float norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(side)));
    for (long i = 0; i < width; ++i) to[i] = inverse ? from[i] : from[i] * static_cast<float>(signs[i]);
    for (long start = 0; start < width; start += side) transform(to + start, side);
    for (long i = 0; i < width; ++i) to[i] *= inverse ? norm * static_cast<float>(signs[i]) : norm;
}

void rotate(Input input, Signs signs, long block, bool inverse, Output output, int threads) {
    const long rows = static_cast<long>(input.shape(0)), width = static_cast<long>(input.shape(1));
    if (block < 1 || (block & (block - 1)) || width % block)
        throw std::invalid_argument("the block must be a power of two that divides the width");
    if (static_cast<long>(signs.shape(0)) != width || output.shape(0) != input.shape(0) ||
        output.shape(1) != input.shape(1))
        throw std::invalid_argument("input, signs and output do not fit together");
    const float* from = input.data();
    const int8_t* sign = signs.data();
    float* to = output.data();
    const int useful = static_cast<int>(std::min<long>(threads, 1 + rows * width / kNumbersPerThread));
    nb::gil_scoped_release release;
    parallel_for(rows, useful, [&](long row) {
        rotate_row(from + row * width, sign, width, block, inverse, to + row * width);
    });
}

}  // namespace
}  // namespace hadamard

// noconvert: an array of another layout is refused, not copied; a copy of the output would lose the result.
void register_hadamard(nb::module_& module) {
    module.def("hadamard_rotate", &hadamard::rotate, nb::arg("input").noconvert(), nb::arg("signs").noconvert(),
               nb::arg("block"), nb::arg("inverse"), nb::arg("output").noconvert(), nb::arg("threads"));
}

}  // namespace ernieq
