// AVX-512BW: 32 nodes a vector, decisions as mask registers.
#include <immintrin.h>

#include "search.inl"

namespace ernieq::viterbi {
namespace {

struct Avx512 {
    using Vector = __m512i;
    static constexpr int kLanes = kLanesAvx512;
    static constexpr int kMaskStride = 1;

    static Vector load(const void* p) { return _mm512_loadu_si512(p); }
    static void store(void* p, Vector v) { _mm512_storeu_si512(p, v); }
    static Vector broadcast(int16_t x) { return _mm512_set1_epi16(x); }
    static Vector add(Vector a, Vector b) { return _mm512_add_epi16(a, b); }
    static Vector add_saturated(Vector a, Vector b) { return _mm512_adds_epi16(a, b); }
    static Vector subtract(Vector a, Vector b) { return _mm512_sub_epi16(a, b); }
    static Vector square(Vector a) { return _mm512_mulhrs_epi16(a, a); }
    static Vector minimum(Vector a, Vector b) { return _mm512_min_epu16(a, b); }
    static uint32_t less(Vector a, Vector b) { return _mm512_cmplt_epu16_mask(a, b); }

    // Node lane i of a vector descends from predecessor i >> shift: replicate 32 / 2^shift of them.
    template <int kShift>
    static Vector expand(const uint16_t* p) {
        if constexpr (kShift == 1) {
            const __m512i sixteen = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
            return _mm512_or_si512(sixteen, _mm512_slli_epi32(sixteen, 16));
        } else if constexpr (kShift == 2) {
            const Vector eight = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
            return _mm512_shuffle_epi8(eight, replicate<2>());
        } else if constexpr (kShift == 3) {
            int64_t four;
            std::memcpy(&four, p, 8);
            return _mm512_shuffle_epi8(_mm512_set1_epi64(four), replicate<3>());
        } else if constexpr (kShift == 4) {
            int32_t two;
            std::memcpy(&two, p, 4);
            return _mm512_shuffle_epi8(_mm512_set1_epi32(two), replicate<4>());
        } else {
            return _mm512_set1_epi16(static_cast<int16_t>(*p));
        }
    }

  private:
    template <int kShift>
    static Vector replicate() {
        alignas(64) static constexpr auto bytes = [] {
            struct { int8_t at[64]; } table{};
            for (int lane = 0; lane < 32; ++lane) {
                table.at[2 * lane] = static_cast<int8_t>(2 * (lane >> kShift));
                table.at[2 * lane + 1] = static_cast<int8_t>(2 * (lane >> kShift) + 1);
            }
            return table;
        }();
        return _mm512_load_si512(bytes.at);
    }
};

}  // namespace

void encode_group_avx512(const Code& code, const Tables& values, const int16_t* targets, int tiles,
                         int first_pass_steps, uint8_t* symbols) {
    encode_group<Avx512>(code, values, targets, tiles, first_pass_steps, symbols);
}

}  // namespace ernieq::viterbi
