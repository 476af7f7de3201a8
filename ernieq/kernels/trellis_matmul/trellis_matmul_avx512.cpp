// The AVX-512 path: sixteen lanes a vector; the units of a ring are gathered by word permutations in registers.
#include <immintrin.h>

#include "row_tile.inl"
#include "windows.hpp"

namespace ernieq::trellis_matmul {
namespace {

// A permutation picks from 64 units in two registers. Up to K = 4 they are the whole ring; up to K = 6 the units of one
// half of the lanes (8 K) in slots 0.., and the eight units before them in slots 48..55; beyond, the half's own units
// alone, and the window of its first lane that reaches back is computed apart.
constexpr bool whole_ring(int pair_bits) { return pair_bits <= 8; }
constexpr bool own_units_only(int pair_bits) { return pair_bits > 12; }
constexpr int units_per_half(int pair_bits) { return 4 * pair_bits; }

constexpr int slot_of(int pair_bits, int half, int unit) {
    if (whole_ring(pair_bits)) return (unit + units_per_tile(pair_bits)) % units_per_tile(pair_bits);
    const int relative = unit - half * units_per_half(pair_bits);
    if (relative >= 0) return relative;
    return own_units_only(pair_bits) ? 0 : 56 + relative;
}

template <int kPairBits>
struct Tables {
    alignas(64) uint16_t last_two[2][window_count(kPairBits)][32];
    alignas(64) uint16_t first_two[2][window_count(kPairBits)][32];
    alignas(64) uint32_t left[2][window_count(kPairBits)][16];
    alignas(64) uint32_t right[2][window_count(kPairBits)][16];
};

template <int kPairBits>
constexpr Tables<kPairBits> make_tables() {
    Tables<kPairBits> tables{};
    for (int half = 0; half < 2; ++half)
        for (int window = 0; window < window_count(kPairBits); ++window)
            for (int lane = 0; lane < 16; ++lane) {
                const Cut cut = cut_of(kPairBits, 16 * half + lane, window);
                for (int back = 0; back < 2; ++back) {
                    tables.last_two[half][window][2 * lane + back] = slot_of(kPairBits, half, cut.last - back);
                    tables.first_two[half][window][2 * lane + back] = slot_of(kPairBits, half, cut.last - 1 - back);
                }
                tables.left[half][window][lane] = cut.left;
                tables.right[half][window][lane] = 16 - cut.left;
            }
    return tables;
}

template <int kPairBits>
constexpr Tables<kPairBits> kTables = make_tables<kPairBits>();

struct Units {
    __m512i low, high;
};

// At most 32 units, as many as are there.
template <int kCount>
inline __m512i load_some(const uint16_t* units) {
    if constexpr (kCount == 32) return _mm512_loadu_si512(units);
    if constexpr (kCount == 16)
        return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(units)));
    if constexpr (kCount == 8)
        return _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(units)));
    return _mm512_maskz_loadu_epi16((uint32_t{1} << kCount % 32) - 1, units);
}

template <int kPairBits>
inline Units load_units(const uint16_t* ring, int half) {
    if constexpr (units_per_tile(kPairBits) <= 32) {
        const __m512i all = load_some<units_per_tile(kPairBits)>(ring);
        return {all, all};
    } else if constexpr (whole_ring(kPairBits)) {
        return {_mm512_loadu_si512(ring), load_some<units_per_tile(kPairBits) - 32>(ring + 32)};
    } else {
        const uint16_t* own = ring + half * units_per_half(kPairBits);
        const __m512i high = load_some<units_per_half(kPairBits) - 32>(own + 32);
        if constexpr (own_units_only(kPairBits)) return {_mm512_loadu_si512(own), high};
        const uint16_t* before = half ? own - 8 : ring + units_per_tile(kPairBits) - 8;
        const __m128i previous = _mm_loadu_si128(reinterpret_cast<const __m128i*>(before));
        return {_mm512_loadu_si512(own), _mm512_inserti32x4(high, previous, 2)};
    }
}

template <int kPairBits>
inline __m512i pick(const Units& units, const uint16_t* slots) {
    const __m512i index = _mm512_load_si512(slots);
    if constexpr (units_per_tile(kPairBits) <= 32) return _mm512_permutexvar_epi16(index, units.low);
    return _mm512_permutex2var_epi16(units.low, index, units.high);
}

template <int kPairBits, int Window>
inline __m512i cut_window(const Units& units, int half) {
    const Tables<kPairBits>& tables = kTables<kPairBits>;
    const __m512i last_two = pick<kPairBits>(units, tables.last_two[half][Window]);
    if constexpr (whole_units(kPairBits, Window)) return last_two;
    const __m512i first_two = pick<kPairBits>(units, tables.first_two[half][Window]);
    return _mm512_or_si512(_mm512_sllv_epi32(first_two, _mm512_load_si512(tables.left[half][Window])),
                           _mm512_srlv_epi32(last_two, _mm512_load_si512(tables.right[half][Window])));
}

template <int kPairBits, int Window>
inline __m512i window(const uint16_t* ring, const Units& units, int half) {
    const __m512i bits = cut_window<kPairBits, Window>(units, half);
    if constexpr (!own_units_only(kPairBits) || !wraps(kPairBits, 0, Window)) return bits;
    return _mm512_mask_set1_epi32(bits, 1, static_cast<int>(window_at<kPairBits, Window>(ring, 16 * half)));
}

template <int... kPairBits>
constexpr bool only_the_first_lane_reaches_back(std::integer_sequence<int, kPairBits...>) {
    bool any = false;
    for (int window = 0; window < 3; ++window)
        any = any || ((own_units_only(kPairBits) && wraps(kPairBits, 1, window)) || ...);
    return !any;
}

static_assert(only_the_first_lane_reaches_back(PairBits{}));

struct Avx512 {
    static constexpr int kLanes = 16;
    using Float = __m512;

    template <int kPairBits>
    struct Words {
        __m512i word[window_count(kPairBits)];
    };

    template <int kPairBits>
    static Words<kPairBits> load_words(const uint16_t* ring, int half) {
        const Units units = load_units<kPairBits>(ring, half);
        Words<kPairBits> words;
        words.word[0] = window<kPairBits, 0>(ring, units, half);
        if constexpr (window_count(kPairBits) > 1) words.word[1] = window<kPairBits, 1>(ring, units, half);
        if constexpr (window_count(kPairBits) > 2) words.word[2] = window<kPairBits, 2>(ring, units, half);
        return words;
    }

    template <int kPairBits, int J>
    static Float values(const Words<kPairBits>& words, __m512i mask) {
        const __m512i word = words.word[window_of(kPairBits, J)];
        const __m512i state = _mm512_and_si512(_mm512_srli_epi32(word, state_shift(kPairBits, J)), mask);
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

Path path_avx512(int pair_bits) { return path_of<Avx512>(pair_bits, PairBits{}); }

}  // namespace ernieq::trellis_matmul
