// hybrid_lm_native::isa and ::use_isa of the library for tests: in which order the emulated threads and blocks run.
#if defined(HYBRID_LM_EMULATE)
#include "cuda/bind.h"
#include "cuda/emulation.h"

namespace hybrid_lm {
namespace {

std::string isa() { return emulation::state.backwards ? "emulated backwards" : "emulated"; }

bool use(std::string name) {
  if (name != "" && name != "emulated" && name != "emulated backwards") return false;
  emulation::state.backwards = name == "emulated backwards";
  return true;
}

STABLE_TORCH_LIBRARY_IMPL(hybrid_lm_native, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("use_isa", TORCH_BOX(&use));
}

}  // namespace
}  // namespace hybrid_lm
#endif
