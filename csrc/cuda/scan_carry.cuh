// The carriers of the forward scan: see scan.cu.
#pragma once

#include "cuda/scan_stage.cuh"

namespace hybrid_lm {

template <class T, class Shape>
struct Carrier {
  static constexpr int STEPS = Shape::STEPS, CARRIED = Shape::CARRIED, PHASES = Shape::PHASES;
  static constexpr int PAIRS = Shape::CHANNELS / 2;
  static constexpr int ROWS = 2 * STEPS * Shape::WIDTH / 4 / WALKERS;  // accesses of four numbers of B and C
  using Bits = typename T::Bits;
  using Pair = Row<T, 2>;
  int64_t row;
  int thread, pair, phase;
  int count;    // of its channels that are there
  int left;     // tokens, from the first of the stage that is to come on
  bool writes;  // else it is one too many, and does what another does
  Bits *x_at, *dt_at;              // of the stage that is to come
  Bits *done_x_at, *z_at, *y_at;  // of the one that is done
  float D[2], bias[2];
  Pair x[CARRIED], dt[CARRIED];  // of the stage that is to come
  Row<T, 4> rows[ROWS];
  uint8_t first;

  HYBRID_LM_DEVICE Carrier(const ScanArgs& a, int64_t row, int64_t block)
      : row(row), thread(int(threadIdx.x) - WALKERS), pair(thread % PAIRS), phase(thread / PAIRS % STEPS) {
    int64_t channel = block * Shape::CHANNELS + pair * 2;
    writes = channel < a.width && thread / PAIRS < STEPS;
    if (channel >= a.width) channel = a.width < 2 ? 0 : a.width - 2;
    count = a.width - channel < 2 ? 1 : 2;
    x_at = done_x_at = scan_at<T>(a.x, row, phase, channel), dt_at = scan_at<T>(a.dt, row, phase, channel);
    z_at = scan_at<T>(a.z, row, phase, channel), y_at = scan_at<T>(a.y, row, phase, channel);
    HYBRID_LM_UNROLL
    for (int c = 0; c < 2; ++c) {
      const int64_t d = c < count ? channel + c : channel;
      D[c] = a.D ? read(a.D, d * a.D.stride[0]) : 0.0f;
      bias[c] = a.dt_bias ? read(a.dt_bias, d * a.dt_bias.stride[0]) : 0.0f;
    }
  }

  // Its numbers of a whole stage.
  HYBRID_LM_DEVICE static void load(const Bits* at, int step, Pair (&to)[CARRIED]) {
    HYBRID_LM_UNROLL
    for (int i = 0; i < CARRIED; ++i) to[i].load(at + i * step);
  }

  // What walkers need of the stage that begins at a token sets out, if it is a whole one.
  HYBRID_LM_DEVICE void fetch(const ScanArgs& a, const ScanPlain& plain, int64_t start) {
    left = scan_count(a.tokens - start);
    if (plain.pairs && left >= STEPS) {
      load(x_at, int(a.x.stride[1]) * PHASES, x);
      load(dt_at, int(a.dt.stride[1]) * PHASES, dt);
    }
    if (plain.rows && left >= STEPS) {
      HYBRID_LM_UNROLL
      for (int i = 0; i < ROWS; ++i) {
        const int at = (i * WALKERS + thread) * 4, t = at / Shape::WIDTH % STEPS, n = at % Shape::WIDTH;
        rows[i].load(scan_at<T>(at < STEPS * Shape::WIDTH ? a.B : a.C, row, start + t, n));
      }
    }
    first = thread < STEPS && mark_of(a, row, start + thread) == FIRST;
  }

  // And arrives.
  HYBRID_LM_DEVICE void put(const ScanArgs& a, const ScanPlain& plain, int64_t start, WalkStage<Shape>& stage) {
    const int x_step = int(a.x.stride[1]) * PHASES, dt_step = int(a.dt.stride[1]) * PHASES;
    if (plain.pairs && left >= STEPS) {
      HYBRID_LM_UNROLL
      for (int i = 0; i < CARRIED; ++i) give(a, x[i], dt[i], i, stage);
    } else {
      HYBRID_LM_UNROLL_BY(1)
      for (int i = 0; i < CARRIED; ++i) {
        const int there = phase + i * PHASES < left ? count : 0;
        Pair of_x, of_dt;
        of_x.load(x_at + i * x_step, there), of_dt.load(dt_at + i * dt_step, there);
        give(a, of_x, of_dt, i, stage);
      }
    }
    x_at += a.x.stride[1] * STEPS, dt_at += a.dt.stride[1] * STEPS;
    if (plain.rows && left >= STEPS) {
      HYBRID_LM_UNROLL
      for (int i = 0; i < ROWS; ++i) {
        Floats<4> numbers;
        rows[i].wide(numbers.at);
        reinterpret_cast<Floats<4>*>(stage.B)[i * WALKERS + thread] = numbers;
      }
    } else {
      // 0 beyond the last token and state.
      HYBRID_LM_UNROLL_BY(1)
      for (int at = thread; at < 2 * STEPS * Shape::WIDTH; at += WALKERS) {
        const int t = at / Shape::WIDTH % STEPS, n = at % Shape::WIDTH;
        const Bits* from = scan_at<T>(at < STEPS * Shape::WIDTH ? a.B : a.C, row, start + t, n);
        (&stage.B[0][0])[at] = t < left && n < a.states ? T::wide(*from) : 0.0f;
      }
    }
    if (thread < STEPS) stage.first[thread] = first;
  }

  // The step and the input of one of its tokens.
  HYBRID_LM_DEVICE void give(const ScanArgs& a, const Pair& of_x, const Pair& of_dt, int i,
                             WalkStage<Shape>& stage) const {
    float now[2], step[2];
    Floats<4> given;
    of_x.wide(now), of_dt.wide(step);
    HYBRID_LM_UNROLL
    for (int c = 0; c < 2; ++c) {
      step[c] += bias[c];
      const float positive = scan_softplus(step[c]);
      given.at[2 * c] = a.dt_softplus ? positive : step[c];
      given.at[2 * c + 1] = given.at[2 * c] * now[c];
    }
    *reinterpret_cast<Floats<4>*>(stage.given[phase + i * PHASES][2 * pair]) = given;
  }

  // The outputs of the stage before the one that is walked, of which `done` tokens are there.
  HYBRID_LM_DEVICE void finish(const ScanArgs& a, const ScanPlain& plain, int done, const WalkStage<Shape>& stage) {
    const int x_step = int(a.x.stride[1]) * PHASES, z_step = int(a.z.stride[1]) * PHASES;
    const int y_step = int(a.y.stride[1]) * PHASES;
    if (plain.pairs && done >= STEPS) {
      // Once more, from the cache: registers for two more stages would be missing elsewhere.
      Pair of_x[CARRIED], z[CARRIED], y[CARRIED];
      load(done_x_at, x_step, of_x);
      if (a.z) load(z_at, z_step, z);
      float out[CARRIED][2];
      HYBRID_LM_UNROLL
      for (int i = 0; i < CARRIED; ++i) output(of_x[i], i, stage, out[i]);
      if (a.z) {
        HYBRID_LM_UNROLL
        for (int i = 0; i < CARRIED; ++i) gate(z[i], out[i]);
      }
      HYBRID_LM_UNROLL
      for (int i = 0; i < CARRIED; ++i) {
        y[i].narrow(out[i]);
        if (writes) y[i].store(y_at + i * y_step);
      }
    } else {
      HYBRID_LM_UNROLL_BY(1)
      for (int i = 0; i < CARRIED; ++i) {
        const int there = phase + i * PHASES < done ? count : 0;
        Pair of_x, z, y;
        float out[2];
        of_x.load(done_x_at + i * x_step, there);
        output(of_x, i, stage, out);
        if (a.z) {
          z.load(z_at + i * z_step, there);
          gate(z, out);
        }
        y.narrow(out);
        if (writes) y.store(y_at + i * y_step, there);
      }
    }
    done_x_at += a.x.stride[1] * STEPS, z_at += a.z.stride[1] * STEPS, y_at += a.y.stride[1] * STEPS;
  }

  HYBRID_LM_DEVICE void output(const Pair& of_x, int i, const WalkStage<Shape>& stage, float (&out)[2]) const {
    float now[2];
    of_x.wide(now);
    sum_of(stage.parts[phase + i * PHASES][pair * 2 / Shape::PER * Shape::LANES], out);
    out[0] += D[0] * now[0], out[1] += D[1] * now[1];
  }

  HYBRID_LM_DEVICE static void gate(const Pair& z, float (&out)[2]) {
    float gates[2];
    z.wide(gates);
    out[0] *= silu<Thread>(gates[0]), out[1] *= silu<Thread>(gates[1]);
  }

  // Of two channels what their lanes say.
  HYBRID_LM_DEVICE static void sum_of(const float* parts, float (&out)[2]) {
    out[0] = out[1] = 0.0f;
    HYBRID_LM_UNROLL
    for (int k = 0; k < 2 * Shape::LANES; k += 4) {
      const auto four = *reinterpret_cast<const Floats<4>*>(parts + k);
      HYBRID_LM_UNROLL
      for (int i = 0; i < 4; ++i) out[Shape::PER == 2 ? i % 2 : (k + i) / Shape::LANES] += four.at[i];
    }
  }
};

}  // namespace hybrid_lm
