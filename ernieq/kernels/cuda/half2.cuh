// Pairs of float16 in one register, and the few instructions on them that the kernels use.
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using half2_bits = u32;  // low half first

__device__ __forceinline__ half2_bits sub2(half2_bits a, half2_bits b) {
    half2_bits d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
__device__ __forceinline__ half2_bits fma2(half2_bits a, half2_bits b, half2_bits c) {
    half2_bits d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
__device__ __forceinline__ half2_bits min2(half2_bits a, half2_bits b) {
    half2_bits d;
    asm("min.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
// 0xffff in each half where a < b, else 0.
__device__ __forceinline__ u32 less2(half2_bits a, half2_bits b) {
    u32 mask;
    asm("set.lt.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(a), "r"(b));
    return mask;
}
// Add one half of `pair` to both halves of b. One instruction with an operand modifier: the broadcast must not be
// an expression of its own, or the compiler keeps a register for each where it does not change in a loop.
__device__ __forceinline__ half2_bits add2_low(u32 pair, half2_bits b) {
    half2_bits d;
    asm("{ .reg .f16 l, h; .reg .b32 p; mov.b32 {l, h}, %1; mov.b32 p, {l, l}; add.rn.f16x2 %0, p, %2; }"
        : "=r"(d) : "r"(pair), "r"(b));
    return d;
}
__device__ __forceinline__ half2_bits add2_high(u32 pair, half2_bits b) {
    half2_bits d;
    asm("{ .reg .f16 l, h; .reg .b32 p; mov.b32 {l, h}, %1; mov.b32 p, {h, h}; add.rn.f16x2 %0, p, %2; }"
        : "=r"(d) : "r"(pair), "r"(b));
    return d;
}
// Two float32 to float16, nearest even; `low` goes to the low half.
__device__ __forceinline__ half2_bits to_half2(float low, float high) {
    half2_bits d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
__device__ __forceinline__ float low_float(half2_bits a) {
    float f;
    asm("{ .reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(f) : "r"(a));
    return f;
}
__device__ __forceinline__ float high_float(half2_bits a) {
    float f;
    asm("{ .reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(f) : "r"(a));
    return f;
}
