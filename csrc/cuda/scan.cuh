// What the forward and the backward pass of the selective scan share: how a channel's states lie in lanes, what tokens
// are marked as, the step of a token.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "hybrid_lm/scan.h"

namespace hybrid_lm {

// A channel belongs to LANES neighbouring lanes of a warp, which have STATES states each, in registers, and go through
// GROUP tokens at a time.
template <int LANES_, int STATES_, int THREADS_, int GROUP_>
struct ScanLanes {
  static constexpr int LANES = LANES_, STATES = STATES_, THREADS = THREADS_, GROUP = GROUP_;
  static constexpr int WIDTH = LANES * STATES;  // states that a channel has room for
  static constexpr int SETS = THREADS / LANES;  // of lanes
  static constexpr int VEC = STATES < 4 ? STATES : 4;

  // The states of a lane lie in pieces of VEC, so that what neighbouring lanes read lies side by side.
  static HYBRID_LM_DEVICE int state(int k, unsigned lane) { return (k / VEC * LANES + int(lane)) * VEC + k % VEC; }
};

// What a token may be marked as: a document's first; or beyond the last one, where no state may be touched: even with a
// step of 0 the decay is NaN for a rate of infinity.
constexpr int FIRST = 1, BEYOND = 2;

HYBRID_LM_DEVICE int mark_of(const ScanArgs& a, int64_t row, int64_t t) {
  if (t >= a.tokens) return BEYOND;
  return a.reset && static_cast<const uint8_t*>(a.reset.data)[row * a.reset.stride[0] + t * a.reset.stride[1]] ? FIRST : 0;
}

// A token's numbers of a channel's states, from shared memory.
template <class Shape>
HYBRID_LM_DEVICE void scan_states(const float* row, unsigned lane, float (&to)[Shape::STATES]) {
  HYBRID_LM_UNROLL
  for (int k = 0; k < Shape::STATES; k += Shape::VEC) {
    const auto piece = *reinterpret_cast<const Floats<Shape::VEC>*>(row + Shape::state(k, lane));
    HYBRID_LM_UNROLL
    for (int i = 0; i < Shape::VEC; ++i) to[k + i] = piece.at[i];
  }
}

// The tokens that are left, as far as a group goes.
template <class Shape>
HYBRID_LM_DEVICE int scan_left(int64_t left) {
  return left < Shape::GROUP ? int(left) : Shape::GROUP;
}

template <class T>
HYBRID_LM_DEVICE typename T::Bits* scan_at(const View& v, int64_t row, int64_t token, int64_t channel) {
  return static_cast<typename T::Bits*>(v.data) + row * v.stride[0] + token * v.stride[1] + channel;
}

// The softplus of math.h, to the same bit; the multiplication takes the sign off, not a comparison and a choice.
HYBRID_LM_DEVICE float scan_softplus(float v) {
  return (v > 0.0f ? v : 0.0f) + Thread::log1p(Thread::exp2(fabsf(v) * float(-LOG2E)));
}

// The steps of tokens, after the bias and softplus.
template <int COUNT>
HYBRID_LM_DEVICE void scan_steps(float (&dt)[COUNT], float bias, bool with_softplus) {
  HYBRID_LM_UNROLL
  for (int i = 0; i < COUNT; ++i) dt[i] += bias;
  if (with_softplus) {
    HYBRID_LM_UNROLL
    for (int i = 0; i < COUNT; ++i) dt[i] = scan_softplus(dt[i]);
  }
}

template <class F>
inline auto with_type(Type type, const F& f) {
  if (type == Type::f32) return f(Float());
  return type == Type::bf16 ? f(BFloat()) : f(Half());
}

}  // namespace hybrid_lm
