// One token of Mamba-2, or of SSD alone, on CUDA: arguments and entry point. No torch and no CUDA here.
#pragma once

#include "hybrid_lm/view.h"

namespace hybrid_lm {

// A View without data is an absent tensor. Channels: heads head_dim of x, then groups states of B, and as many of C.
struct StepArgs {
  void* stream;
  int64_t batch, heads, head_dim, groups, states, taps;  // no taps: the channels come as the convolution left them
  View xBC, dt, z, weight, bias, A, D, dt_bias;          // (b c), (b h), (b h p), (c w), (c), (h), (h), (h)
  View reset;                                            // (b) bool, read as uint8_t
  bool dt_softplus;
  float dt_low, dt_high;
  View conv;     // (b w-1 c), in place
  View state;    // (b h p n) float without gaps, in place
  View tickets;  // (b g) int32, zeros before and after
  View y;        // (b h p)
};

const char* step(const StepArgs&);

// Filter taps that a token may have.
constexpr int64_t STEP_TAPS = 16;

}  // namespace hybrid_lm
