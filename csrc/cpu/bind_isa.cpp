// hybrid_lm_native::isa and ::use_isa: which build of the kernels runs.
#include "cpu/bind.h"

namespace hybrid_lm {
namespace {

std::string isa() { return kernels().isa; }

bool use(std::string name) { return use_isa(name.c_str()); }

STABLE_TORCH_LIBRARY_IMPL(hybrid_lm_native, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("use_isa", TORCH_BOX(&use));
}

}  // namespace
}  // namespace hybrid_lm
