#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

namespace hybrid_lm {

namespace baseline { extern const Kernels kernels; }
#ifdef HYBRID_LM_HAS_AVX2
namespace avx2 { extern const Kernels kernels; }
#endif
#ifdef HYBRID_LM_HAS_AVX512
namespace avx512 { extern const Kernels kernels; }
#endif

namespace {

// The builds of this library that this processor runs, best first, ended by null.
const Kernels* const* usable() {
  static const Kernels* found[4] = {};
  static const bool once = [] {
    int n = 0;
#ifdef HYBRID_LM_HAS_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma"))
      found[n++] = &avx512::kernels;
#endif
#ifdef HYBRID_LM_HAS_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found[n++] = &avx2::kernels;
#endif
    found[n++] = &baseline::kernels;
    return true;
  }();
  (void)once;
  return found;
}

std::atomic<const Kernels*> chosen{nullptr};

// Memory that belongs to a thread and grows to what its largest work item needs (about a megabyte).
struct Scratch {
  void* memory = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(memory); }
};
thread_local Scratch own;

}  // namespace

const Kernels& kernels() {
  const Kernels* k = chosen.load(std::memory_order_relaxed);
  if (!k) chosen.store(k = usable()[0], std::memory_order_relaxed);
  return *k;
}

bool use_isa(const char* isa) {
  for (const Kernels* const* k = usable(); *k; ++k)
    if (!*isa || !std::strcmp(isa, (*k)->isa)) {
      chosen.store(*k, std::memory_order_relaxed);
      return true;
    }
  return false;
}

void* scratch(size_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
#ifdef __SANITIZE_ADDRESS__
  // A block of just this size, so that the sanitizer sees the first byte beyond it.
  own.size = 0;
#endif
  if (bytes > own.size) {
    std::free(own.memory);
    own.memory = std::aligned_alloc(64, bytes);
    own.size = own.memory ? bytes : 0;
    if (!own.memory) throw std::bad_alloc();
  }
  return own.memory;
}

}  // namespace hybrid_lm
