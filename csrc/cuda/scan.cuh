// What the forward and the backward pass of the selective scan share: who does what, and the rows of B and C that a
// block reads together.
//
// A channel belongs to LANES neighbouring lanes of a warp, which have STATES states each, in registers; a block has
// THREADS / LANES channels of one row of the batch. It walks the tokens in stages: B and C of a stage lie in shared
// memory as floats, for all channels, and those of the next stage are on their way. What there is once for a token
// and channel (dt, x, z, y) is loaded, computed and written by one lane of the channel's, for OWN tokens of each group
// of GROUP: one lane has all of them, eight lanes have one each.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "hybrid_lm/scan.h"

namespace hybrid_lm {

template <int LANES_, int STATES_, int THREADS_, int GROUP_>
struct ScanLanes {
  static constexpr int LANES = LANES_, STATES = STATES_, THREADS = THREADS_, GROUP = GROUP_;
  static constexpr int WIDTH = LANES * STATES;      // states that a channel has room for
  static constexpr int CHANNELS = THREADS / LANES;  // of a block
  static constexpr int OWN = GROUP > LANES ? GROUP / LANES : 1;
  static constexpr int SAME = LANES > GROUP ? LANES / GROUP : 1;  // lanes that own the same token
  static constexpr int VEC = STATES < 4 ? STATES : 4;

  // The states of a lane lie in pieces of VEC, so that what neighbouring lanes read lies side by side.
  static HYBRID_LM_DEVICE int state(int k, unsigned lane) { return (k / VEC * LANES + int(lane)) * VEC + k % VEC; }
};

// Where a thread is.
template <class Shape>
struct ScanPlace {
  unsigned lane;         // of the channel's
  int64_t row, channel;  // of the batch; of all channels
  bool there;            // else beyond the last channel: it does what that one does, and writes nothing

  HYBRID_LM_DEVICE ScanPlace(const ScanArgs& a, int64_t row, int64_t block) : row(row) {
    lane = threadIdx.x % Shape::LANES;
    channel = block * Shape::CHANNELS + threadIdx.x / Shape::LANES;
    there = channel < a.width;
    if (!there) channel = a.width - 1;
  }
};

// A stage's rows, the same for all channels of a block.
template <int STEPS, int WIDTH>
struct alignas(16) ScanStage {
  float B[STEPS][WIDTH];
  float C[STEPS][WIDTH];
  int mark[STEPS];
};

// What a token may be marked as: a document's first; or beyond the last one, where no state may be touched: even with a
// step of 0 the decay is NaN for a rate of infinity.
constexpr int FIRST = 1, BEYOND = 2;

HYBRID_LM_DEVICE int mark_of(const ScanArgs& a, int64_t row, int64_t t) {
  if (t >= a.tokens) return BEYOND;
  return a.reset && static_cast<const uint8_t*>(a.reset.data)[row * a.reset.stride[0] + t * a.reset.stride[1]] ? FIRST : 0;
}

// The rows of B and C, and the marks, on their way from memory to a stage; 0 beyond the last token and state.
template <class T, class Shape, int STEPS>
struct ScanRows {
  static constexpr int COUNT = STEPS * Shape::WIDTH / Shape::THREADS;
  static_assert(COUNT * Shape::THREADS == STEPS * Shape::WIDTH && STEPS <= Shape::THREADS);
  typename T::Bits B[COUNT], C[COUNT];
  int mark;

  HYBRID_LM_DEVICE void fetch(const ScanArgs& a, int64_t row, int64_t start) {
    using Bits = typename T::Bits;
    const auto* from_B = static_cast<const Bits*>(a.B.data) + row * a.B.stride[0];
    const auto* from_C = static_cast<const Bits*>(a.C.data) + row * a.C.stride[0];
    HYBRID_LM_UNROLL
    for (int i = 0; i < COUNT; ++i) {
      const int at = i * Shape::THREADS + int(threadIdx.x), n = at % Shape::WIDTH;
      const int64_t t = start + at / Shape::WIDTH;
      const bool there = t < a.tokens && n < a.states;
      B[i] = there ? from_B[t * a.B.stride[1] + n] : Bits(0);
      C[i] = there ? from_C[t * a.C.stride[1] + n] : Bits(0);
    }
    mark = threadIdx.x < STEPS ? mark_of(a, row, start + threadIdx.x) : 0;
  }

  HYBRID_LM_DEVICE void put(ScanStage<STEPS, Shape::WIDTH>& to) const {
    HYBRID_LM_UNROLL
    for (int i = 0; i < COUNT; ++i) {
      const int at = i * Shape::THREADS + int(threadIdx.x);
      (&to.B[0][0])[at] = T::wide(B[i]);
      (&to.C[0][0])[at] = T::wide(C[i]);
    }
    if (threadIdx.x < STEPS) to.mark[threadIdx.x] = mark;
  }
};

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

// The rates of a lane's states, times log2(e); 0 beyond the last state.
template <class Shape>
HYBRID_LM_DEVICE void scan_rates(const ScanArgs& a, const ScanPlace<Shape>& at, float (&A)[Shape::STATES]) {
  HYBRID_LM_UNROLL
  for (int k = 0; k < Shape::STATES; ++k) {
    const int64_t n = Shape::state(k, at.lane);
    A[k] = n < a.states ? read(a.A, at.channel * a.A.stride[0] + n * a.A.stride[1]) * float(LOG2E) : 0.0f;
  }
}

// The numbers of one of the tensors (b t d), for the tokens that this lane owns, on their way. Between groups the place
// is kept, in 64 bits, and inside of one 32 are enough (`in_rows` of bind.h).
template <class T, class Shape>
struct ScanOwned {
  typename T::Bits at[Shape::OWN];

  // `here` points at the first of the tokens; `left` of them are there.
  HYBRID_LM_DEVICE void fetch(const typename T::Bits* here, int stride, int left) {
    HYBRID_LM_UNROLL
    for (int i = 0; i < Shape::OWN; ++i) at[i] = i < left ? here[i * stride] : typename T::Bits(0);
  }
};

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

// The number that the owner of token i of a group has of it.
template <class Shape>
HYBRID_LM_DEVICE float scan_owners(const float (&owned)[Shape::OWN], int i) {
  if constexpr (Shape::LANES == 1) return owned[i];
  return __shfl_sync(ALL_LANES, owned[i % Shape::OWN], i / Shape::OWN * Shape::SAME, Shape::LANES);
}

// Channels that fill a large device: 132 processors with about 250 threads each. Tests have fewer, and want all shapes.
#if defined(HYBRID_LM_EMULATE)
constexpr int64_t SCAN_ENOUGH = 48;
#else
constexpr int64_t SCAN_ENOUGH = 32768;
#endif

template <class F>
inline auto with_type(Type type, const F& f) {
  if (type == Type::f32) return f(Float());
  return type == Type::bf16 ? f(BFloat()) : f(Half());
}

}  // namespace hybrid_lm
