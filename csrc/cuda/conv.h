// The causal convolution on CUDA: arguments and entry points. No torch and no CUDA here.
#pragma once

#include "hybrid_lm/view.h"

namespace hybrid_lm {

// Shapes and strides as in hybrid_lm/ops; a View without data is an absent tensor. x, y and their gradients are of one
// type and have neighbouring channels side by side; the others are of any type and stride.
struct ConvArgs {
  void* stream;
  int64_t batch, tokens, width, taps;
  View x, weight, bias, initial;
  View reset;  // (b t) bool, read as uint8_t
  bool silu;
  View y, state;  // state: (b w-1 d); may be `initial` itself if `conv_is_whole`
};

struct ConvGradArgs : ConvArgs {
  View gy, gstate;  // may be absent: zeros; gstate and ginitial are of x's type, with neighbours side by side
  View gx, gweight, gbias, ginitial;
  View parts;  // float, `conv_parts` numbers: sums of the weights' gradients that blocks have
};

const char* conv(const ConvArgs&);
const char* conv_backward(const ConvGradArgs&);

// Whether one thread goes through all tokens of its channels: it has read `initial` before it writes the state.
bool conv_is_whole(const ConvArgs&);
// Numbers in `parts`.
int64_t conv_parts(const ConvGradArgs&);

// Taps that the kernels have registers for.
constexpr int64_t CONV_TAPS = 8;

}  // namespace hybrid_lm
