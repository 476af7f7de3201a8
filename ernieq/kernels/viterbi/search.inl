// The search, written once for every instruction set. `Simd` supplies the vector operations; see the bottom of
// viterbi_*.cpp for the three of them.
//
// A vector holds `Simd::kLanes` consecutive nodes. Metrics of consecutive predecessors are replicated over the
// 2^K nodes that share them (`Simd::expand`). The value table is blocked: [node block][dropped bits][lane].
#include <algorithm>
#include <cstring>
#include <vector>

#include "viterbi.hpp"

namespace ernieq::viterbi {

// The largest metric. A cost is at most 32768, so a sum never overflows 16 bits and needs no saturating addition.
constexpr uint16_t kUnreachable = 32767;

// Doublings of the difference before it is squared: finer costs where the code is finer (see README.md).
template <int kBits>
constexpr int kDoublings = kBits <= 4 ? kBits - 2 : 3;

// Buffers of one thread; they only grow.
struct Workspace {
    std::vector<uint16_t> metrics[kTilesTogether][2];
    std::vector<uint32_t> decisions[kTilesTogether];

    void reserve(const Code& code, int lanes) {
        const size_t padded = code.nodes() + 64;  // `expand` may read past the last predecessor
        const size_t per_step = code.nodes() / lanes * (code.symbols() - 1);
        for (int tile = 0; tile < kTilesTogether; ++tile) {
            for (auto& metrics : this->metrics[tile])
                if (metrics.size() < padded) metrics.resize(padded);
            if (decisions[tile].size() < per_step * kTileWeights) decisions[tile].resize(per_step * kTileWeights);
        }
    }
};

template <class Simd, int kBits>
class Search {
  public:
    using Vector = typename Simd::Vector;
    static constexpr int kSymbols = 1 << kBits;

    Search(const Code& code, const int16_t* values, Workspace& workspace)
        : nodes_(code.nodes()), blocks_(code.nodes() / Simd::kLanes), node_bits_(code.state_bits - code.bits),
          values_(values), work_(workspace) {}

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
        int parity = forward(sequence, first_pass_steps);
        for (int tile = 0; tile < both; ++tile) {
            const uint16_t* metrics = work_.metrics[tile][parity].data();
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

    // Run the add-compare-select recursion; returns which of the two metric buffers holds the result.
    int forward(const int16_t (*sequence)[kTileWeights], int steps) {
        int parity = 0;
        for (int step = 0; step < steps; ++step, parity ^= 1) {
            if (step && step % kRenormaliseEvery == 0)
                for (auto& metrics : work_.metrics) renormalise(metrics[parity].data());
            advance(sequence[0][step], sequence[1][step], parity, step);
        }
        return parity;
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
        for (int i = 0; i < kDoublings<kBits>; ++i) difference = Simd::add_saturated(difference, difference);
        return Simd::square(difference);
    }

    void advance(int16_t target0, int16_t target1, int parity, int step) {
        const Vector x0 = Simd::broadcast(target0), x1 = Simd::broadcast(target1);
        const Vector ceiling = Simd::broadcast(kUnreachable);
        const uint16_t* from0 = work_.metrics[0][parity].data();
        const uint16_t* from1 = work_.metrics[1][parity].data();
        uint16_t* to0 = work_.metrics[0][parity ^ 1].data();
        uint16_t* to1 = work_.metrics[1][parity ^ 1].data();
        const long predecessors = nodes_ >> kBits;
        uint32_t* choice0 = work_.decisions[0].data() + step * blocks_ * (kSymbols - 1);
        uint32_t* choice1 = work_.decisions[1].data() + step * blocks_ * (kSymbols - 1);
        const int16_t* values = values_;
        for (long block = 0; block < blocks_; ++block) {
            const long first = block * Simd::kLanes >> kBits;
            Vector value = Simd::load(values);
            Vector best0 = Simd::add(Simd::template expand<kBits>(from0 + first), cost(value, x0));
            Vector best1 = Simd::add(Simd::template expand<kBits>(from1 + first), cost(value, x1));
#pragma GCC unroll 4
            for (int dropped = 1; dropped < kSymbols; ++dropped) {
                const long from = first + dropped * predecessors;
                value = Simd::load(values + dropped * Simd::kLanes);
                const Vector next0 = Simd::add(Simd::template expand<kBits>(from0 + from), cost(value, x0));
                const Vector next1 = Simd::add(Simd::template expand<kBits>(from1 + from), cost(value, x1));
                *choice0++ = Simd::less(next0, best0);
                *choice1++ = Simd::less(next1, best1);
                best0 = Simd::minimum(best0, next0);
                best1 = Simd::minimum(best1, next1);
            }
            values += kSymbols * Simd::kLanes;
            Simd::store(to0 + block * Simd::kLanes, Simd::minimum(best0, ceiling));
            Simd::store(to1 + block * Simd::kLanes, Simd::minimum(best1, ceiling));
        }
    }

    // Walk back from `node` after `steps` steps to the node after `stop` steps, writing the symbols passed.
    int trace_back(int tile, int node, int steps, int stop, uint8_t* path) const {
        for (int step = steps - 1; step >= stop; --step) {
            path[step] = static_cast<uint8_t>(node & (kSymbols - 1));
            const long at = (step * blocks_ + node / Simd::kLanes) * (kSymbols - 1);
            const uint32_t* choice = work_.decisions[tile].data() + at;
            const int bit = node % Simd::kLanes * Simd::kMaskStride;
            int dropped = kSymbols - 1;
            while (dropped > 0 && !(choice[dropped - 1] >> bit & 1)) --dropped;
            node = (node | dropped << node_bits_) >> kBits;
        }
        return node;
    }

    long nodes_, blocks_;
    int node_bits_;
    const int16_t* values_;
    Workspace& work_;
};

template <class Simd>
void encode_group(const Code& code, const int16_t* values, const int16_t* targets, int tiles,
                  int first_pass_steps, uint8_t* symbols) {
    static thread_local Workspace workspace;
    workspace.reserve(code, Simd::kLanes);
    switch (code.bits) {
        case 2: return Search<Simd, 2>(code, values, workspace).encode(targets, tiles, first_pass_steps, symbols);
        case 3: return Search<Simd, 3>(code, values, workspace).encode(targets, tiles, first_pass_steps, symbols);
        case 4: return Search<Simd, 4>(code, values, workspace).encode(targets, tiles, first_pass_steps, symbols);
        case 5: return Search<Simd, 5>(code, values, workspace).encode(targets, tiles, first_pass_steps, symbols);
        case 6: return Search<Simd, 6>(code, values, workspace).encode(targets, tiles, first_pass_steps, symbols);
    }
}

}  // namespace ernieq::viterbi
