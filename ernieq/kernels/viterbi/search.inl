// The search, written once for every instruction set. `Simd` supplies the vector operations; see the bottom of
// viterbi_*.cpp for the three of them.
//
// A vector holds `Simd::kLanes` consecutive nodes. Metrics of consecutive predecessors are replicated over the
// 2^shift states that share them (`Simd::expand`). The value table is blocked: [node block][dropped bits][lane].
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "rates.hpp"
#include "viterbi.hpp"

namespace ernieq::viterbi {

// The largest metric. A cost is at most 32768, so a sum never overflows 16 bits and needs no saturating addition.
constexpr uint16_t kUnreachable = 32767;

// Doublings of the difference before it is squared: finer costs where the code is finer (see README.md).
constexpr int doublings(int pair_bits) {
    const int bits = pair_bits / 2;
    return bits < 2 ? 0 : bits < 6 ? bits - 2 : bits - 3;
}

// Buffers of one thread; they only grow.
struct Workspace {
    std::vector<uint16_t> metrics[kTilesTogether][2];
    std::vector<uint32_t> decisions[kTilesTogether];

    static long decisions_per_step(const Code& code, int lanes) {
        const long even = code.nodes(0) / lanes * (code.symbols(0) - 1);
        const long odd = code.nodes(1) / lanes * (code.symbols(1) - 1);
        return std::max(even, odd);
    }

    void reserve(const Code& code, int lanes) {
        const size_t padded = code.nodes(0) + 64;  // `expand` may read past the last predecessor
        const size_t per_step = decisions_per_step(code, lanes);
        for (int tile = 0; tile < kTilesTogether; ++tile) {
            for (auto& metrics : this->metrics[tile])
                if (metrics.size() < padded) metrics.resize(padded);
            if (decisions[tile].size() < per_step * kTileWeights) decisions[tile].resize(per_step * kTileWeights);
        }
    }
};

template <class Simd, int kPairBits>
class Search {
  public:
    using Vector = typename Simd::Vector;
    static constexpr int kEven = kPairBits / 2, kOdd = kPairBits - kEven;  // shifts of the two weights of a pair

    Search(const Code& code, const Tables& values, Workspace& workspace)
        : nodes_(code.nodes(0)), state_bits_(code.state_bits),
          per_step_(Workspace::decisions_per_step(code, Simd::kLanes)), values_(values), work_(workspace) {}

    void encode(const int16_t* targets, int tiles, int first_pass_steps, uint8_t* symbols) {
        int16_t sequence[kTilesTogether][kTileWeights];
        int boundary[kTilesTogether];
        uint8_t path[kTileWeights];
        const int half = first_pass_steps / 2;
        const int both = kTilesTogether;
        auto target = [&](int tile, int t) { return targets[std::min(tile, tiles - 1) * kTileWeights + t]; };

        for (int tile = 0; tile < both; ++tile) {
            for (int i = 0; i < first_pass_steps; ++i)
                sequence[tile][i] = target(tile, (kTileWeights - half + i) % kTileWeights);
            start_anywhere(tile);
        }
        forward(sequence, first_pass_steps);
        for (int tile = 0; tile < both; ++tile) {
            const uint16_t* metrics = work_.metrics[tile][0].data();
            const int end = static_cast<int>(std::min_element(metrics, metrics + nodes_) - metrics);
            boundary[tile] = trace_back(tile, end, first_pass_steps, half, path);
            std::copy_n(&targets[std::min(tile, tiles - 1) * kTileWeights], kTileWeights, sequence[tile]);
            start_at(tile, boundary[tile]);
        }
        forward(sequence, kTileWeights);
        for (int tile = 0; tile < tiles; ++tile) {
            trace_back(tile, boundary[tile], kTileWeights, 0, path);
            std::memcpy(symbols + tile * kTileWeights, path, kTileWeights);
        }
    }

  private:
    void start_anywhere(int tile) { std::fill_n(work_.metrics[tile][0].begin(), nodes_, uint16_t{0}); }

    void start_at(int tile, int node) {
        std::fill_n(work_.metrics[tile][0].begin(), nodes_, kUnreachable);
        work_.metrics[tile][0][node] = 0;
    }

    // Run the add-compare-select recursion over pairs of weights. Buffer 0 holds the metrics before each pair.
    void forward(const int16_t (*sequence)[kTileWeights], int steps) {
        for (int step = 0; step < steps; step += 2) {
            if (step && step % kRenormaliseEvery == 0)
                for (auto& metrics : work_.metrics) renormalise(metrics[0].data());
            advance<kEven, kOdd>(sequence[0][step], sequence[1][step], 0, step);
            advance<kOdd, kEven>(sequence[0][step + 1], sequence[1][step + 1], 1, step + 1);
        }
    }

    void renormalise(uint16_t* metrics) {
        Vector lowest = Simd::load(metrics);
        for (long node = Simd::kLanes; node < nodes_; node += Simd::kLanes)
            lowest = Simd::minimum(lowest, Simd::load(metrics + node));
        uint16_t lanes[Simd::kLanes];
        Simd::store(lanes, lowest);
        const Vector floor = Simd::broadcast(static_cast<int16_t>(*std::min_element(lanes, lanes + Simd::kLanes)));
        for (long node = 0; node < nodes_; node += Simd::kLanes)
            Simd::store(metrics + node, Simd::subtract(Simd::load(metrics + node), floor));
    }

    static inline Vector cost(Vector value, Vector target) {
        Vector difference = Simd::subtract(value, target);
        for (int i = 0; i < doublings(kPairBits); ++i) difference = Simd::add_saturated(difference, difference);
        return Simd::square(difference);
    }

    // One weight, which shifts kIn bits in; the next one shifts kOut, so that many are dropped here.
    template <int kIn, int kOut>
    void advance(int16_t target0, int16_t target1, int parity, int step) {
        constexpr int kBranches = 1 << kOut;
        const Vector x0 = Simd::broadcast(target0), x1 = Simd::broadcast(target1);
        const Vector ceiling = Simd::broadcast(kUnreachable);
        const uint16_t* from0 = work_.metrics[0][parity].data();
        const uint16_t* from1 = work_.metrics[1][parity].data();
        uint16_t* to0 = work_.metrics[0][parity ^ 1].data();
        uint16_t* to1 = work_.metrics[1][parity ^ 1].data();
        const long blocks = (1L << (state_bits_ - kOut)) / Simd::kLanes;
        const long predecessors = 1L << (state_bits_ - kOut - kIn);
        uint32_t* choice0 = work_.decisions[0].data() + step * per_step_;
        uint32_t* choice1 = work_.decisions[1].data() + step * per_step_;
        const int16_t* values = values_.at[parity];
        for (long block = 0; block < blocks; ++block) {
            const long first = block * Simd::kLanes >> kIn;
            Vector value = Simd::load(values);
            Vector best0 = Simd::add(Simd::template expand<kIn>(from0 + first), cost(value, x0));
            Vector best1 = Simd::add(Simd::template expand<kIn>(from1 + first), cost(value, x1));
#pragma GCC unroll 4
            for (int dropped = 1; dropped < kBranches; ++dropped) {
                const long from = first + dropped * predecessors;
                value = Simd::load(values + dropped * Simd::kLanes);
                const Vector next0 = Simd::add(Simd::template expand<kIn>(from0 + from), cost(value, x0));
                const Vector next1 = Simd::add(Simd::template expand<kIn>(from1 + from), cost(value, x1));
                *choice0++ = Simd::less(next0, best0);
                *choice1++ = Simd::less(next1, best1);
                best0 = Simd::minimum(best0, next0);
                best1 = Simd::minimum(best1, next1);
            }
            values += kBranches * Simd::kLanes;
            Simd::store(to0 + block * Simd::kLanes, Simd::minimum(best0, ceiling));
            Simd::store(to1 + block * Simd::kLanes, Simd::minimum(best1, ceiling));
        }
    }

    // Walk back from `node` after `steps` steps to the node after `stop` steps, writing the symbols passed.
    int trace_back(int tile, int node, int steps, int stop, uint8_t* path) const {
        for (int step = steps - 1; step > stop; step -= 2) {
            node = step_back<kOdd, kEven>(tile, node, step, path);
            node = step_back<kEven, kOdd>(tile, node, step - 1, path);
        }
        return node;
    }

    template <int kIn, int kOut>
    int step_back(int tile, int node, int step, uint8_t* path) const {
        const long at = step * per_step_ + node / Simd::kLanes * ((1L << kOut) - 1);
        const uint32_t* choice = work_.decisions[tile].data() + at;
        const int bit = node % Simd::kLanes * Simd::kMaskStride;
        int dropped = (1 << kOut) - 1;
        while (dropped > 0 && !(choice[dropped - 1] >> bit & 1)) --dropped;
        const int state = node | dropped << (state_bits_ - kOut);
        path[step] = static_cast<uint8_t>(state & ((1 << kIn) - 1));
        return state >> kIn;
    }

    long nodes_;  // before an even weight
    int state_bits_;
    long per_step_;
    Tables values_;
    Workspace& work_;
};

// Calls the search that is compiled for the rate.
template <class Simd, int... kPairBits>
void dispatch(const Code& code, const Tables& values, Workspace& workspace, const int16_t* targets, int tiles,
              int first_pass_steps, uint8_t* symbols, std::integer_sequence<int, kPairBits...>) {
    ((code.pair_bits == kPairBits
          ? Search<Simd, kPairBits>(code, values, workspace).encode(targets, tiles, first_pass_steps, symbols)
          : void()),
     ...);
}

template <class Simd>
void encode_group(const Code& code, const Tables& values, const int16_t* targets, int tiles, int first_pass_steps,
                  uint8_t* symbols) {
    static thread_local Workspace workspace;
    workspace.reserve(code, Simd::kLanes);
    dispatch<Simd>(code, values, workspace, targets, tiles, first_pass_steps, symbols,
                   PairBits{});
}

}  // namespace ernieq::viterbi
