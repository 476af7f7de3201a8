// The AVX-512 path: sixteen lanes a vector; the units of a ring are gathered by word permutations in registers.
#include <immintrin.h>

#include "row_tile.inl"
#include "windows.hpp"

namespace ernieq::trellis_matmul {
namespace {

// A permutation picks from 64 units in two registers. Up to K = 4 they are the whole ring; beyond, the units of one
// half of the lanes (8 K) in slots 0.., and the eight units before them in slots 48..55.
constexpr int slot_of(int bits, int half, int unit) {
    if (bits <= 4) return (unit + 16 * bits) % (16 * bits);
    const int relative = unit - half * 8 * bits;
    return relative < 0 ? 56 + relative : relative;
}

template <int K>
struct Tables {
    alignas(64) uint16_t last_two[2][window_count(K)][32];
    alignas(64) uint16_t first_two[2][window_count(K)][32];
    alignas(64) uint32_t left[2][window_count(K)][16];
    alignas(64) uint32_t right[2][window_count(K)][16];
};

template <int K>
constexpr Tables<K> make_tables() {
    Tables<K> tables{};
    for (int half = 0; half < 2; ++half)
        for (int window = 0; window < window_count(K); ++window)
            for (int lane = 0; lane < 16; ++lane) {
                const Cut cut = cut_of(K, 16 * half + lane, window);
                for (int back = 0; back < 2; ++back) {
                    tables.last_two[half][window][2 * lane + back] = slot_of(K, half, cut.last - back);
                    tables.first_two[half][window][2 * lane + back] = slot_of(K, half, cut.last - 1 - back);
                }
                tables.left[half][window][lane] = cut.left;
                tables.right[half][window][lane] = 16 - cut.left;
            }
    return tables;
}

template <int K>
constexpr Tables<K> kTables = make_tables<K>();

struct Units {
    __m512i low, high;
};

template <int K>
inline Units load_units(const uint16_t* ring, int half) {
    if constexpr (K == 2) {
        const __m512i all = _mm512_loadu_si512(ring);
        return {all, all};
    } else if constexpr (K == 3) {
        const __m256i rest = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ring + 32));
        return {_mm512_loadu_si512(ring), _mm512_castsi256_si512(rest)};
    } else if constexpr (K == 4) {
        return {_mm512_loadu_si512(ring), _mm512_loadu_si512(ring + 32)};
    } else {
        const uint16_t* own = ring + half * 8 * K;
        const uint16_t* before = half ? own - 8 : ring + 16 * K - 8;
        const __m128i previous = _mm_loadu_si128(reinterpret_cast<const __m128i*>(before));
        __m512i high;
        if constexpr (K == 5)
            high = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(own + 32)));
        else
            high = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(own + 32)));
        return {_mm512_loadu_si512(own), _mm512_inserti32x4(high, previous, 2)};
    }
}

template <int K>
inline __m512i pick(const Units& units, const uint16_t* slots) {
    const __m512i index = _mm512_load_si512(slots);
    if constexpr (K == 2) return _mm512_permutexvar_epi16(index, units.low);
    return _mm512_permutex2var_epi16(units.low, index, units.high);
}

template <int K, int Window>
inline __m512i window(const Units& units, int half) {
    const Tables<K>& tables = kTables<K>;
    const __m512i last_two = pick<K>(units, tables.last_two[half][Window]);
    if constexpr (whole_units(K, Window)) return last_two;
    const __m512i first_two = pick<K>(units, tables.first_two[half][Window]);
    return _mm512_or_si512(_mm512_sllv_epi32(first_two, _mm512_load_si512(tables.left[half][Window])),
                           _mm512_srlv_epi32(last_two, _mm512_load_si512(tables.right[half][Window])));
}

struct Avx512 {
    static constexpr int kLanes = 16;
    using Float = __m512;

    template <int K>
    struct Words {
        __m512i word[window_count(K)];
    };

    template <int K>
    static Words<K> load_words(const uint16_t* ring, int half) {
        const Units units = load_units<K>(ring, half);
        Words<K> words;
        words.word[0] = window<K, 0>(units, half);
        if constexpr (window_count(K) > 1) words.word[1] = window<K, 1>(units, half);
        if constexpr (window_count(K) > 2) words.word[2] = window<K, 2>(units, half);
        return words;
    }

    template <int K, int J>
    static Float values(const Words<K>& words, __m512i mask) {
        const __m512i word = words.word[window_of(K, J)];
        const __m512i state = _mm512_and_si512(_mm512_srli_epi32(word, state_shift(K, J)), mask);
        const __m512i product = _mm512_mullo_epi32(state, _mm512_set1_epi32(static_cast<int>(kMultiplier)));
        const __m512i pairs = _mm512_maddubs_epi16(product, _mm512_set1_epi8(1));
        const __m512i sum = _mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
        return _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_set1_epi32(kByteSumMean)));
    }

    static __m512i mask(uint32_t bits) { return _mm512_set1_epi32(static_cast<int>(bits)); }
    static Float zero() { return _mm512_setzero_ps(); }
    static Float multiply_add(Float a, Float b, Float sum) { return _mm512_fmadd_ps(a, b, sum); }
    static Float scaled(Float value, Float scale) { return _mm512_mul_ps(value, scale); }
    static Float repeat4(const float* from) { return _mm512_broadcast_f32x4(_mm_loadu_ps(from)); }
    static void store(float* to, Float value) { _mm512_storeu_ps(to, value); }

    // Four rows of four lanes each.
    static Float row_scales(const float* scale) {
        const __m512i row = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
        return _mm512_permutexvar_ps(row, _mm512_castps128_ps512(_mm_loadu_ps(scale)));
    }

    // Lane l of (even, odd) goes to columns 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
    static void store_pairs(float* to, long stride, Float even, Float odd) {
        const __m512 low = _mm512_unpacklo_ps(even, odd), high = _mm512_unpackhi_ps(even, odd);
        store_row(to, _mm512_extractf32x4_ps(low, 0), _mm512_extractf32x4_ps(high, 0));
        store_row(to + stride, _mm512_extractf32x4_ps(low, 1), _mm512_extractf32x4_ps(high, 1));
        store_row(to + 2 * stride, _mm512_extractf32x4_ps(low, 2), _mm512_extractf32x4_ps(high, 2));
        store_row(to + 3 * stride, _mm512_extractf32x4_ps(low, 3), _mm512_extractf32x4_ps(high, 3));
    }

    static void store_row(float* to, __m128 left, __m128 right) {
        _mm_storeu_ps(to, left);
        _mm_storeu_ps(to + 4, right);
    }
};

}  // namespace

Path path_avx512(int bits) { return path_of<Avx512>(bits); }

}  // namespace ernieq::trellis_matmul
