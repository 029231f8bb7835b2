// What the bindings ask of the kernels: arguments as plain structs, and a function for each kernel, which starts it on
// a stream and says what went wrong, or null. No torch and no CUDA here.
#pragma once

#include "hybrid_lm/view.h"

namespace hybrid_lm {

// Shapes and strides as in hybrid_lm/ops; a View without data is an absent tensor. x, dt, B, C, z, y and their
// gradients are of one type and have neighbouring numbers along the last axis; the others are of any type and stride.
struct ScanArgs {
  void* stream;
  int64_t batch, tokens, width, states;
  View x, dt, A, B, C, D, z, dt_bias, initial;
  View reset;  // (b t) bool, read as uint8_t
  bool dt_softplus;
  View y, state;  // state: (b d n), may be `initial` itself
  View before;    // (k b n d) float: the state before every stretch of tokens, for the backward pass; or absent
};

struct ScanGradArgs : ScanArgs {
  View gy, gstate;  // may be absent: zeros
  View gx, gdt, gA, gB, gC, gD, gz, gdt_bias, ginitial;
  float* scratch;   // as much as scan_backward_scratch says
};

const char* scan(const ScanArgs&);
const char* scan_backward(const ScanGradArgs&);
// Floats that the backward pass sums up in.
int64_t scan_backward_scratch(const ScanGradArgs&);

// Tokens between two states that `before` keeps.
constexpr int64_t SCAN_CHUNK = 32;
// States that the kernels have lanes for; and up to which the backward pass takes x as any type, not float32 alone.
constexpr int64_t SCAN_STATES = 256, SCAN_TYPED = 16;

}  // namespace hybrid_lm
