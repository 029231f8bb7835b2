// What bind.cpp asks of the kernels: arguments as plain structs, one table of functions per build (ISA), and the two
// services that the kernels ask back, threads and scratch memory. No torch here.
#pragma once

#include <cstddef>

#include "hybrid_lm/view.h"

namespace hybrid_lm {

// Runs `run(work, item)` for every item, on as many threads as there are, in any order: each thread takes the next
// item when it has done one, so that a slow core does not hold up the others.
using Parallel = void (*)(int64_t items, const void* work, void (*run)(const void* work, int64_t item));

// `bytes` of this thread's scratch memory, aligned to a cache line; valid until the thread's next call.
void* scratch(size_t bytes);

// The work items of one kernel call. A call of few operations stays on this thread: waking others takes longer.
template <class F>
inline void for_each_item(Parallel parallel, int64_t items, int64_t operations, const F& work) {
  if (items == 1 || operations < 200000) {
    for (int64_t i = 0; i < items; ++i) work(i);
    return;
  }
  parallel(items, &work, [](const void* f, int64_t item) { (*static_cast<const F*>(f))(item); });
}

// Shapes and strides as in hybrid_lm/ops; a View without data is an absent tensor. Float tensors of any type.
struct ScanArgs {
  Parallel parallel;
  int64_t batch, tokens, width, states;
  View x, dt, A, B, C, D, z, dt_bias, initial;
  View reset;  // (b t) bool, read as uint8_t
  bool dt_softplus;
  View y, state;  // state: (b d n) float or double, may be `initial` itself
  View before;    // (k b n d): the state before every chunk, for the backward pass; or absent
};

struct ScanGradArgs : ScanArgs {
  View gy, gstate;  // may be absent: zeros
  View gx, gdt, gA, gB, gC, gD, gz, gdt_bias, ginitial;
};

struct SsdArgs {
  Parallel parallel;
  int64_t batch, tokens, heads, head_dim, groups, states;
  View x, dt, A, B, C, D, dt_bias, initial;
  View reset;
  bool dt_softplus;
  double dt_low, dt_high;
  View y, state;  // state: (b h p n), may be `initial` itself
  View before;    // (k b h n p), or absent
};

struct SsdGradArgs : SsdArgs {
  View gy, gstate;
  View gx, gdt, gA, gB, gC, gD, gdt_bias, ginitial;
};

struct ConvArgs {
  Parallel parallel;
  int64_t batch, tokens, width, taps;
  View x, weight, bias, initial;
  View reset;
  bool silu;
  View y, state;  // state: (b w-1 d), may be `initial` itself
};

struct ConvGradArgs : ConvArgs {
  View gy, gstate;
  View gx, gweight, gbias, ginitial;
};

struct NormArgs {
  Parallel parallel;
  int64_t rows, width, groups;
  View x, gate, weight;  // (rows width) each, (width); gate and weight may be absent
  double eps, offset;    // offset: added to the weight
  enum Order : int { NORM, GATE_NORM, NORM_GATE, GATE } order;
  View y;
};

struct NormGradArgs : NormArgs {
  View gy;
  View gx, ggate, gweight;
};

struct LinearArgs {
  Parallel parallel;
  int64_t rows, width, outputs;
  View x, weight, bias;  // (rows width), (outputs width) with contiguous rows, (outputs) or absent
  View y;                // (rows outputs)
};

struct Kernels {
  const char* isa;
  void (*scan)(const ScanArgs&);
  void (*scan_backward)(const ScanGradArgs&);
  void (*ssd)(const SsdArgs&);
  void (*ssd_backward)(const SsdGradArgs&);
  void (*conv)(const ConvArgs&);
  void (*conv_backward)(const ConvGradArgs&);
  void (*norm)(const NormArgs&);
  void (*norm_backward)(const NormGradArgs&);
  void (*linear)(const LinearArgs&);
};

// Tokens between two states that `before` keeps.
constexpr int64_t SCAN_CHUNK = 32;
constexpr int64_t SSD_CHUNK = 64;

}  // namespace hybrid_lm
