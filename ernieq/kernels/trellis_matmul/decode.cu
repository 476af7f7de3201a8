// Decoding: a warp decodes up to four neighbouring tiles of a row and writes runs of their columns.
//
// Constants: PAIR_BITS bits of a pair of weights, L state bits, WARPS warps of a block.
#include "half2.cuh"
#include "trellis.cuh"

constexpr int kRun = 4;

// Rotated weights, (rows, columns): value * (scale / 128), rounded once to float32 or float16.
template <typename Number>
__device__ __forceinline__ void decode_tiles(const u32* __restrict__ words, const u16* __restrict__ scale,
                                             Number* __restrict__ out, int row_tiles, int column_tiles) {
    constexpr int kPad = 16 / sizeof(Number);
    __shared__ __align__(16) Number buffer[WARPS][16][16 * kRun + kPad];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int runs = (column_tiles + kRun - 1) / kRun;
    const int run = blockIdx.x * WARPS + warp;
    if (run >= row_tiles * runs) return;
    const int row_tile = run / runs, first = run % runs * kRun, count = min(kRun, column_tiles - first);
    const WindowReader reader(words + ((size_t)row_tile * column_tiles + first) * kTileWords, lane);
    const float factors[2] = {row_factor(scale, row_tile * 16 + (lane >> 2)),
                              row_factor(scale, row_tile * 16 + (lane >> 2) + 8)};
    for (int i = 0; i < count; ++i) {
        half2_bits values[4];
        decode_window(reader.load(i), lane, values);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            Number* place = &buffer[warp][(lane >> 2) + 8 * (j & 1)][16 * i + 2 * (lane & 3) + 8 * (j >> 1)];
            const float low = low_float(values[j]) * factors[j & 1], high = high_float(values[j]) * factors[j & 1];
            if (sizeof(Number) == 4) {
                reinterpret_cast<float*>(place)[0] = low, reinterpret_cast<float*>(place)[1] = high;
            } else {
                *reinterpret_cast<u32*>(place) = to_half2(low, high);
            }
        }
    }
    __syncwarp();
    constexpr int kPerUnit = 16 / sizeof(Number);
    const int units = count * 16 / kPerUnit;  // 16-byte units of a row
    Number* target = out + (size_t)row_tile * 16 * column_tiles * 16 + first * 16;
    for (int i = lane; i < 16 * units; i += 32) {
        const int row = i / units, unit = i % units;
        *reinterpret_cast<uint4*>(target + (size_t)row * column_tiles * 16 + unit * kPerUnit) =
            *reinterpret_cast<const uint4*>(&buffer[warp][row][unit * kPerUnit]);
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) trellis_decode_float32(
    const u32* __restrict__ words, const u16* __restrict__ scale, float* __restrict__ out, int row_tiles,
    int column_tiles) {
    decode_tiles(words, scale, out, row_tiles, column_tiles);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) trellis_decode_float16(
    const u32* __restrict__ words, const u16* __restrict__ scale, u16* __restrict__ out, int row_tiles,
    int column_tiles) {
    decode_tiles(words, scale, out, row_tiles, column_tiles);
}
