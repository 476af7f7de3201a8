// Viterbi search on the GPU: two tiles a block, one in each half of a register, all nodes of a step in shared memory.
//
// Constants: SHIFT_EVEN and SHIFT_ODD, the bits that weights of even and odd number shift in (equal, or the second
// one more), L state bits, VALUES codebook values a thread holds in registers, DOUBLE_BUFFER 1 if shared memory holds
// the metrics before and after a step side by side (one barrier a step in place of two).
// README.md beside this says which arithmetic it is, why each thread keeps its share of the codebook, and which.
#include "half2.cuh"

constexpr bool kAlternates = SHIFT_EVEN != SHIFT_ODD;
constexpr int kThreads = (1 << L) / VALUES;
constexpr int kTops = 1 << SHIFT_ODD;                            // top parts of a state
constexpr int kHeld = kTops < VALUES ? kTops : VALUES;           // top parts that a thread holds of a low part
constexpr int kParts = kTops / kHeld;                            // neighbouring threads that share low parts
constexpr int kLows = VALUES / kHeld;                            // low parts of L - SHIFT_ODD bits that a thread holds
constexpr int kGroups = kLows > kHeld ? kLows / kHeld : 1;       // groups of low parts with the same sources
constexpr int kRun = kLows / kGroups;                            // neighbouring low parts of a group
constexpr int kKept = kThreads / kParts;                         // threads that store decisions
constexpr int kNodesEven = 1 << (L - SHIFT_EVEN);                // nodes before a weight of even number
constexpr int kNodesOdd = 1 << (L - SHIFT_ODD);
constexpr u32 kInfinity = 0x7c00;

// What the threads that share a node read is kept one word further apart, or it would lie in the same bank.
constexpr int kSourcesOfPart = kParts > 1 ? kHeld << (L - 2 * SHIFT_ODD) : 1;
constexpr int kPadding = kParts > 1 ? kParts : 0;
__device__ __forceinline__ int place(int node) { return kParts > 1 ? node + node / kSourcesOfPart : node; }

// Where the metrics before a weight of odd number lie. One buffer is enough for both kinds if shifts alternate: the
// fewer metrics lie in its second half, and what a step puts into the first half overwrites nothing that it reads.
constexpr int kOddOffset = DOUBLE_BUFFER ? kNodesEven + kPadding : kAlternates ? kNodesOdd : 0;

// What a thread decides in a step that drops DROPPED bits, and how it is stored: each half of a word is for a tile.
template <int DROPPED>
struct Decisions {
    static constexpr int kOutputs = kLows << (SHIFT_ODD - DROPPED);
    static constexpr int kBits = DROPPED <= 2 ? DROPPED : DROPPED <= 4 ? 4 : DROPPED == 5 ? 8 : 16;
    static constexpr int kPerWord = 16 / kBits;
    static constexpr int kWords = (kOutputs + kPerWord - 1) / kPerWord;
};
constexpr int kWords = Decisions<SHIFT_EVEN>::kWords > Decisions<SHIFT_ODD>::kWords ? Decisions<SHIFT_EVEN>::kWords
                                                                                    : Decisions<SHIFT_ODD>::kWords;

__device__ __forceinline__ int low_part(int thread, int group) {
    return kGroups > 1 ? (thread + kThreads * group) << SHIFT_ODD : thread / kParts * kLows;
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

// The better of the candidates that neighbouring threads found for one node; of equals the lower part's.
__device__ __forceinline__ void join_parts(int part, half2_bits& best, u32& choice) {
#pragma unroll
    for (int apart = 1; apart < kParts; apart *= 2) {
        const half2_bits other = __shfl_xor_sync(0xffffffffu, best, apart);
        const u32 other_choice = __shfl_xor_sync(0xffffffffu, choice, apart);
        const bool upper = part & apart;
        const u32 mask = upper ? less2(best, other) : less2(other, best);  // where the upper part is better
        choice = upper ? (other_choice & ~mask) | (choice & mask) : (choice & ~mask) | (other_choice & mask);
        best = min2(best, other);
    }
}

// One weight, which shifts in IN bits; the next one shifts in OUT. values: [low part][top part / 2], even top part in
// the low half. Nodes are a low part below the top SHIFT_ODD - OUT bits, which are the low ones of a top part.
// Stores decisions from step `keep_from` on, and the least metric of every warp after each sixteen steps: the next
// step, which is even, subtracts the least of them (renormalise).
template <int IN, int OUT>
__device__ __forceinline__ void advance(const u32 (&values)[VALUES / 2], const u32* source, u32* target,
                                        half2_bits minus_x, bool renormalise, half2_bits lowest, int step,
                                        int keep_from, u32* survivor, u32* warp_min) {
    using Stored = Decisions<OUT>;
    constexpr int kHighs = 1 << (SHIFT_ODD - OUT);
    constexpr int kSources = kRun >> IN > 1 ? kRun >> IN : 1;  // neighbouring sources of a run
    const int thread = threadIdx.x, part = kParts > 1 ? thread % kParts : 0;
    const bool keeps = kParts == 1 || part == 0;
    u32 words[Stored::kWords] = {};
    half2_bits results[Stored::kOutputs];
#pragma unroll
    for (int run = 0; run < kHighs * kGroups; ++run) {
        const int high = run / kGroups, group = run % kGroups;
        const int node = high << (L - SHIFT_ODD) | low_part(thread, group);
        const u32* inherited = source + (node >> IN) + part * (kSourcesOfPart + 1);
        u32 choice[kRun];
        half2_bits best[kRun];
#pragma unroll
        for (int dropped = 0; dropped < kHeld / kHighs; ++dropped) {
            half2_bits before[kSources];
#pragma unroll
            for (int i = 0; i < kSources; ++i) {
                before[i] = inherited[(dropped << (L - IN - OUT)) + i];
                if (IN == SHIFT_EVEN && renormalise) before[i] = sub2(before[i], lowest);
            }
#pragma unroll
            for (int o = 0; o < kRun; ++o) {
                const int top = dropped * kHighs + high;
                const u32 packed = values[((group * kRun + o) * kHeld + top) / 2];
                const half2_bits difference = top & 1 ? add2_high(packed, minus_x) : add2_low(packed, minus_x);
                const half2_bits candidate = fma2(difference, difference, before[kSources > 1 ? o >> IN : 0]);
                if (dropped == 0) {
                    best[o] = candidate, choice[o] = 0;
                } else {
                    const u32 mask = less2(candidate, best[o]);
                    choice[o] = (choice[o] & ~mask) | (mask & (dropped * 0x10001u));
                    best[o] = min2(candidate, best[o]);
                }
            }
        }
        if (kParts > 1) {
            choice[0] += part * kHeld * 0x10001u;
            join_parts(part, best[0], choice[0]);
        }
#pragma unroll
        for (int o = 0; o < kRun; ++o) {
            const int output = run * kRun + o;
            words[output / Stored::kPerWord] += choice[o] << (output % Stored::kPerWord * Stored::kBits);
            results[output] = best[o];
        }
        if (DOUBLE_BUFFER || high < kHighs - 1) {
#pragma unroll
            for (int o = 0; o < kRun; ++o)
                if (keeps) target[place(node + o)] = best[o];
        }
    }
    if (!DOUBLE_BUFFER) {
        __syncthreads();
#pragma unroll
        for (int output = (kHighs - 1) * kLows; output < kHighs * kLows; ++output) {
            const int node = (kHighs - 1) << (L - SHIFT_ODD) | low_part(thread, output % kLows / kRun);
            if (keeps) target[place(node + output % kRun)] = results[output];
        }
    }
    if (step >= keep_from && keeps) {
#pragma unroll
        for (int word = 0; word < Stored::kWords; ++word) survivor[word * kKept] = words[word];
    }
    if (IN == SHIFT_ODD && step % 16 == 15) {  // read again, as registers are few
        half2_bits minimum = kInfinity | kInfinity << 16;
#pragma unroll
        for (int output = 0; output < Stored::kOutputs; ++output) {
            const int run = output / kRun;
            const int node = (run / kGroups) << (L - SHIFT_ODD) | low_part(thread, run % kGroups);
            if (keeps) minimum = min2(minimum, target[place(node + output % kRun)]);
        }
        minimum = shuffle_min(minimum);
        if ((thread & 31) == 0) warp_min[thread >> 5] = minimum;
    }
}

// targets: (pairs, 256) words, a word holding the negated targets of both tiles at a weight, in units of 64 values.
// Runs over weights (first + i) % 256, i < steps, both numbers even. start: (2 pairs,) node before the first weight, or null for any.
// survivors: (pairs, kept steps, kWords, kKept); decisions of the steps from `keep_from` on.
// best_node: (2 pairs,) node of least metric after the last weight (the lowest of equals), or null.
extern "C" __global__ void __launch_bounds__(kThreads) viterbi_forward(
    const u32* __restrict__ targets, const int* __restrict__ start, u32* __restrict__ survivors,
    int* __restrict__ best_node, float* __restrict__ best_metric, int first, int steps, int keep_from) {
    extern __shared__ __align__(16) u32 metrics[];
    __shared__ u32 sequence[256];
    __shared__ u32 warp_min[32];
    const int thread = threadIdx.x, pair = blockIdx.x;

    u32 values[VALUES / 2];
#pragma unroll
    for (int i = 0; i < VALUES / 2; ++i) {
        const int low = i / (kHeld / 2), top = 2 * (i % (kHeld / 2)) + (kParts > 1 ? thread % kParts * kHeld : 0);
        const u32 node = low_part(thread, low / kRun) + low % kRun;
        values[i] = to_half2(state_value(node | top << (L - SHIFT_ODD)),
                             state_value(node | (top + 1) << (L - SHIFT_ODD)));
    }
    for (int i = thread; i < steps; i += kThreads) sequence[i] = targets[pair * 256 + ((first + i) & 255)];
    const int start_low = start ? start[2 * pair] : 0, start_high = start ? start[2 * pair + 1] : 0;
    for (int node = thread; node < kNodesEven; node += kThreads) {
        u32 low = 0, high = 0;
        if (start) low = node == start_low ? 0 : kInfinity, high = node == start_high ? 0 : kInfinity;
        metrics[place(node)] = low | high << 16;
    }
    if (thread < 32) warp_min[thread] = kInfinity | kInfinity << 16;
    __syncthreads();

    u32* survivor = survivors + (size_t)pair * (steps - keep_from) * kWords * kKept + thread / kParts;
    u32* source = metrics;
    u32* target = metrics + kOddOffset;
    for (int step = 0; step < steps; ++step) {
        const half2_bits minus_x = sequence[step];
        const bool renormalise = step && step % 16 == 0;
        const half2_bits lowest = renormalise ? shuffle_min(warp_min[thread & 31]) : 0;
        if (kAlternates && step & 1) {
            advance<SHIFT_ODD, SHIFT_EVEN>(values, metrics + kOddOffset, metrics, minus_x, renormalise, lowest, step,
                                           keep_from, survivor, warp_min);
        } else if (kAlternates) {
            advance<SHIFT_EVEN, SHIFT_ODD>(values, metrics, metrics + kOddOffset, minus_x, renormalise, lowest, step,
                                           keep_from, survivor, warp_min);
        } else {
            advance<SHIFT_EVEN, SHIFT_ODD>(values, source, target, minus_x, renormalise, lowest, step, keep_from,
                                           survivor, warp_min);
        }
        if (step >= keep_from) survivor += kWords * kKept;
        __syncthreads();
        if (DOUBLE_BUFFER && !kAlternates) {
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
#pragma unroll 4
    for (int node = thread; node < kNodesEven; node += kThreads) {
        const u32 metric = metrics[place(node)];
        low = min(low, (metric & 0xffff) << 16 | node);
        high = min(high, (metric >> 16) << 16 | node);
    }
    atomicMin(&lowest_key[0], low);
    atomicMin(&lowest_key[1], high);
    __syncthreads();
    if (thread < 2) {
        best_node[2 * pair + thread] = lowest_key[thread] & 0xffff;
        if (best_metric) best_metric[2 * pair + thread] = low_float(lowest_key[thread] >> 16);
    }
}

// From the node after a weight that shifts in IN bits, before one that shifts in OUT, to the node before it.
// decisions: (kWords, kKept) of that weight; those of an odd tile lie 16 bits higher.
template <int IN, int OUT>
__device__ __forceinline__ u32 step_back(u32 node, const u32* __restrict__ decisions, int shift_of_tile) {
    using Stored = Decisions<OUT>;
    const u32 low = node & (kNodesOdd - 1);
    u32 thread, place_in_thread;
    if (kGroups > 1) {
        const u32 run = low >> SHIFT_ODD;
        thread = run % kThreads;
        place_in_thread = run / kThreads * kRun + (low & (kRun - 1));
    } else {
        thread = low / kLows;
        place_in_thread = low % kLows;
    }
    const u32 output = (node >> (L - SHIFT_ODD)) * kLows + place_in_thread;
    const u32 word = decisions[output / Stored::kPerWord * kKept + thread];
    const u32 dropped = word >> (shift_of_tile + output % Stored::kPerWord * Stored::kBits) & ((1 << OUT) - 1);
    return (node | dropped << (L - OUT)) >> IN;
}

// One thread a tile follows the decisions back over `steps` weights, from number `steps` - 1 to 0, from node `last`
// (2 pairs,), writes the node before them to `boundary` (may be null) and the symbols passed to `symbols` (2 pairs,
// 256) (may be null).
extern "C" __global__ void viterbi_trace_back(const u32* __restrict__ survivors, const int* __restrict__ last,
                                              int* __restrict__ boundary, u8* __restrict__ symbols, int tiles,
                                              int steps) {
    const int tile = blockIdx.x * blockDim.x + threadIdx.x;
    if (tile >= tiles) return;
    const u32* survivor = survivors + (size_t)(tile / 2) * steps * kWords * kKept;
    const int shift_of_tile = 16 * (tile & 1);
    u32 node = last[tile];
    for (int step = steps - 1; step >= 0; --step) {
        const u32* decisions = survivor + (size_t)step * kWords * kKept;
        const bool odd = kAlternates && step & 1;
        if (symbols) symbols[tile * 256 + step] = node & ((1 << (odd ? SHIFT_ODD : SHIFT_EVEN)) - 1);
        node = odd ? step_back<SHIFT_ODD, SHIFT_EVEN>(node, decisions, shift_of_tile)
                   : step_back<SHIFT_EVEN, SHIFT_ODD>(node, decisions, shift_of_tile);
    }
    if (boundary) boundary[tile] = node;
}
