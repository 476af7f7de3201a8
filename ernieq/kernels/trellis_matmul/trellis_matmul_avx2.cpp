// The AVX2 path: eight lanes a vector; the units of a ring are gathered from memory.
#include <immintrin.h>

#include "row_tile.inl"
#include "windows.hpp"

namespace ernieq::trellis_matmul {
namespace {

// Units to gather for each window. A gather reads two neighbouring units; where a window reaches back over the start of
// the ring, which only lanes 0 and 1 do, it is computed apart and its indices here are harmless.
template <int kPairBits>
struct Tables {
    alignas(32) int32_t last_two[window_count(kPairBits)][kLanesPerTile];
    alignas(32) int32_t first_two[window_count(kPairBits)][kLanesPerTile];
    alignas(32) uint32_t left[window_count(kPairBits)][kLanesPerTile];
    alignas(32) uint32_t right[window_count(kPairBits)][kLanesPerTile];
};

template <int kPairBits>
constexpr Tables<kPairBits> make_tables() {
    Tables<kPairBits> tables{};
    for (int window = 0; window < window_count(kPairBits); ++window)
        for (int lane = 0; lane < kLanesPerTile; ++lane) {
            const Cut cut = cut_of(kPairBits, lane, window);
            if (wraps(kPairBits, lane, window)) continue;
            tables.last_two[window][lane] = cut.last - 1;
            tables.first_two[window][lane] = whole_units(kPairBits, window) ? 0 : cut.last - 2;
            tables.left[window][lane] = cut.left;
            tables.right[window][lane] = 16 - cut.left;
        }
    return tables;
}

template <int... kPairBits>
constexpr bool only_lanes_0_and_1_wrap(std::integer_sequence<int, kPairBits...>) {
    bool any = false;
    for (int window = 0; window < 3; ++window)
        for (int lane = 2; lane < kLanesPerTile; ++lane)
            any = any || ((window < window_count(kPairBits) && wraps(kPairBits, lane, window)) || ...);
    return !any;
}

static_assert(only_lanes_0_and_1_wrap(PairBits{}));

template <int kPairBits>
constexpr Tables<kPairBits> kTables = make_tables<kPairBits>();

inline __m256i load_indices(const void* from) { return _mm256_load_si256(static_cast<const __m256i*>(from)); }

// Two neighbouring units per lane, the first one high.
inline __m256i gather_units(const uint16_t* ring, const int32_t* first) {
    const __m256i pair = _mm256_i32gather_epi32(reinterpret_cast<const int*>(ring), load_indices(first), 2);
    return _mm256_or_si256(_mm256_slli_epi32(pair, 16), _mm256_srli_epi32(pair, 16));
}

template <int kPairBits, int Window>
inline __m256i window(const uint16_t* ring, int group) {
    const Tables<kPairBits>& tables = kTables<kPairBits>;
    const int lane = 8 * group;
    __m256i bits = gather_units(ring, tables.last_two[Window] + lane);
    if constexpr (!whole_units(kPairBits, Window)) {
        const __m256i first_two = gather_units(ring, tables.first_two[Window] + lane);
        bits = _mm256_or_si256(_mm256_sllv_epi32(first_two, load_indices(tables.left[Window] + lane)),
                               _mm256_srlv_epi32(bits, load_indices(tables.right[Window] + lane)));
    }
    if (group) return bits;
    if constexpr (wraps(kPairBits, 0, Window))
        bits = _mm256_insert_epi32(bits, static_cast<int>(window_at<kPairBits, Window>(ring, 0)), 0);
    if constexpr (wraps(kPairBits, 1, Window))
        bits = _mm256_insert_epi32(bits, static_cast<int>(window_at<kPairBits, Window>(ring, 1)), 1);
    return bits;
}

struct Avx2 {
    static constexpr int kLanes = 8;
    using Float = __m256;

    template <int kPairBits>
    struct Words {
        __m256i word[window_count(kPairBits)];
    };

    template <int kPairBits>
    static Words<kPairBits> load_words(const uint16_t* ring, int group) {
        Words<kPairBits> words;
        words.word[0] = window<kPairBits, 0>(ring, group);
        if constexpr (window_count(kPairBits) > 1) words.word[1] = window<kPairBits, 1>(ring, group);
        if constexpr (window_count(kPairBits) > 2) words.word[2] = window<kPairBits, 2>(ring, group);
        return words;
    }

    template <int kPairBits, int J>
    static Float values(const Words<kPairBits>& words, __m256i mask) {
        const __m256i word = words.word[window_of(kPairBits, J)];
        const __m256i state = _mm256_and_si256(_mm256_srli_epi32(word, state_shift(kPairBits, J)), mask);
        const __m256i product = _mm256_mullo_epi32(state, _mm256_set1_epi32(static_cast<int>(kMultiplier)));
        const __m256i pairs = _mm256_maddubs_epi16(product, _mm256_set1_epi8(1));
        const __m256i sum = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        return _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, _mm256_set1_epi32(kByteSumMean)));
    }

    static __m256i mask(uint32_t bits) { return _mm256_set1_epi32(static_cast<int>(bits)); }
    static Float zero() { return _mm256_setzero_ps(); }
    static Float multiply_add(Float a, Float b, Float sum) { return _mm256_fmadd_ps(a, b, sum); }
    static Float scaled(Float value, Float scale) { return _mm256_mul_ps(value, scale); }
    static Float repeat4(const float* from) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(from)); }
    static void store(float* to, Float value) { _mm256_storeu_ps(to, value); }

    // Two rows of four lanes each.
    static Float row_scales(const float* scale) {
        return _mm256_set_m128(_mm_set1_ps(scale[1]), _mm_set1_ps(scale[0]));
    }

    // Lane l of (even, odd) goes to columns 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
    static void store_pairs(float* to, long stride, Float even, Float odd) {
        const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
        _mm256_storeu_ps(to, _mm256_permute2f128_ps(low, high, 0x20));
        _mm256_storeu_ps(to + stride, _mm256_permute2f128_ps(low, high, 0x31));
    }
};

}  // namespace

Path path_avx2(int pair_bits) { return path_of<Avx2>(pair_bits, PairBits{}); }

}  // namespace ernieq::trellis_matmul
