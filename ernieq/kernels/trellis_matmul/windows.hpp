// Which 32-bit windows of the ring hold the states of a lane's eight weights.
//
// A lane needs the 7 K + L <= 7 K + 16 bits that end with its own. At K = 2 that is one 32-bit window, at K = 3, 4
// and 5 two, at K = 6 three. Window w of a lane ends with weight last_weight(K, w) of that lane.
#pragma once

#include "trellis_matmul.hpp"

namespace ernieq::trellis_matmul {

constexpr int window_count(int bits) { return bits == 2 ? 1 : bits == 6 ? 3 : 2; }

constexpr int last_weight(int bits, int window) {
    const int from_end = window_count(bits) - 1 - window;
    return 7 - from_end * (bits == 6 ? 3 : 4);
}

constexpr int window_of(int bits, int weight) {
    int window = 0;
    while (last_weight(bits, window) < weight) ++window;
    return window;
}

// Right shift that brings the state of a weight to the low end of its window.
constexpr int state_shift(int bits, int weight) {
    return (last_weight(bits, window_of(bits, weight)) - weight) * bits;
}

// A window is cut from units last - 2, last - 1 and last: (first two << left) | (last two >> (16 - left)),
// where `left` (1..16) is how many bits of unit `last` belong to it.
struct Cut {
    int last;
    int left;
};

constexpr Cut cut_of(int bits, int lane, int window) {
    const int end = lane * kWeightsPerLane * bits + (last_weight(bits, window) + 1) * bits;
    const int last = (end - 1) / 16;
    return {last, end - 16 * last};
}

// Whether the window of every lane ends with a whole unit, so that two units are enough.
constexpr bool whole_units(int bits, int window) {
    return bits % 2 == 0 && cut_of(bits, 0, window).left == 16;
}

static_assert(last_weight(6, 0) == 1 && last_weight(5, 0) == 3 && last_weight(2, 0) == 7);
static_assert(state_shift(5, 4) + 16 <= 32 && state_shift(6, 2) + 16 <= 32 && state_shift(2, 0) + 16 <= 32);

}  // namespace ernieq::trellis_matmul
