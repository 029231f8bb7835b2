// Which build of the kernels runs: the best one that this processor can, decided at the first call.
#pragma once

#include "cpu/kernels.h"

namespace hybrid_lm {

const Kernels& kernels();

// Makes `isa` the build that runs from now on ("": the best one); false if it is not in this library or this
// processor lacks it. For tests; not while kernels run.
bool use_isa(const char* isa);

}  // namespace hybrid_lm
