// The selective scan along a stretch of tokens, for N_STATES states of one set of lanes (CPU: a vector of channels;
// CUDA: one thread's channel). h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t, with rates A given times log2(e), so
// that the decay is one exp2. Gu & Dao 2023, arXiv:2312.00752, eq. 2.
#pragma once

#include "hybrid_lm/math.h"

namespace hybrid_lm {

// Tokens of one set of lanes; arrays over tokens are `step` apart, B, C and reset are the same for all lanes.
template <class V, class S>
struct ScanTokens {
  int count;
  int64_t step;          // V's from one token to the next in dt, input, y, ...
  const V* dt;           // step size
  const V* input;        // dt x
  const S* B;            // [token][state], `states` apart
  const S* C;
  int64_t states;
  const uint8_t* reset;  // [token]; true: the state before it is forgotten
};

// Goes forward: h (N_STATES, `lanes` apart) is updated, C_t . h_t is added to y.
template <int N_STATES, class V, class S>
HYBRID_LM_FN void scan_forward(const ScanTokens<V, S>& v, const V* A, V* h, int64_t lanes, V* y) {
  V s[N_STATES];
  for (int n = 0; n < N_STATES; ++n) s[n] = h[n * lanes];
  for (int t = 0; t < v.count; ++t) {
    const V dt = v.dt[t * v.step], input = v.input[t * v.step];
    const S *B = v.B + t * v.states, *C = v.C + t * v.states;
    if (v.reset[t])
      for (int n = 0; n < N_STATES; ++n) s[n] = V{};
    V even = y[t * v.step], odd = V{};
    for (int n = 0; n < N_STATES; ++n) {
      s[n] = exp2(dt * A[n * lanes]) * s[n] + input * B[n];
      (n % 2 ? odd : even) += s[n] * C[n];
    }
    y[t * v.step] = even + odd;
  }
  for (int n = 0; n < N_STATES; ++n) h[n * lanes] = s[n];
}

}  // namespace hybrid_lm
