// The Python module of all C++ kernels. Each kernel registers itself from its own folder.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <stdexcept>

#include "isa.hpp"

namespace nb = nanobind;

namespace ernieq {

void register_viterbi(nb::module_& module);
void register_hadamard(nb::module_& module);
void register_trellis_matmul(nb::module_& module);

Isa best_isa() {
#ifdef ERNIEQ_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return Isa::Avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::Avx2;
#endif
    return Isa::Scalar;
}

Isa parse_isa(const std::string& name) {
    Isa isa;
    if (name == "scalar") isa = Isa::Scalar;
    else if (name == "avx2") isa = Isa::Avx2;
    else if (name == "avx512") isa = Isa::Avx512;
    else throw std::invalid_argument("unknown instruction set " + name);
    if (isa > best_isa()) throw std::invalid_argument("this processor lacks " + name);
    return isa;
}

static std::vector<std::string> available_isas() {
    std::vector<std::string> names{"scalar"};
    if (best_isa() >= Isa::Avx2) names.push_back("avx2");
    if (best_isa() >= Isa::Avx512) names.push_back("avx512");
    return names;
}

// The extensions that best_isa() asks for, and whether this processor has them.
static std::map<std::string, bool> processor_features() {
    std::map<std::string, bool> features;
#ifdef ERNIEQ_X86
    __builtin_cpu_init();
#define ERNIEQ_FEATURE(name) features[name] = __builtin_cpu_supports(name)
    ERNIEQ_FEATURE("avx2");
    ERNIEQ_FEATURE("fma");
    ERNIEQ_FEATURE("avx512f");
    ERNIEQ_FEATURE("avx512bw");
    ERNIEQ_FEATURE("avx512vl");
    ERNIEQ_FEATURE("avx512dq");
#undef ERNIEQ_FEATURE
#endif
    return features;
}

}  // namespace ernieq

NB_MODULE(_native, module) {
    module.doc() = "C++ kernels of ernieq; use the Python functions of ernieq.kernels.";
    module.def("available_isas", &ernieq::available_isas, "Instruction sets of this processor, best last.");
    module.def("processor_features", &ernieq::processor_features, "Extensions that the kernels ask for.");
    ernieq::register_viterbi(module);
    ernieq::register_hadamard(module);
    ernieq::register_trellis_matmul(module);
}
