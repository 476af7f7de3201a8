// Products of up to eight tokens with matrices in the trellis code: a block decodes one row of tiles, its columns
// divided among the warps.
//
// Constants: PAIR_BITS bits of a pair of weights, L state bits, WARPS warps of a block.
#include "half2.cuh"
#include "trellis.cuh"

constexpr int kResidentWarps = 40;  // of a multiprocessor: at most 48 registers a thread
constexpr int kAhead = 4;  // tiles whose words are on their way while as many are multiplied

// x: (inputs, columns) float16. words: (matrices, rows / 16, columns / 16, kTileWords). scale: (matrices, rows) float16.
// out: (outputs, rows) float32 = x_scale * scale / 128 * (values x). Grid: (rows / 16, products).
// selected: product i is of matrix selected[i] with input i / inputs_shared_by. Null: one product of `tokens` tokens.
extern "C" __global__ void __launch_bounds__(32 * WARPS, kResidentWarps / WARPS) trellis_multiply(
    const u32* __restrict__ x, const float* __restrict__ x_scale, const u32* __restrict__ words,
    const u16* __restrict__ scale, const int* __restrict__ selected, float* __restrict__ out, int rows, int columns,
    int tokens, int inputs_shared_by) {
    __shared__ float partial[WARPS][16][9];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int group = lane >> 2, quad = lane & 3;
    const int matrix = selected ? selected[blockIdx.y] : 0;
    const int input = selected ? blockIdx.y / inputs_shared_by : min(group, tokens - 1);
    const int column_tiles = columns / 16;
    const int share = (column_tiles + WARPS - 1) / WARPS;
    const int first = min(warp * share, column_tiles), count = min(share, column_tiles - first);
    const u32* tiles = words + (((size_t)matrix * (rows / 16) + blockIdx.x) * column_tiles + first) * kTileWords;
    // Groups beyond the tokens multiply a token again: columns of the result that nobody reads.
    const u32* b = x + (size_t)input * (columns / 2) + first * 8 + quad;
    WindowReader reader(tiles, lane);
    float sum[4] = {};
    Window ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
        if (i < count) ahead[i] = reader.load(i);
    for (int left = count; left > 0; left -= kAhead) {
        u32 b0[kAhead], b1[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
            if (i < left) b0[i] = __ldg(b + 8 * i), b1[i] = __ldg(b + 8 * i + 4);
        b += 8 * kAhead;
        reader.advance(kAhead);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (i >= left) break;
            half2_bits values[4];
            decode_window(ahead[i], lane, values);
            if (i + kAhead < left) ahead[i] = reader.load(i);
            multiply_tile(sum, values, b0[i], b1[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) partial[warp][group + 8 * (i >> 1)][2 * quad + (i & 1)] = sum[i];
    __syncthreads();
    const int outputs = selected ? 1 : tokens;
    for (int i = threadIdx.x; i < 16 * outputs; i += 32 * WARPS) {
        const int row = i & 15, token = i >> 4;
        float total = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) total += partial[w][row][token];
        const float factor = row_factor(scale, (size_t)matrix * rows + blockIdx.x * 16 + row);
        const int place = selected ? blockIdx.y : token;
        out[(size_t)place * rows + blockIdx.x * 16 + row] =
            total * factor * x_scale[selected ? blockIdx.y / inputs_shared_by : token];
    }
}

