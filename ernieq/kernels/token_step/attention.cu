// Attention of one new token per sequence over a static cache, its keys divided among blocks.
//
// Constants: HEAD_DIM, a multiple of 16; GROUP query heads that share a key head. 16 lanes hold a key.
#include "half2.cuh"

constexpr int kWarps = 8;
constexpr int kDims = HEAD_DIM / 16;  // of a lane, neighbours; an even number
constexpr int kStreams = 2 * kWarps;  // half warps, each with its own running softmax
constexpr int kMergers = 8;
constexpr int kLeastShare = 2 * kStreams;  // keys of a block, before a second block is worth its merging

// Keys of a block when `length` keys are divided into at most `splits` parts.
__device__ __forceinline__ int keys_of_split(int length, int splits) {
    return max((length + splits - 1) / splits, kLeastShare);
}

__device__ __forceinline__ float half_warp_sum(float x) {
#pragma unroll
    for (int offset = 8; offset; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// Rotate the pairs (2i, 2i+1) of a lane's dims.
__device__ __forceinline__ void turn(float (&x)[kDims], const float* __restrict__ angles, int first) {
#pragma unroll
    for (int i = 0; i < kDims; i += 2) {
        const float cosine = angles[first + i], sine = angles[first + i + 1];
        const float even = x[i], odd = x[i + 1];
        x[i] = even * cosine - odd * sine;
        x[i + 1] = odd * cosine + even * sine;
    }
}

struct Running {
    float sum[GROUP][kDims], largest[GROUP], weight[GROUP];
};

// One key and value into the running softmax of every query head; all lanes of the warp take part.
__device__ __forceinline__ void attend_key(Running& run, const float (&query)[GROUP][kDims], const u32 (&key)[kDims / 2],
                                           const u32 (&value)[kDims / 2], bool valid) {
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        float score = 0;
#pragma unroll
        for (int i = 0; i < kDims / 2; ++i)
            score += query[g][2 * i] * low_float(key[i]) + query[g][2 * i + 1] * high_float(key[i]);
        score = half_warp_sum(score);
        if (!valid) score = -3.0e38f;
        const float before = run.largest[g];
        run.largest[g] = fmaxf(before, score);
        const float shrink = exp2f(before - run.largest[g]), p = valid ? exp2f(score - run.largest[g]) : 0;
        run.weight[g] = run.weight[g] * shrink + p;
#pragma unroll
        for (int i = 0; i < kDims / 2; ++i) {
            run.sum[g][2 * i] = run.sum[g][2 * i] * shrink + p * low_float(value[i]);
            run.sum[g][2 * i + 1] = run.sum[g][2 * i + 1] * shrink + p * high_float(value[i]);
        }
    }
}

__device__ __forceinline__ void load_row(u32 (&row)[kDims / 2], const u16* __restrict__ from) {
#pragma unroll
    for (int i = 0; i < kDims / 2; ++i) row[i] = reinterpret_cast<const u32*>(from)[i];
}

// qkv: (T, (heads + 2 kv_heads) HEAD_DIM). angles: (positions, HEAD_DIM / 2, 2) cosine and sine.
// keys, values: (T, kv_heads, max_tokens, HEAD_DIM) float16. Grid: (splits, kv_heads, T).
// workspace: (T, heads, splits, HEAD_DIM + 2): unnormalised sum, maximum, weight.
extern "C" __global__ void __launch_bounds__(32 * kWarps) attend_split(
    const float* __restrict__ qkv, const float* __restrict__ angles, u16* __restrict__ keys, u16* __restrict__ values,
    const int* __restrict__ position, float* __restrict__ workspace, int kv_heads, int max_tokens) {
    const int split = blockIdx.x, splits = gridDim.x, kv = blockIdx.y, token = blockIdx.z;
    const int heads = kv_heads * GROUP;
    const int lane = threadIdx.x & 15, stream = threadIdx.x >> 4, dim = lane * kDims;
    const int now = position[token], share = keys_of_split(now + 1, splits);
    const int first = split * share, stop = min(first + share, now);  // the new key comes by itself
    if (first > now) return;  // `attend_merge` does not read this split
    const float* input = qkv + (size_t)token * (heads + 2 * kv_heads) * HEAD_DIM;
    const float* turned = angles + (size_t)now * HEAD_DIM;
    const size_t cache = ((size_t)token * kv_heads + kv) * max_tokens * HEAD_DIM + dim;

    float query[GROUP][kDims];
    Running run = {};
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        run.largest[g] = -3.0e38f;
#pragma unroll
        for (int i = 0; i < kDims; ++i) query[g][i] = input[(kv * GROUP + g) * HEAD_DIM + dim + i];
        turn(query[g], turned, dim);
#pragma unroll
        for (int i = 0; i < kDims; ++i) query[g][i] *= rsqrtf((float)HEAD_DIM) * 1.4426950408889634f;
    }
    u32 key[kDims / 2] = {}, value[kDims / 2] = {};
    int at = first + stream;
    if (at < stop) load_row(key, keys + cache + (size_t)at * HEAD_DIM), load_row(value, values + cache + (size_t)at * HEAD_DIM);
    for (int pair = first + (stream & ~1); pair < stop; pair += kStreams) {  // both halves of a warp go along
        u32 next_key[kDims / 2] = {}, next_value[kDims / 2] = {};
        const int next = at + kStreams;
        if (next < stop) {
            load_row(next_key, keys + cache + (size_t)next * HEAD_DIM);
            load_row(next_value, values + cache + (size_t)next * HEAD_DIM);
        }
        attend_key(run, query, key, value, at < stop);
#pragma unroll
        for (int i = 0; i < kDims / 2; ++i) key[i] = next_key[i], value[i] = next_value[i];
        at = next;
    }
    if (now < first + share && stream < 2) {  // the first warp of the last split: the new token itself
        float new_key[kDims];
#pragma unroll
        for (int i = 0; i < kDims; ++i) new_key[i] = input[(heads + kv) * HEAD_DIM + dim + i];
        turn(new_key, turned, dim);
        const float* new_value = input + (heads + kv_heads + kv) * HEAD_DIM + dim;
#pragma unroll
        for (int i = 0; i < kDims / 2; ++i) {
            key[i] = to_half2(new_key[2 * i], new_key[2 * i + 1]);
            value[i] = to_half2(new_value[2 * i], new_value[2 * i + 1]);
            if (stream == 0) {
                reinterpret_cast<u32*>(keys + cache + (size_t)now * HEAD_DIM)[i] = key[i];
                reinterpret_cast<u32*>(values + cache + (size_t)now * HEAD_DIM)[i] = value[i];
            }
        }
        attend_key(run, query, key, value, stream == 0);
    }
    __shared__ float shared_sum[kStreams][HEAD_DIM], shared_largest[kStreams], shared_weight[kStreams];
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kDims; ++i) shared_sum[stream][dim + i] = run.sum[g][i];
        if (lane == 0) shared_largest[stream] = run.largest[g], shared_weight[stream] = run.weight[g];
        __syncthreads();
        float* out = workspace + (((size_t)token * heads + kv * GROUP + g) * splits + split) * (HEAD_DIM + 2);
        float top = -3.0e38f, total = 0;
#pragma unroll
        for (int s = 0; s < kStreams; ++s) top = fmaxf(top, shared_largest[s]);
#pragma unroll
        for (int s = 0; s < kStreams; ++s) total += shared_weight[s] * exp2f(shared_largest[s] - top);
        for (int d = threadIdx.x; d < HEAD_DIM; d += 32 * kWarps) {
            float x = 0;
#pragma unroll
            for (int s = 0; s < kStreams; ++s) x += shared_sum[s][d] * exp2f(shared_largest[s] - top);
            out[d] = x;
        }
        if (threadIdx.x == 0) out[HEAD_DIM] = top, out[HEAD_DIM + 1] = total;
    }
}

// Join the splits: (T, heads, splits, HEAD_DIM + 2) -> (T, heads, HEAD_DIM). Grid: (heads, T); kMergers threads for
// each channel take every kMergers-th split.
extern "C" __global__ void __launch_bounds__(HEAD_DIM * kMergers) attend_merge(const float* __restrict__ workspace,
                                                                               const int* __restrict__ position,
                                                                               float* __restrict__ context,
                                                                               int splits) {
    __shared__ float sums[kMergers][HEAD_DIM], tops[kMergers], weights[kMergers];
    const int merger = threadIdx.x / HEAD_DIM, channel = threadIdx.x % HEAD_DIM;
    const int length = position[blockIdx.y] + 1, share = keys_of_split(length, splits);
    const int used = (length + share - 1) / share;
    const size_t row = (size_t)blockIdx.y * gridDim.x + blockIdx.x;
    const float* parts = workspace + row * splits * (HEAD_DIM + 2);
    float top = -3.0e38f, weight = 0, x = 0;
#pragma unroll 4
    for (int s = merger; s < used; s += kMergers) {
        const float* part = parts + s * (HEAD_DIM + 2);
        const float part_x = part[channel], part_top = part[HEAD_DIM], part_weight = part[HEAD_DIM + 1];
        const float before = top;
        top = fmaxf(top, part_top);
        const float shrink = exp2f(before - top), factor = exp2f(part_top - top);
        weight = weight * shrink + part_weight * factor;
        x = x * shrink + part_x * factor;
    }
    sums[merger][channel] = x;
    if (channel == 0) tops[merger] = top, weights[merger] = weight;
    __syncthreads();
    if (merger) return;
    float highest = top, total = 0, sum = 0;
#pragma unroll
    for (int m = 1; m < kMergers; ++m) highest = fmaxf(highest, tops[m]);
#pragma unroll
    for (int m = 0; m < kMergers; ++m) {
        const float factor = exp2f(tops[m] - highest);
        total += weights[m] * factor;
        sum += sums[m][channel] * factor;
    }
    context[row * HEAD_DIM + channel] = sum / total;
}
