// Any processor: plain loops over 16 lanes, which a compiler may vectorise for whatever it targets.
#include <cstdint>

#include "search.inl"

namespace ernieq::viterbi {
namespace {

struct Scalar {
    struct Vector {
        uint16_t lane[kLanesScalar];
    };
    static constexpr int kLanes = kLanesScalar;
    static constexpr int kMaskStride = 1;

    template <class Operation>
    static Vector map(Operation operation) {
        Vector result;
        for (int i = 0; i < kLanes; ++i) result.lane[i] = static_cast<uint16_t>(operation(i));
        return result;
    }
    static int32_t saturate(int32_t x) { return x > 32767 ? 32767 : x < -32768 ? -32768 : x; }
    static int32_t sign(uint16_t x) { return static_cast<int16_t>(x); }

    static Vector load(const void* p) {
        Vector v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    static void store(void* p, const Vector& v) { std::memcpy(p, &v, sizeof v); }
    static Vector broadcast(int16_t x) {
        return map([&](int) { return x; });
    }
    static Vector add(const Vector& a, const Vector& b) {
        return map([&](int i) { return a.lane[i] + b.lane[i]; });
    }
    static Vector add_saturated(const Vector& a, const Vector& b) {
        return map([&](int i) { return saturate(sign(a.lane[i]) + sign(b.lane[i])); });
    }
    static Vector subtract(const Vector& a, const Vector& b) {
        return map([&](int i) { return a.lane[i] - b.lane[i]; });
    }
    static Vector square(const Vector& a) {
        return map([&](int i) { return (sign(a.lane[i]) * sign(a.lane[i]) + (1 << 14)) >> 15; });
    }
    static Vector minimum(const Vector& a, const Vector& b) {
        return map([&](int i) { return std::min(a.lane[i], b.lane[i]); });
    }
    static uint32_t less(const Vector& a, const Vector& b) {
        uint32_t mask = 0;
        for (int i = 0; i < kLanes; ++i) mask |= uint32_t{a.lane[i] < b.lane[i]} << i;
        return mask;
    }
    template <int kShift>
    static Vector expand(const uint16_t* p) {
        return map([&](int i) { return p[i >> kShift]; });
    }
};

}  // namespace

void encode_group_scalar(const Code& code, const Tables& values, const int16_t* targets, int tiles,
                         int first_pass_steps, uint8_t* symbols) {
    encode_group<Scalar>(code, values, targets, tiles, first_pass_steps, symbols);
}

}  // namespace ernieq::viterbi
