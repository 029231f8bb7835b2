// The walkers of the forward scan: see scan.cu.
#pragma once

#include "cuda/scan_stage.cuh"

namespace hybrid_lm {

template <int VEC>
struct alignas(4 * VEC) Words {
  uint32_t at[VEC];
};

// Whether one of COUNT bytes is not 0.
template <int COUNT>
HYBRID_LM_DEVICE bool any_byte(const uint8_t* bytes) {
  constexpr int VEC = COUNT < 16 ? COUNT / 4 : 4;
  uint32_t found = 0;
  HYBRID_LM_UNROLL
  for (int k = 0; k < COUNT; k += VEC * 4) {
    const auto piece = *reinterpret_cast<const Words<VEC>*>(bytes + k);
    HYBRID_LM_UNROLL
    for (int i = 0; i < VEC; ++i) found |= piece.at[i];
  }
  return found;
}

// Goes through the rates, or states, of a block's channels: f(place among WALKERS for each, channel, state, whether
// there is one). What is of any type and stride is read here, in a loop, and not in the walkers' straight code.
template <class Shape, class F>
HYBRID_LM_DEVICE void each_number(const ScanArgs& a, int64_t block, const F& f) {
  HYBRID_LM_UNROLL_BY(1)
  for (int at = int(threadIdx.x); at < Shape::NUMBERS; at += SCAN_THREADS) {
    const int walker = at % WALKERS, c = at / WALKERS / Shape::STATES, k = at / WALKERS % Shape::STATES;
    const int64_t d = block * Shape::CHANNELS + walker / Shape::LANES * Shape::PER + c;
    const int64_t n = Shape::state(k, unsigned(walker % Shape::LANES));
    f(at, d, n, d < a.width && n < a.states);
  }
}

template <class Shape>
struct Walker {
  static constexpr int PER = Shape::PER, STATES = Shape::STATES, GROUP = Shape::GROUP;
  int64_t row, channel;
  int count;      // of its channels that are there
  unsigned lane;  // of the channels'
  float A[PER][STATES], h[PER][STATES];

  HYBRID_LM_DEVICE Walker(const ScanArgs& a, int64_t row, int64_t block, const float* rates, const float* states)
      : row(row),
        channel(block * Shape::CHANNELS + threadIdx.x / Shape::LANES * PER),
        lane(threadIdx.x % Shape::LANES) {
    const int64_t left = a.width - channel;
    count = left < 0 ? 0 : left < PER ? int(left) : PER;
    HYBRID_LM_UNROLL
    for (int c = 0; c < PER; ++c) {
      HYBRID_LM_UNROLL
      for (int k = 0; k < STATES; ++k) {
        const int at = (c * STATES + k) * WALKERS + int(threadIdx.x);
        A[c][k] = rates[at], h[c][k] = states[at];
      }
    }
  }

  // The states as `each_number` knows them.
  HYBRID_LM_DEVICE void put(float* states) const {
    HYBRID_LM_UNROLL
    for (int c = 0; c < PER; ++c) {
      HYBRID_LM_UNROLL
      for (int k = 0; k < STATES; ++k) states[(c * STATES + k) * WALKERS + int(threadIdx.x)] = h[c][k];
    }
  }

  // The states before a stretch, for the backward pass.
  HYBRID_LM_DEVICE void keep(const ScanArgs& a, int64_t start) const {
    float* kept = static_cast<float*>(a.before.data) + channel +
                  (start / SCAN_CHUNK * a.batch + row) * a.states * a.width;
    HYBRID_LM_UNROLL
    for (int k = 0; k < STATES; ++k) {
      const int64_t n = Shape::state(k, lane);
      if (n >= a.states) continue;
      HYBRID_LM_UNROLL
      for (int c = 0; c < PER; ++c)
        if (c < count) kept[n * a.width + c] = h[c][k];
    }
  }

  // What a token needs.
  struct Token {
    float B[STATES], C[STATES];
    Floats<2 * PER> given;

    HYBRID_LM_DEVICE void fetch(const WalkStage<Shape>& stage, int t, unsigned lane) {
      scan_states<Shape>(stage.B[t], lane, B);
      scan_states<Shape>(stage.C[t], lane, C);
      given = *reinterpret_cast<const Floats<2 * PER>*>(stage.given[t][threadIdx.x / Shape::LANES * PER]);
    }
  };

  HYBRID_LM_DEVICE void step(const Token& token, WalkStage<Shape>& stage, int t) {
    Floats<PER> y;
    HYBRID_LM_UNROLL
    for (int c = 0; c < PER; ++c)
      y.at[c] =
          scan_token<STATES, Thread>(h[c], A[c], token.given.at[2 * c], token.given.at[2 * c + 1], token.B, token.C);
    *reinterpret_cast<Floats<PER>*>(stage.parts[t][threadIdx.x]) = y;
  }

  // Through the `left` tokens of a stage.
  HYBRID_LM_DEVICE void walk(WalkStage<Shape>& stage, int left) {
    // Some tokens are on their way: the compiler lets no load pass a store to the same memory.
    constexpr int AHEAD = Shape::AHEAD;
    int t = 0;
    if (!any_byte<Shape::STEPS>(stage.first)) {
      Token tokens[AHEAD];
      HYBRID_LM_UNROLL
      for (int i = 0; i < AHEAD - 1; ++i) tokens[i].fetch(stage, i, lane);
      for (; t + GROUP <= left; t += GROUP) {
        const int after = t + GROUP < left ? t + GROUP : 0;
        HYBRID_LM_UNROLL
        for (int i = 0; i < GROUP; ++i) {
          const int next = i + AHEAD - 1;
          tokens[next % AHEAD].fetch(stage, next < GROUP ? t + next : after + next - GROUP, lane);
          step(tokens[i % AHEAD], stage, t + i);
        }
      }
    }
    HYBRID_LM_UNROLL_BY(1)
    for (; t < left; ++t) {
      if (stage.first[t]) {
        HYBRID_LM_UNROLL
        for (int c = 0; c < PER; ++c) {
          HYBRID_LM_UNROLL
          for (int k = 0; k < STATES; ++k) h[c][k] = 0.0f;
        }
      }
      Token token;
      token.fetch(stage, t, lane);
      step(token, stage, t);
    }
  }
};

}  // namespace hybrid_lm
