// The functions inside the recurrences, written once for every kind of lane that a kernel computes with. A kind L
// (`Lanes` of cpu/simd.h: a vector of a CPU; a CUDA thread's single number) brings the types V (what it computes
// with) and S (one element of it) and the functions exp2(V), select(mask, V, V) and broadcast(S); the rest is
// arithmetic. NaN and infinity go through all of them.
#pragma once

#include "hybrid_lm/portable.h"

namespace hybrid_lm {

constexpr double LOG2E = 1.44269504088896340736;

// log(1 + t) for 0 <= t <= 1, precise in relative terms down to the smallest t: t times a polynomial.
// The coefficients are those of least relative error: 6e-8 (float), 3e-16 (double); see log1p of cpu/simd.h.

// log(1 + exp(v)) = max(v, 0) + log1p(exp(-|v|)).
template <class L>
HYBRID_LM_FN typename L::V softplus(typename L::V v) {
  using S = typename L::S;
  auto positive = v > S(0);
  auto t = L::exp2(L::select(positive, -v, v) * S(LOG2E));
  // v - v, not 0: a NaN is no positive number and must come out.
  return L::select(positive, v, L::broadcast(0)) + L::log1p(t);
}

// 1 / (1 + exp(-v)), which is also the derivative of softplus.
template <class L>
HYBRID_LM_FN typename L::V sigmoid(typename L::V v) {
  using S = typename L::S;
  return L::broadcast(1) / (L::exp2(v * S(-LOG2E)) + S(1));
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
