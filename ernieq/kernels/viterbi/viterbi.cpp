// Python entry of the Viterbi search: checks, the blocked value table, threads.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <vector>

#include "isa.hpp"
#include "rates.hpp"
#include "viterbi.hpp"

namespace nb = nanobind;

namespace ernieq {
namespace viterbi {
namespace {

using Targets = nb::ndarray<const int16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Values = nb::ndarray<const int16_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Symbols = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

struct Path {
    EncodeGroup encode;
    int lanes;
};

Path path_of(Isa isa) {
#ifdef ERNIEQ_X86
    if (isa == Isa::Avx512) return {encode_group_avx512, kLanesAvx512};
    if (isa == Isa::Avx2) return {encode_group_avx2, kLanesAvx2};
#endif
    (void)isa;
    return {encode_group_scalar, kLanesScalar};
}

// [node block][dropped bits][lane], in 1/32 of a value unit: the order in which a step reads it whose next weight has
// this parity.
std::vector<int16_t> blocked_values(const Code& code, int next_parity, const int16_t* values, int lanes) {
    std::vector<int16_t> table;
    table.reserve(1L << code.state_bits);
    const long nodes = code.nodes(next_parity);
    for (long block = 0; block < nodes; block += lanes)
        for (long dropped = 0; dropped < code.symbols(next_parity); ++dropped)
            for (int lane = 0; lane < lanes; ++lane)
                table.push_back(static_cast<int16_t>(values[dropped * nodes + block + lane] * kTargetUnit));
    return table;
}

void encode(Targets targets, Values values, int pair_bits, int state_bits, int first_pass_steps, Symbols symbols,
            const std::string& isa, int threads) {
    const Code code{pair_bits, state_bits};
    const long tiles = static_cast<long>(targets.shape(0));
    if (!is_code(pair_bits, state_bits) || code.nodes(1) < kLanesAvx512)
        throw std::invalid_argument("unsupported trellis code");
    if (targets.shape(1) != kTileWeights || symbols.shape(0) != targets.shape(0) ||
        symbols.shape(1) != kTileWeights || values.shape(0) != size_t{1} << state_bits)
        throw std::invalid_argument("targets, values and symbols do not fit together");
    if (first_pass_steps < 4 || first_pass_steps > kTileWeights || first_pass_steps % 4)
        throw std::invalid_argument("first_pass_steps must be a multiple of 4, 4 to 256");

    const Path path = path_of(parse_isa(isa));
    const std::vector<int16_t> before_even = blocked_values(code, 0, values.data(), path.lanes);
    std::vector<int16_t> before_odd;
    if (pair_bits % 2) before_odd = blocked_values(code, 1, values.data(), path.lanes);
    const Tables tables{{pair_bits % 2 ? before_odd.data() : before_even.data(), before_even.data()}};
    const int16_t* from = targets.data();
    uint8_t* to = symbols.data();
    nb::gil_scoped_release release;
    parallel_for((tiles + kTilesTogether - 1) / kTilesTogether, threads, [&](long group) {
        const long first = group * kTilesTogether;
        const int count = static_cast<int>(std::min<long>(kTilesTogether, tiles - first));
        path.encode(code, tables, from + first * kTileWeights, count, first_pass_steps,
                    to + first * kTileWeights);
    });
}

}  // namespace
}  // namespace viterbi

void register_viterbi(nb::module_& module) {
    module.def("viterbi_encode", &viterbi::encode, nb::arg("targets"), nb::arg("values"), nb::arg("pair_bits"),
               nb::arg("state_bits"), nb::arg("first_pass_steps"), nb::arg("symbols"), nb::arg("isa"),
               nb::arg("threads"));
}

}  // namespace ernieq
