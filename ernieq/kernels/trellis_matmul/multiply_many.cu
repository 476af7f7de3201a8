// Products of more tokens: a warp decodes a row of tiles, the block shares a strip of inputs in shared memory.
//
// Constants: PAIR_BITS bits of a pair of weights, L state bits, WARPS warps of a block, TOKEN_TILES groups of eight tokens that share a
// decoded tile.
#include "half2.cuh"
#include "trellis.cuh"

constexpr int kTokens = 8 * TOKEN_TILES;
constexpr int kStrip = 64;               // columns of inputs in shared memory at a time
constexpr int kStride = kStrip + 8;      // float16 numbers; an odd number of 16-byte units keeps ldmatrix free of conflicts
constexpr int kStages = 3;             // strips in shared memory: one in use, two on their way
constexpr int kStageBytes = kTokens * kStride * 2;
constexpr int kUnits = kStrip / 8;       // 16-byte units of a row of a strip

__device__ __forceinline__ void copy_async(u32 shared, const void* global, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(inside ? 16 : 0));
}

// Inputs start .. start + kTokens, columns of strip `strip`; what lies outside becomes zero.
__device__ __forceinline__ void load_strip(u32 shared, const u16* __restrict__ x, int start, int end, int strip,
                                           int columns) {
    for (int i = threadIdx.x; i < kTokens * kUnits; i += 32 * WARPS) {
        const int token = start + i / kUnits, column = strip * kStrip + i % kUnits * 8;
        const bool inside = token < end && column < columns;
        const u16* from = x + (inside ? (size_t)token * columns + column : 0);
        copy_async(shared + (i / kUnits * kStride + i % kUnits * 8) * 2, from, inside);
    }
    asm volatile("cp.async.commit_group;");
}

// offsets: matrix e multiplies inputs offsets[e] to offsets[e + 1] (null: one matrix, all tokens); others as above.
// Grid: (ceil(rows / 16 / WARPS), matrices, parts of an expert's tokens that run side by side).
extern "C" __global__ void __launch_bounds__(32 * WARPS) trellis_multiply_many(
    const u16* __restrict__ x, const float* __restrict__ x_scale, const u32* __restrict__ words,
    const u16* __restrict__ scale, const int* __restrict__ offsets, float* __restrict__ out, int rows, int columns,
    int tokens) {
    extern __shared__ __align__(16) u16 strips[];  // (kStages, kTokens, kStride)
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int group = lane >> 2, quad = lane & 3;
    const int matrix = blockIdx.y, row_tile = blockIdx.x * WARPS + warp;
    const int begin = offsets ? offsets[matrix] : 0, end = offsets ? offsets[matrix + 1] : tokens;
    const bool works = row_tile < rows / 16;
    const int column_tiles = columns / 16, strip_count = (columns + kStrip - 1) / kStrip;
    const u32 shared = (u32)__cvta_generic_to_shared(strips);
    // ldmatrix: lanes 0-7 and 8-15 name the rows of tokens 0-7 (columns 0-7, 8-15), lanes 16-31 those of 8-15.
    const u32 fragment = ((lane & 7) + (lane >> 4) * 8) * kStride + (lane >> 3 & 1) * 8;
    for (int start = begin + blockIdx.z * kTokens; start < end; start += gridDim.z * kTokens) {
        WindowReader reader(
            words + ((size_t)matrix * (rows / 16) + (works ? row_tile : 0)) * column_tiles * kTileWords, lane);
        float sum[TOKEN_TILES][4] = {};
        Window ahead = reader.load(0);
        __syncthreads();  // nobody reads the strips of the tokens before any more
#pragma unroll
        for (int strip = 0; strip < kStages - 1; ++strip)
            load_strip(shared + strip * kStageBytes, x, start, end, strip, columns);
        for (int strip = 0; strip < strip_count; ++strip) {
            asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2));
            __syncthreads();  // this strip is there, and the one before it is done with: its place is free
            load_strip(shared + (strip + kStages - 1) % kStages * kStageBytes, x, start, end, strip + kStages - 1, columns);
            const u32 here = shared + strip % kStages * kStageBytes;
            const int tiles = min(kStrip / 16, column_tiles - strip * (kStrip / 16));
#pragma unroll
            for (int i = 0; i < kStrip / 16; ++i) {
                if (i >= tiles) break;
                const Window now = ahead;
                reader.advance(1);
                if (strip + 1 < strip_count || i + 1 < tiles) ahead = reader.load(0);
                half2_bits values[4];
                decode_window(now, lane, values);
                if (TOKEN_TILES == 1) {
                    u32 b0, b1;
                    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                                 : "=r"(b0), "=r"(b1)
                                 : "r"(here + (((lane & 7) * kStride + (lane >> 3 & 1) * 8) + i * 16) * 2));
                    multiply_tile(sum[0], values, b0, b1);
                }
#pragma unroll
                for (int n = 0; n + 1 < TOKEN_TILES; n += 2) {
                    u32 b[4];
                    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                                 : "r"(here + (fragment + n * 8 * kStride + i * 16) * 2));
                    multiply_tile(sum[n], values, b[0], b[1]);
                    multiply_tile(sum[n + 1], values, b[2], b[3]);
                }
            }
        }
        asm volatile("cp.async.wait_group 0;");
        if (!works) continue;
        const float factors[2] = {row_factor(scale, (size_t)matrix * rows + row_tile * 16 + group),
                                  row_factor(scale, (size_t)matrix * rows + row_tile * 16 + group + 8)};
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = start + 8 * n + 2 * quad + (i & 1);
                if (token < end)
                    out[(size_t)token * rows + row_tile * 16 + group + 8 * (i >> 1)] =
                        sum[n][i] * factors[i >> 1] * x_scale[token];
            }
        }
    }
}

