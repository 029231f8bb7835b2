// The selective scan along a stretch of tokens, for N states of one set of lanes (CPU: a vector of channels; CUDA: a
// thread's channel): h_t = exp(dt_t A) h_{t-1} + B_t (dt_t x_t), read out as C_t . h_t. The rates A come times
// log2(e), which makes the decay one exp2. Gu & Dao 2023, arXiv:2312.00752, eq. 2.
//
// The backward pass keeps no states: it computes a chunk of tokens again (scan_recompute) and goes through it from the
// end (scan_reverse).
#pragma once

#include "hybrid_lm/math.h"

namespace hybrid_lm {

// A stretch of tokens. What differs between lanes lies `step` V's apart from token to token.
template <class L>
struct ScanTokens {
  using V = typename L::V;
  using S = typename L::S;
  int count;
  int64_t step;
  const V* dt;
  const V* input;        // dt x
  const S* B;            // [token][state], the same for all lanes
  const S* C;
  int64_t states;        // from one token of B and C to the next
  const uint8_t* reset;  // [token]: true where the state before the token is forgotten
};

// h (`stride` V's from one state to the next) is updated; C_t . h_t is added to y.
template <int N, class L>
HYBRID_LM_FN void scan_forward(const ScanTokens<L>& v, const typename L::V* A, typename L::V* h, int64_t stride,
                               typename L::V* y) {
  using V = typename L::V;
  V s[N];
  for (int n = 0; n < N; ++n) s[n] = h[n * stride];
  for (int t = 0; t < v.count; ++t) {
    const V dt = v.dt[t * v.step], input = v.input[t * v.step];
    const auto *B = v.B + t * v.states, *C = v.C + t * v.states;
    if (v.reset[t])
      for (int n = 0; n < N; ++n) s[n] = V{};
    // Two sums: half as long a chain of additions.
    V even = y[t * v.step], odd = V{};
    for (int n = 0; n < N; ++n) {
      s[n] = L::exp2(dt * A[n * stride]) * s[n] + input * B[n];
      (n % 2 ? odd : even) += s[n] * C[n];
    }
    y[t * v.step] = even + odd;
  }
  for (int n = 0; n < N; ++n) h[n * stride] = s[n];
}

// The same from h on, keeping decay[t][n] and the states that the tokens find, states[t][n]. y as above; gC gets what
// each lane has to say, gout_t h_t.
template <int N, class L>
HYBRID_LM_FN void scan_recompute(const ScanTokens<L>& v, const typename L::V* A, const typename L::V* h,
                                 int64_t stride, const typename L::V* gout, typename L::V* decay,
                                 typename L::V* states, typename L::V* y, typename L::V* gC) {
  using V = typename L::V;
  V s[N];
  for (int n = 0; n < N; ++n) s[n] = h[n * stride];
  for (int t = 0; t < v.count; ++t) {
    const V dt = v.dt[t * v.step], input = v.input[t * v.step], g = gout[t * v.step];
    const auto *B = v.B + t * v.states, *C = v.C + t * v.states;
    if (v.reset[t])
      for (int n = 0; n < N; ++n) s[n] = V{};
    V even = y[t * v.step], odd = V{};
    for (int n = 0; n < N; ++n) {
      V a = L::exp2(dt * A[n * stride]);
      decay[t * N + n] = a;
      states[t * N + n] = s[n];
      s[n] = a * s[n] + input * B[n];
      gC[t * N + n] += s[n] * g;
      (n % 2 ? odd : even) += s[n] * C[n];
    }
    y[t * v.step] = even + odd;
  }
}

// From the last token to the first. g: what later tokens ask of the state, turned into what this stretch asks of the
// state before it. ginput, gdt (through the decay, and still times log2(e)) and gB are added to; gA too.
template <int N, class L>
HYBRID_LM_FN void scan_reverse(const ScanTokens<L>& v, const typename L::V* A, typename L::V* g, typename L::V* gA,
                               int64_t stride, const typename L::V* gout, const typename L::V* decay,
                               const typename L::V* states, typename L::V* ginput, typename L::V* gdt,
                               typename L::V* gB) {
  using V = typename L::V;
  V later[N], rate[N];
  for (int n = 0; n < N; ++n) later[n] = g[n * stride], rate[n] = gA[n * stride];
  for (int t = v.count - 1; t >= 0; --t) {
    const V dt = v.dt[t * v.step], input = v.input[t * v.step], out = gout[t * v.step];
    const auto *B = v.B + t * v.states, *C = v.C + t * v.states;
    V gi = ginput[t * v.step], gd = gdt[t * v.step];
    for (int n = 0; n < N; ++n) {
      V gh = out * C[n] + later[n];
      gB[t * N + n] += gh * input;
      gi += gh * B[n];
      // h_t = decay h_{t-1} + ..., decay = exp2(dt A)
      later[n] = gh * decay[t * N + n];
      V exponent = later[n] * states[t * N + n];
      rate[n] += exponent * dt;
      gd += exponent * A[n * stride];
    }
    // A document's first token finds a state of zeros, and asks nothing of what stands before it.
    if (v.reset[t])
      for (int n = 0; n < N; ++n) later[n] = V{};
    ginput[t * v.step] = gi;
    gdt[t * v.step] = gd;
  }
  for (int n = 0; n < N; ++n) g[n * stride] = later[n], gA[n * stride] = rate[n];
}

}  // namespace hybrid_lm
