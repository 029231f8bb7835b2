// How the arrays of a work item lie in its scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hybrid_lm {
namespace HYBRID_LM_ISA {

// Cuts one piece of memory into arrays that begin at cache lines. Without memory it only counts the bytes that they
// need: what lays out the arrays is asked twice, and no second list of sizes has to agree with it.
struct Arena {
  char* memory = nullptr;
  size_t bytes = 0;

  template <class T>
  T* take(int64_t count) {
    T* start = memory ? reinterpret_cast<T*>(memory + bytes) : nullptr;
    bytes += (count * sizeof(T) + 63) / 64 * 64;
    return start;
  }
};

}  // namespace HYBRID_LM_ISA
}  // namespace hybrid_lm
