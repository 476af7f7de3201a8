// Which 32-bit windows of the ring hold the states of a lane's eight weights.
//
// A lane's weights end at running sums of the shifts, floor(K) and ceil(K) in turn, and a state is the L <= 16 bits
// that end there. A window serves the weights that end within its last 16 bits: one window is enough up to 2 bits a
// weight, two up to 5, three beyond. Window w of a lane ends with weight last_weight(pair_bits, w) of that lane.
#pragma once

#include "trellis_matmul.hpp"

namespace ernieq::trellis_matmul {

constexpr int window_count(int pair_bits) { return pair_bits <= 4 ? 1 : pair_bits <= 10 ? 2 : 3; }

constexpr int last_weight(int pair_bits, int window) {
    const int from_end = window_count(pair_bits) - 1 - window;
    return 7 - from_end * (window_count(pair_bits) == 3 ? 3 : 4);
}

constexpr int window_of(int pair_bits, int weight) {
    int window = 0;
    while (last_weight(pair_bits, window) < weight) ++window;
    return window;
}

// Right shift that brings the state of a weight to the low end of its window.
constexpr int state_shift(int pair_bits, int weight) {
    return end_of(pair_bits, last_weight(pair_bits, window_of(pair_bits, weight))) - end_of(pair_bits, weight);
}

// A window is cut from units last - 2, last - 1 and last: (first two << left) | (last two >> (16 - left)),
// where `left` (1..16) is how many bits of unit `last` belong to it.
struct Cut {
    int last;
    int left;
};

constexpr Cut cut_of(int pair_bits, int lane, int window) {
    const int end = lane * lane_bits(pair_bits) + end_of(pair_bits, last_weight(pair_bits, window));
    const int last = (end - 1) / 16;
    return {last, end - 16 * last};
}

// Whether the window of every lane ends with a whole unit, so that two units are enough.
constexpr bool whole_units(int pair_bits, int window) {
    return lane_bits(pair_bits) % 16 == 0 && cut_of(pair_bits, 0, window).left == 16;
}

// Whether a lane's window reaches back over the start of the ring.
constexpr bool wraps(int pair_bits, int lane, int window) {
    return cut_of(pair_bits, lane, window).last < (whole_units(pair_bits, window) ? 1 : 2);
}

// A window put together unit by unit, wherever it lies in the ring.
template <int kPairBits, int kWindow>
inline uint32_t window_at(const uint16_t* ring, int lane) {
    const Cut cut = cut_of(kPairBits, lane, kWindow);
    constexpr int kUnits = units_per_tile(kPairBits);
    uint64_t run = 0;
    for (int back = 2; back >= 0; --back) run = run << 16 | ring[(cut.last - back + kUnits) % kUnits];
    return static_cast<uint32_t>(run >> (16 - cut.left));
}

template <int... kPairBits>
constexpr bool states_lie_in_their_windows(std::integer_sequence<int, kPairBits...>) {
    bool all = true;
    for (int weight = 0; weight < kWeightsPerLane; ++weight)
        all = all && ((state_shift(kPairBits, weight) + 16 <= 32) && ...);
    return all;
}

static_assert(states_lie_in_their_windows(PairBits{}));

}  // namespace ernieq::trellis_matmul
