// The AVX2 path: eight lanes a vector; the units of a ring are gathered from memory.
#include <immintrin.h>

#include "row_tile.inl"
#include "windows.hpp"

namespace ernieq::trellis_matmul {
namespace {

// Units to gather for each window. A gather reads two neighbouring units; only lane 0 reaches back over the start
// of the ring, so its windows are computed apart and its indices here are harmless.
template <int K>
struct Tables {
    alignas(32) int32_t last_two[window_count(K)][kLanesPerTile];
    alignas(32) int32_t first_two[window_count(K)][kLanesPerTile];
    alignas(32) uint32_t left[window_count(K)][kLanesPerTile];
    alignas(32) uint32_t right[window_count(K)][kLanesPerTile];
};

template <int K>
constexpr Tables<K> make_tables() {
    Tables<K> tables{};
    for (int window = 0; window < window_count(K); ++window)
        for (int lane = 0; lane < kLanesPerTile; ++lane) {
            const Cut cut = cut_of(K, lane, window);
            tables.last_two[window][lane] = lane ? cut.last - 1 : 0;
            tables.first_two[window][lane] = lane && !whole_units(K, window) ? cut.last - 2 : 0;
            tables.left[window][lane] = cut.left;
            tables.right[window][lane] = 16 - cut.left;
        }
    return tables;
}

template <int K>
constexpr bool only_lane_0_wraps() {
    for (int window = 0; window < window_count(K); ++window)
        for (int lane = 1; lane < kLanesPerTile; ++lane) {
            const Tables<K> tables = make_tables<K>();
            if (tables.last_two[window][lane] < 0 || tables.first_two[window][lane] < 0) return false;
        }
    return true;
}

static_assert(only_lane_0_wraps<2>() && only_lane_0_wraps<3>() && only_lane_0_wraps<4>() &&
              only_lane_0_wraps<5>() && only_lane_0_wraps<6>());

template <int K>
constexpr Tables<K> kTables = make_tables<K>();

inline __m256i load_indices(const void* from) { return _mm256_load_si256(static_cast<const __m256i*>(from)); }

// Two neighbouring units per lane, the first one high.
inline __m256i gather_units(const uint16_t* ring, const int32_t* first) {
    const __m256i pair = _mm256_i32gather_epi32(reinterpret_cast<const int*>(ring), load_indices(first), 2);
    return _mm256_or_si256(_mm256_slli_epi32(pair, 16), _mm256_srli_epi32(pair, 16));
}

// A window of lane 0.
template <int K, int Window>
inline int first_window(const uint16_t* ring) {
    constexpr Cut cut = cut_of(K, 0, Window);
    uint64_t run = 0;
    for (int back = 2; back >= 0; --back) run = run << 16 | ring[(cut.last - back + 16 * K) % (16 * K)];
    return static_cast<int>(static_cast<uint32_t>(run >> (16 - cut.left)));
}

template <int K, int Window>
inline __m256i window(const uint16_t* ring, int group) {
    const Tables<K>& tables = kTables<K>;
    const int lane = 8 * group;
    __m256i bits = gather_units(ring, tables.last_two[Window] + lane);
    if constexpr (!whole_units(K, Window)) {
        const __m256i first_two = gather_units(ring, tables.first_two[Window] + lane);
        bits = _mm256_or_si256(_mm256_sllv_epi32(first_two, load_indices(tables.left[Window] + lane)),
                               _mm256_srlv_epi32(bits, load_indices(tables.right[Window] + lane)));
    }
    return group ? bits : _mm256_insert_epi32(bits, first_window<K, Window>(ring), 0);
}

struct Avx2 {
    static constexpr int kLanes = 8;
    using Float = __m256;

    template <int K>
    struct Words {
        __m256i word[window_count(K)];
    };

    template <int K>
    static Words<K> load_words(const uint16_t* ring, int group) {
        Words<K> words;
        words.word[0] = window<K, 0>(ring, group);
        if constexpr (window_count(K) > 1) words.word[1] = window<K, 1>(ring, group);
        if constexpr (window_count(K) > 2) words.word[2] = window<K, 2>(ring, group);
        return words;
    }

    template <int K, int J>
    static Float values(const Words<K>& words, __m256i mask) {
        const __m256i word = words.word[window_of(K, J)];
        const __m256i state = _mm256_and_si256(_mm256_srli_epi32(word, state_shift(K, J)), mask);
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

Path path_avx2(int bits) { return path_of<Avx2>(bits); }

}  // namespace ernieq::trellis_matmul
