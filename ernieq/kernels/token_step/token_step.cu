// What happens between the products of a one-token step, in few launches: norm and rotation, routing, attention.
//
// Constants (each kernel uses its own): BLOCK side of the Hadamard blocks, EXPERTS of the router.
#include "half2.cuh"

#ifndef BLOCK
#define BLOCK 128
#endif
#ifndef EXPERTS
#define EXPERTS 64
#endif

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}
template <bool kMax>
__device__ float block_reduce(float x) {
    __shared__ float parts[32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    x = kMax ? warp_max(x) : warp_sum(x);
    __syncthreads();
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    x = lane < warps ? parts[lane] : 0;
    return kMax ? warp_max(x) : warp_sum(x);
}

// ---- rotation: a warp holds segments of max(BLOCK, 32) channels, lane + 32 i each ----

constexpr int kSegment = BLOCK > 32 ? BLOCK : 32;
constexpr int kPerLane = kSegment / 32;

__device__ __forceinline__ void rotate_segment(float (&x)[kPerLane]) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int h = 1; h < 32 && h < BLOCK; h <<= 1) {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            const float other = __shfl_xor_sync(0xffffffffu, x[i], h);
            x[i] = lane & h ? other - x[i] : x[i] + other;
        }
    }
#pragma unroll
    for (int h = 1; h < kPerLane; h <<= 1) {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            if (i & h) continue;
            const float a = x[i], b = x[i | h];
            x[i] = a + b, x[i | h] = a - b;
        }
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] *= BLOCK == 16    ? 0.25f
                                            : BLOCK == 32  ? 0.17677669529663687f
                                            : BLOCK == 64  ? 0.125f
                                            : BLOCK == 128 ? 0.08838834764831845f
                                            : rsqrtf((float)BLOCK);
}

// Rotate a row that `load` gives channel by channel, and store it as float16 with a power-of-two factor that brings
// its largest channel to 8..16. All threads of the block take part.
template <typename Load>
__device__ __forceinline__ void rotate_row(int width, Load load, u16* __restrict__ out, float* __restrict__ scale) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const int segments = (width + kSegment - 1) / kSegment;
    float largest = 0;
    extern __shared__ float row[];  // (width rounded up to kSegment,)
    for (int segment = warp; segment < segments; segment += warps) {
        float x[kPerLane];
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            const int channel = segment * kSegment + lane + 32 * i;
            x[i] = channel < width ? load(channel) : 0;
        }
        rotate_segment(x);
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            row[segment * kSegment + lane + 32 * i] = x[i];
            largest = fmaxf(largest, fabsf(x[i]));
        }
    }
    largest = block_reduce<true>(largest);
    // 2^e with largest / 2^e in 8..16; a row of zeros, or one that is not finite, keeps factor 1.
    const int exponent = (int)(__float_as_uint(largest) >> 23 & 255);
    const bool plain = exponent < 20 || exponent > 250;
    const float factor = plain ? 1.0f : __uint_as_float((u32)(exponent - 3) << 23);
    const float inverse = plain ? 1.0f : __uint_as_float((u32)(257 - exponent) << 23);
    for (int pair = threadIdx.x; pair < width / 2; pair += blockDim.x)
        reinterpret_cast<u32*>(out)[pair] = to_half2(row[2 * pair] * inverse, row[2 * pair + 1] * inverse);
    if (threadIdx.x == 0) *scale = factor;
}

extern "C" __global__ void rotate_rows(const float* __restrict__ x, const signed char* __restrict__ signs,
                                       u16* __restrict__ out, float* __restrict__ scale, int width) {
    const float* input = x + (size_t)blockIdx.x * width;
    rotate_row(width, [=](int c) { return input[c] * signs[c]; }, out + (size_t)blockIdx.x * width, scale + blockIdx.x);
}

extern "C" __global__ void silu_mul_rotate_rows(const float* __restrict__ gate_up,
                                                const signed char* __restrict__ signs, u16* __restrict__ out,
                                                float* __restrict__ scale, int width) {
    const float* gate = gate_up + (size_t)blockIdx.x * 2 * width;
    const float* up = gate + width;
    rotate_row(
        width, [=](int c) { return gate[c] / (1.0f + __expf(-gate[c])) * up[c] * signs[c]; },
        out + (size_t)blockIdx.x * width, scale + blockIdx.x);
}

__device__ __forceinline__ void add_scaled(float4& x, float factor, float4 y) {
    x.x += factor * y.x, x.y += factor * y.y, x.z += factor * y.z, x.w += factor * y.w;
}

// hidden[t] += sum_i factors[t, i] rows[places[t, i]]. One block a token.
extern "C" __global__ void add_gathered_rows(float* __restrict__ hidden, const float* __restrict__ rows,
                                             const long long* __restrict__ places, const float* __restrict__ factors,
                                             int choices, int width) {
    float* state = hidden + (size_t)blockIdx.x * width;
    for (int c = 4 * threadIdx.x; c < width; c += 4 * blockDim.x) {
        float4 x = *reinterpret_cast<float4*>(state + c);
#pragma unroll 8
        for (int i = 0; i < choices; ++i) {
            const float* from = rows + (size_t)places[blockIdx.x * choices + i] * width;
            add_scaled(x, factors[blockIdx.x * choices + i], *reinterpret_cast<const float4*>(from + c));
        }
        *reinterpret_cast<float4*>(state + c) = x;
    }
}

// hidden += delta + sum_i weight_i expert_i; normed = rms_norm(hidden) norm_weight; out = rotated normed. One block a
// token. Null pointers: what is not there, not added, not wanted.
extern "C" __global__ void add_norm_rotate_rows(float* __restrict__ hidden, const float* __restrict__ delta,
                                                const float* __restrict__ expert_out,
                                                const float* __restrict__ expert_weights, int choices,
                                                const float* __restrict__ norm_weight, float eps,
                                                const signed char* __restrict__ signs, u16* __restrict__ out,
                                                float* __restrict__ scale, float* __restrict__ normed, int width) {
    const int token = blockIdx.x;
    extern __shared__ float row[];
    float* state = hidden + (size_t)token * width;
    float square = 0;
    // Four channels at a time, so that all loads of a thread are on their way together.
    for (int c = 4 * threadIdx.x; c < width; c += 4 * blockDim.x) {
        float4 x = *reinterpret_cast<float4*>(state + c);
        const float4* expert = reinterpret_cast<const float4*>(expert_out + (size_t)token * choices * width + c);
        if (delta) add_scaled(x, 1.0f, *reinterpret_cast<const float4*>(delta + (size_t)token * width + c));
        if (expert_out) {
#pragma unroll 8
            for (int i = 0; i < choices; ++i)
                add_scaled(x, expert_weights[token * choices + i], expert[(size_t)i * width / 4]);
        }
        if (delta || expert_out) *reinterpret_cast<float4*>(state + c) = x;
        *reinterpret_cast<float4*>(row + c) = x;
        square += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
    }
    const float factor = rsqrtf(block_reduce<false>(square) / width + eps);
    if (normed)
        for (int c = threadIdx.x; c < width; c += blockDim.x)
            normed[(size_t)token * width + c] = row[c] * factor * norm_weight[c];
    __syncthreads();
    // A warp reads and writes only its own segments of `row`.
    if (out)
        rotate_row(width, [=](int c) { return row[c] * factor * norm_weight[c] * signs[c]; },
                   out + (size_t)token * width, scale + token);
}

constexpr int kMost = (EXPERTS + 31) / 32;  // experts of a lane

// Floats as integers of the same order.
__device__ __forceinline__ u32 ordered(float x) {
    const u32 bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Router: a warp computes one logit; the last block of a token to finish takes softmax and top-k.
extern "C" __global__ void route_tokens(const float* __restrict__ normed, const float* __restrict__ router,
                                        const float* __restrict__ bias, float norm_min, int* __restrict__ selected,
                                        float* __restrict__ weights, float* __restrict__ logits,
                                        int* __restrict__ finished, int experts, int choices, int width) {
    const int lane = threadIdx.x & 31, token = blockIdx.y;
    const int expert = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    if (expert < experts) {
        const float* state = normed + (size_t)token * width;
        const float* row = router + (size_t)expert * width;
        float sum = 0;
#pragma unroll 10
        for (int c = 4 * lane; c < width; c += 128) {  // the width is a multiple of 16
            const float4 a = *reinterpret_cast<const float4*>(state + c), b = *reinterpret_cast<const float4*>(row + c);
            sum += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
        }
        sum = warp_sum(sum);
        if (lane == 0) logits[token * experts + expert] = sum;
    }
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(finished + token, 1) == (int)gridDim.x - 1;
    __syncthreads();
    if (!last || threadIdx.x >= 32) return;
    __threadfence();
    const volatile float* mine = logits + token * experts;
    float p[kMost], score[kMost];
    float largest = -3.4e38f, total = 0;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
        p[i] = lane + 32 * i < experts ? mine[lane + 32 * i] : -3.4e38f;
        largest = fmaxf(largest, p[i]);
    }
    largest = warp_max(largest);
#pragma unroll
    for (int i = 0; i < kMost; ++i) total += p[i] = lane + 32 * i < experts ? __expf(p[i] - largest) : 0;
    total = warp_sum(total);
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
        p[i] /= total;
        score[i] = lane + 32 * i < experts ? p[i] + bias[lane + 32 * i] : -3.4e38f;
    }
    float chosen_sum = 0;
    for (int choice = 0; choice < choices; ++choice) {
        float best = -3.4e38f, best_p = 0;
        int place = 1 << 20;
#pragma unroll
        for (int i = 0; i < kMost; ++i)
            if (score[i] > best) best = score[i], best_p = p[i], place = lane + 32 * i;
        // The highest score of the warp, and of equal ones the lowest expert.
        const u32 highest = __reduce_max_sync(0xffffffffu, ordered(best));
        const int chosen = __reduce_min_sync(0xffffffffu, ordered(best) == highest ? place : 1 << 20);
        best_p = __shfl_sync(0xffffffffu, best_p, chosen & 31);
        place = chosen;
#pragma unroll
        for (int i = 0; i < kMost; ++i)
            if (lane + 32 * i == place) score[i] = -3.4e38f;
        chosen_sum += best_p;
        if (lane == 0) selected[token * choices + choice] = place, weights[token * choices + choice] = best_p;
    }
    __syncwarp();
    if (lane < choices) weights[token * choices + lane] /= fmaxf(chosen_sum, norm_min);
    if (lane == 0) finished[token] = 0;  // for the next launch
}

extern "C" __global__ void advance_positions(int* position, int tokens) {
    if ((int)threadIdx.x < tokens) position[threadIdx.x] += 1;
}
