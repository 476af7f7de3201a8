// Viterbi search on the GPU: two tiles a block, one in each half of a register, all nodes of a step in shared memory.
//
// Constants: K bits a weight, L state bits, VALUES codebook values a thread holds in registers,
// DOUBLE_BUFFER 1 if shared memory holds the metrics twice (one barrier a step in place of two).
// README.md beside this says which arithmetic it is and why each thread keeps its share of the codebook.
#include "half2.cuh"

constexpr int kSymbols = 1 << K;
constexpr int kNodes = 1 << (L - K);
constexpr int kThreads = (1 << L) / VALUES;
constexpr int kOutputs = VALUES / kSymbols;                            // nodes that a thread updates
constexpr int kGroups = kOutputs > kSymbols ? kOutputs / kSymbols : 1;  // groups of nodes with the same sources
constexpr int kPerGroup = kOutputs / kGroups;
constexpr int kField = K == 2 ? 2 : K <= 4 ? 4 : K == 5 ? 8 : 16;       // bits of a stored decision
constexpr int kFieldsPerWord = 16 / kField;                            // in each half of a word
constexpr int kWords = (kOutputs + kFieldsPerWord - 1) / kFieldsPerWord;
constexpr u32 kInfinity = 0x7c00;

__device__ __forceinline__ int group_source(int thread, int group) {
    return kGroups > 1 ? thread + kThreads * group : (thread * kOutputs) >> K;
}
__device__ __forceinline__ int first_node(int thread, int group) {
    return kGroups > 1 ? (thread + kThreads * group) << K : thread * kOutputs;
}
// (sum of the bytes of 0x83DCD12D * state) - 510, divided by 64, as float16 (exact).
__device__ __forceinline__ float state_value(u32 state) {
    return (float)__dp4a(0x83DCD12Du * state, 0x01010101u, 0u) * 0.015625f - 7.96875f;
}

__device__ __forceinline__ half2_bits shuffle_min(half2_bits x) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) x = min2(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

// targets: (pairs, 256) words, a word holding the negated targets of both tiles at a weight, in units of 64 values.
// Runs over weights (first + i) % 256, i < steps. start: (2 pairs,) node before the first weight, or null for any.
// survivors: (pairs, kept steps, kWords, kThreads); decisions of the steps from `keep_from` on.
// best_node: (2 pairs,) node of least metric after the last weight (the lowest of equals), or null.
extern "C" __global__ void __launch_bounds__(kThreads) viterbi_forward(
    const u32* __restrict__ targets, const int* __restrict__ start, u32* __restrict__ survivors,
    int* __restrict__ best_node, float* __restrict__ best_metric, int first, int steps, int keep_from) {
    extern __shared__ u32 metrics[];  // (1 or 2, kNodes)
    __shared__ u32 sequence[256];
    __shared__ u32 warp_min[32];
    const int thread = threadIdx.x, pair = blockIdx.x;

    u32 values[VALUES / 2];  // [group][output][dropped bits / 2], even dropped bits in the low half
#pragma unroll
    for (int i = 0; i < VALUES / 2; ++i) {
        const int output = i / (kSymbols / 2), dropped = 2 * (i % (kSymbols / 2));
        const u32 node = first_node(thread, output / kPerGroup) + output % kPerGroup;
        values[i] = to_half2(state_value(node | dropped << (L - K)), state_value(node | (dropped + 1) << (L - K)));
    }
    for (int i = thread; i < steps; i += kThreads) sequence[i] = targets[pair * 256 + ((first + i) & 255)];
    const int start_low = start ? start[2 * pair] : 0, start_high = start ? start[2 * pair + 1] : 0;
    for (int node = thread; node < kNodes; node += kThreads) {
        u32 low = 0, high = 0;
        if (start) low = node == start_low ? 0 : kInfinity, high = node == start_high ? 0 : kInfinity;
        metrics[node] = low | high << 16;
    }
    if (thread < 32) warp_min[thread] = kInfinity | kInfinity << 16;
    __syncthreads();

    u32* survivor = survivors + (size_t)pair * (steps - keep_from) * kWords * kThreads + thread;
    u32* source = metrics;
    u32* target = metrics + (DOUBLE_BUFFER ? kNodes : 0);
    for (int step = 0; step < steps; ++step) {
        const half2_bits minus_x = sequence[step];
        const bool renormalise = step && step % 16 == 0;
        const half2_bits lowest = renormalise ? shuffle_min(warp_min[thread & 31]) : 0;
        u32 words[kWords] = {};
        half2_bits results[kOutputs];
        half2_bits minimum = kInfinity | kInfinity << 16;
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            const u32* inherited = source + group_source(thread, group);
            u32 choice[kPerGroup];
            half2_bits best[kPerGroup];
#pragma unroll
            for (int dropped = 0; dropped < kSymbols; ++dropped) {
                half2_bits before = inherited[dropped << (L - 2 * K)];
                if (renormalise) before = sub2(before, lowest);
#pragma unroll
                for (int o = 0; o < kPerGroup; ++o) {
                    const u32 packed = values[((group * kPerGroup + o) * kSymbols + dropped) / 2];
                    const half2_bits difference =
                        dropped & 1 ? add2_high(packed, minus_x) : add2_low(packed, minus_x);
                    const half2_bits candidate = fma2(difference, difference, before);
                    if (dropped == 0) {
                        best[o] = candidate, choice[o] = 0;
                    } else {
                        const u32 mask = less2(candidate, best[o]);
                        choice[o] = (choice[o] & ~mask) | (mask & (dropped * 0x10001u));
                        best[o] = min2(candidate, best[o]);
                    }
                }
            }
#pragma unroll
            for (int o = 0; o < kPerGroup; ++o) {
                const int output = group * kPerGroup + o;
                words[output / kFieldsPerWord] += choice[o] << (output % kFieldsPerWord * kField);
                results[output] = best[o];
            }
            if (DOUBLE_BUFFER) {
                u32* node = target + first_node(thread, group);
#pragma unroll
                for (int o = 0; o < kPerGroup; ++o) node[o] = best[o];
            }
        }
        if (!DOUBLE_BUFFER) {
            __syncthreads();
#pragma unroll
            for (int output = 0; output < kOutputs; ++output)
                target[first_node(thread, output / kPerGroup) + output % kPerGroup] = results[output];
        }
        if (step >= keep_from) {
#pragma unroll
            for (int word = 0; word < kWords; ++word) survivor[word * kThreads] = words[word];
            survivor += kWords * kThreads;
        }
        if (step % 16 == 15) {  // the least metric, for the renormalisation of the next step
#pragma unroll
            for (int output = 0; output < kOutputs; ++output) minimum = min2(minimum, results[output]);
            minimum = shuffle_min(minimum);
            if ((thread & 31) == 0) warp_min[thread >> 5] = minimum;
        }
        __syncthreads();
        if (DOUBLE_BUFFER) {
            u32* other = source;
            source = target;
            target = other;
        }
    }
    if (!best_node) return;
    // Metrics are not negative, so their bits order as integers; the node breaks ties.
    __shared__ u32 lowest_key[2];
    if (thread < 2) lowest_key[thread] = 0xffffffffu;
    __syncthreads();
    u32 low = 0xffffffffu, high = 0xffffffffu;
    for (int node = thread; node < kNodes; node += kThreads) {
        low = min(low, (source[node] & 0xffff) << 14 | node);
        high = min(high, (source[node] >> 16) << 14 | node);
    }
    atomicMin(&lowest_key[0], low);
    atomicMin(&lowest_key[1], high);
    __syncthreads();
    if (thread < 2) {
        best_node[2 * pair + thread] = lowest_key[thread] & 0x3fff;
        if (best_metric) best_metric[2 * pair + thread] = low_float(lowest_key[thread] >> 14);
    }
}

// One thread a tile follows the decisions back over `steps` steps from `last` (2 pairs,), writes the node before
// them to `boundary` (may be null) and the symbols passed to `symbols` (2 pairs, 256) (may be null).
extern "C" __global__ void viterbi_trace_back(const u32* __restrict__ survivors, const int* __restrict__ last,
                                              int* __restrict__ boundary, u8* __restrict__ symbols, int tiles,
                                              int steps) {
    const int tile = blockIdx.x * blockDim.x + threadIdx.x;
    if (tile >= tiles) return;
    const u32* survivor = survivors + (size_t)(tile / 2) * steps * kWords * kThreads;
    const int shift_of_tile = 16 * (tile & 1);
    u32 node = last[tile];
    for (int step = steps - 1; step >= 0; --step) {
        int thread, output;
        if (kGroups > 1) {
            const u32 source = node >> K;
            thread = source % kThreads;
            output = source / kThreads * kPerGroup + (node & (kSymbols - 1));
        } else {
            thread = node / kOutputs;
            output = node % kOutputs;
        }
        const u32 word = survivor[((size_t)step * kWords + output / kFieldsPerWord) * kThreads + thread];
        const u32 dropped = word >> (shift_of_tile + output % kFieldsPerWord * kField) & (kSymbols - 1);
        if (symbols) symbols[tile * 256 + step] = node & (kSymbols - 1);
        node = (node | dropped << (L - K)) >> K;
    }
    if (boundary) boundary[tile] = node;
}
