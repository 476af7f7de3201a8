// The instruction sets that a kernel may be compiled for, and the choice between them at run time.
#pragma once

#include <string>

namespace ernieq {

enum class Isa { Scalar, Avx2, Avx512 };

// The best instruction set of this processor.
Isa best_isa();

// "scalar", "avx2" or "avx512"; throws std::invalid_argument for another name or one this processor lacks.
Isa parse_isa(const std::string& name);

// Run body(index) for index in 0..count-1 on `threads` threads; the order between threads is not defined.
template <class Body>
void parallel_for(long count, int threads, const Body& body);

}  // namespace ernieq

#include "parallel.inl"
