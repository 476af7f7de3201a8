// AVX2: 16 nodes a vector, decisions as byte masks (two bits a node).
#include <immintrin.h>

#include "search.inl"

namespace ernieq::viterbi {
namespace {

struct Avx2 {
    using Vector = __m256i;
    static constexpr int kLanes = kLanesAvx2;
    static constexpr int kMaskStride = 2;

    static Vector load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static void store(void* p, Vector v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
    static Vector broadcast(int16_t x) { return _mm256_set1_epi16(x); }
    static Vector add(Vector a, Vector b) { return _mm256_add_epi16(a, b); }
    static Vector add_saturated(Vector a, Vector b) { return _mm256_adds_epi16(a, b); }
    static Vector subtract(Vector a, Vector b) { return _mm256_sub_epi16(a, b); }
    static Vector square(Vector a) { return _mm256_mulhrs_epi16(a, a); }
    static Vector minimum(Vector a, Vector b) { return _mm256_min_epu16(a, b); }
    // AVX2 has no unsigned comparison: a < b unless max(a, b) is a.
    static uint32_t less(Vector a, Vector b) {
        return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi16(_mm256_max_epu16(a, b), a)));
    }

    // Node lane i of a vector descends from predecessor i >> shift: replicate 16 / 2^shift of them.
    template <int kShift>
    static Vector expand(const uint16_t* p) {
        if constexpr (kShift == 1) {
            const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
            return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(eight), replicate<1>());
        } else if constexpr (kShift == 2) {
            int64_t four;
            std::memcpy(&four, p, 8);
            return _mm256_shuffle_epi8(_mm256_set1_epi64x(four), replicate<2>());
        } else if constexpr (kShift == 3) {
            int32_t two;
            std::memcpy(&two, p, 4);
            return _mm256_shuffle_epi8(_mm256_set1_epi32(two), replicate<3>());
        } else {
            return _mm256_set1_epi16(static_cast<int16_t>(*p));
        }
    }

  private:
    template <int kShift>
    static Vector replicate() {
        alignas(32) static constexpr auto bytes = [] {
            struct { int8_t at[32]; } table{};
            for (int lane = 0; lane < 16; ++lane) {
                table.at[2 * lane] = static_cast<int8_t>(2 * (lane >> kShift));
                table.at[2 * lane + 1] = static_cast<int8_t>(2 * (lane >> kShift) + 1);
            }
            return table;
        }();
        return _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes.at));
    }
};

}  // namespace

void encode_group_avx2(const Code& code, const Tables& values, const int16_t* targets, int tiles,
                       int first_pass_steps, uint8_t* symbols) {
    encode_group<Avx2>(code, values, targets, tiles, first_pass_steps, symbols);
}

}  // namespace ernieq::viterbi
