// CUDA C++ as a processor sees it: enough of the language and of the intrinsics to run a kernel's source on the host.
//
// The threads of a block are fibers that take turns; a barrier (or a shuffle, which the kernels only do with whole
// blocks) hands over to the next one, so that all have arrived when the first one goes on. Blocks run in turn.
// Pairs of float16 are computed one by one, each operation rounded once.
#include <cstdint>
#include <cstring>
#include <ucontext.h>
#include <vector>

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using half2_bits = u32;

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) alignas(n)

struct Index {
    unsigned x = 0, y = 0, z = 0;
};
static Index threadIdx, blockIdx, blockDim;

namespace fibers {
constexpr int kStackBytes = 1 << 16;
static std::vector<ucontext_t> contexts;
static ucontext_t outside;
static std::vector<u32> slots[2];
static unsigned exchanges[1024];  // of each thread
static int current;

inline void next() {
    const int from = current;
    current = (current + 1) % (int)contexts.size();
    threadIdx.x = current;
    if (current != from) swapcontext(&contexts[from], &contexts[current]);
}
template <typename Kernel>
void run_block(int threads, Kernel kernel) {
    static Kernel* body;
    body = &kernel;
    std::vector<u8> stacks((size_t)threads * kStackBytes);
    contexts.assign(threads, {});
    for (auto& slot : slots) slot.assign(threads, 0);
    std::memset(exchanges, 0, sizeof exchanges);
    for (int i = 0; i < threads; ++i) {
        getcontext(&contexts[i]);
        contexts[i].uc_stack.ss_sp = stacks.data() + (size_t)i * kStackBytes;
        contexts[i].uc_stack.ss_size = kStackBytes;
        // Threads end in the order in which they began: each starts or goes on with the next, the last leaves.
        contexts[i].uc_link = i + 1 < threads ? &contexts[i + 1] : &outside;
        makecontext(&contexts[i], +[] {
            (*body)();
            current += 1;
            threadIdx.x = current;
        }, 0);
    }
    current = 0;
    threadIdx.x = 0;
    blockDim.x = threads;
    swapcontext(&outside, &contexts[0]);
}
}  // namespace fibers

inline void __syncthreads() { fibers::next(); }
inline u32 __shfl_xor_sync(u32, u32 value, int apart) {
    const unsigned turn = fibers::exchanges[threadIdx.x]++ & 1;
    fibers::slots[turn][threadIdx.x] = value;
    fibers::next();
    return fibers::slots[turn][threadIdx.x ^ apart];
}
inline u32 atomicMin(u32* place, u32 value) {
    const u32 before = *place;
    if (value < before) *place = value;
    return before;
}
inline u32 min(u32 a, u32 b) { return a < b ? a : b; }
inline u32 __dp4a(u32 a, u32 b, u32 sum) {
    for (int i = 0; i < 32; i += 8) sum += (a >> i & 255) * (b >> i & 255);
    return sum;
}
inline u32 __funnelshift_r(u32 low, u32 high, u32 shift) {
    return (u32)(((u64)high << 32 | low) >> (shift & 31));
}
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
    u32 result = 0;
    for (int i = 0; i < 4; ++i) result |= (u32)((((u64)b << 32 | a) >> (8 * (selector >> (4 * i) & 7))) & 255) << (8 * i);
    return result;
}

inline double half_at(u32 pair, int place) {
    const u16 bits = (u16)(pair >> (16 * place));
    _Float16 number;
    std::memcpy(&number, &bits, 2);
    return (double)number;
}
inline u32 half_bits(double number) {
    const _Float16 rounded = (_Float16)number;
    u16 bits;
    std::memcpy(&bits, &rounded, 2);
    return bits;
}
// Sums and squares of float16 numbers are exact in float64, so that each result here is rounded once.
template <typename Operation>
inline half2_bits both(Operation operation) {
    return half_bits(operation(0)) | half_bits(operation(1)) << 16;
}
inline half2_bits sub2(half2_bits a, half2_bits b) {
    return both([=](int i) { return half_at(a, i) - half_at(b, i); });
}
inline half2_bits fma2(half2_bits a, half2_bits b, half2_bits c) {
    return both([=](int i) { return half_at(a, i) * half_at(b, i) + half_at(c, i); });
}
inline half2_bits min2(half2_bits a, half2_bits b) {
    return both([=](int i) { return half_at(a, i) < half_at(b, i) ? half_at(a, i) : half_at(b, i); });
}
inline u32 less2(half2_bits a, half2_bits b) {
    return (half_at(a, 0) < half_at(b, 0) ? 0xffffu : 0) | (half_at(a, 1) < half_at(b, 1) ? 0xffff0000u : 0);
}
inline half2_bits add2_low(u32 pair, half2_bits b) {
    return both([=](int i) { return half_at(pair, 0) + half_at(b, i); });
}
inline half2_bits add2_high(u32 pair, half2_bits b) {
    return both([=](int i) { return half_at(pair, 1) + half_at(b, i); });
}
inline half2_bits to_half2(float low, float high) { return half_bits(low) | half_bits(high) << 16; }
inline float low_float(half2_bits a) { return (float)half_at(a, 0); }
inline float high_float(half2_bits a) { return (float)half_at(a, 1); }
