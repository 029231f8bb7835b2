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
  const S* B;  // [token][state], the same for all lanes
  const S* C;
  int64_t B_step, C_step;  // from one token to the next
  const uint8_t* reset;  // [token]: true where the state before the token is forgotten
};

// One token of a lane whose N states are in registers: h is updated; returns C_t . h_t.
template <int N, class L>
HYBRID_LM_FN typename L::V scan_token(typename L::V (&h)[N], const typename L::V (&A)[N], typename L::V dt,
                                      typename L::V input, const typename L::S (&B)[N],
                                      const typename L::S (&C)[N]) {
  using V = typename L::V;
  // Two sums: half as long a chain of additions.
  V even = V{}, odd = V{};
  for (int n = 0; n < N; ++n) {
    h[n] = L::exp2(dt * A[n]) * h[n] + input * B[n];
    (n % 2 ? odd : even) += h[n] * C[n];
  }
  return even + odd;
}

// h (`stride` V's from one state to the next) is updated; C_t . h_t is added to y.
template <int N, class L>
HYBRID_LM_FN void scan_forward(const ScanTokens<L>& v, const typename L::V* A, typename L::V* h, int64_t stride,
                               typename L::V* y) {
  using V = typename L::V;
  V s[N];
  for (int n = 0; n < N; ++n) s[n] = h[n * stride];
  for (int t = 0; t < v.count; ++t) {
    const V dt = v.dt[t * v.step], input = v.input[t * v.step];
    const auto *B = v.B + t * v.B_step, *C = v.C + t * v.C_step;
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

// What the backward pass keeps of a chunk, for each token and N states side by side: a pass reads and writes one
// stretch of memory after the other.
template <int N, class V>
struct ScanTrace {
  V decay[N];
  V state[N];  // that the token finds
  V gB[N], gC[N];
};

// The same as scan_forward from h on, which stays, leaving a trace. gC gets what each lane has to say, gout_t h_t.
template <int N, class L>
HYBRID_LM_FN void scan_recompute(const ScanTokens<L>& v, const typename L::V* A, const typename L::V* h,
                                 int64_t stride, const typename L::V* gout, ScanTrace<N, typename L::V>* trace,
                                 typename L::V* y) {
  using V = typename L::V;
  V s[N];
  for (int n = 0; n < N; ++n) s[n] = h[n * stride];
  for (int t = 0; t < v.count; ++t) {
    const V dt = v.dt[t * v.step], input = v.input[t * v.step], g = gout[t * v.step];
    const auto *B = v.B + t * v.B_step, *C = v.C + t * v.C_step;
    auto& kept = trace[t];
    if (v.reset[t])
      for (int n = 0; n < N; ++n) s[n] = V{};
    V even = y[t * v.step], odd = V{};
    for (int n = 0; n < N; ++n) {
      const V decay = L::exp2(dt * A[n * stride]);
      kept.decay[n] = decay;
      kept.state[n] = s[n];
      s[n] = decay * s[n] + input * B[n];
      kept.gC[n] += s[n] * g;
      (n % 2 ? odd : even) += s[n] * C[n];
    }
    y[t * v.step] = even + odd;
  }
}

// From the last token to the first. g: what later tokens ask of the state, turned into what this stretch asks of the
// state before it. ginput, gdt (through the decay, and still times log2(e)), gA and the trace's gB are added to.
template <int N, class L>
HYBRID_LM_FN void scan_reverse(const ScanTokens<L>& v, const typename L::V* A, typename L::V* g, typename L::V* gA,
                               int64_t stride, const typename L::V* gout, ScanTrace<N, typename L::V>* trace,
                               typename L::V* ginput, typename L::V* gdt) {
  using V = typename L::V;
  V later[N], rate[N];
  for (int n = 0; n < N; ++n) later[n] = g[n * stride], rate[n] = gA[n * stride];
  for (int t = v.count - 1; t >= 0; --t) {
    const V dt = v.dt[t * v.step], input = v.input[t * v.step], out = gout[t * v.step];
    const auto *B = v.B + t * v.B_step, *C = v.C + t * v.C_step;
    auto& kept = trace[t];
    V gi = ginput[t * v.step], gd = gdt[t * v.step];
    for (int n = 0; n < N; ++n) {
      const V gh = out * C[n] + later[n];
      kept.gB[n] += gh * input;
      gi += gh * B[n];
      later[n] = gh * kept.decay[n];
      // decay = exp2(dt A), and the state enters as decay * state
      const V exponent = later[n] * kept.state[n];
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
