// The functions inside the recurrences, written once for every kind of lane that a kernel computes with. A kind L
// (`Lanes` of cpu/simd.h: a vector of a CPU; a CUDA thread's single number) brings the types V (what it computes
// with) and S (one element of it) and the functions exp2(V), log1p(V) on [0, 1], reciprocal(V), select(mask, V, V) and
// broadcast(S); the rest is arithmetic. NaN and infinity go through all of them.
#pragma once

#include "hybrid_lm/portable.h"

namespace hybrid_lm {

constexpr double LOG2E = 1.44269504088896340736;

// log(1 + exp(v)) = max(v, 0) + log1p(exp(-|v|)). A NaN is not above 0 and comes out through exp.
template <class L>
HYBRID_LM_FN typename L::V softplus(typename L::V v) {
  using S = typename L::S;
  auto positive = v > S(0);
  auto small = L::exp2(L::select(positive, -v, v) * S(LOG2E));
  return L::select(positive, v, L::broadcast(0)) + L::log1p(small);
}

// 1 / (1 + exp(-v)), which is also the derivative of softplus.
template <class L>
HYBRID_LM_FN typename L::V sigmoid(typename L::V v) {
  using S = typename L::S;
  return L::reciprocal(L::exp2(v * S(-LOG2E)) + S(1));
}

template <class L>
HYBRID_LM_FN typename L::V silu(typename L::V v) {
  return v * sigmoid<L>(v);
}

// The derivative of silu at v, given s = sigmoid(v).
template <class L>
HYBRID_LM_FN typename L::V silu_slope(typename L::V v, typename L::V s) {
  using S = typename L::S;
  return s + v * s * (S(1) - s);
}

}  // namespace hybrid_lm
