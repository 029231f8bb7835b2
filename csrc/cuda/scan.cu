// The selective scan, forward.
//
// Half of a block's warps walk the tokens, the other half carry. A walker has STATES states of each of PER neighbouring
// channels, in registers; LANES lanes of a warp share these channels. Carriers bring what walkers need, a stage of
// tokens ahead: rows of B and C as floats, and for each token and channel the step after softplus and the input. And
// they add up what lanes have of the outputs and write them, a stage behind. So walkers wait for no memory but the
// shared one, and do little more than the exponentials and multiplications that there are for each state.
#include "cuda/scan.cuh"

namespace hybrid_lm {
namespace {

constexpr int WALKERS = 128, THREADS = 2 * WALKERS;

// STEPS: tokens of a stage; GROUP: those that a walker goes through in one stretch of code.
template <int LANES_, int STATES_, int PER_, int STEPS_, int GROUP_, int AHEAD_>
struct Shape : ScanLanes<LANES_, STATES_, WALKERS, GROUP_> {
  using Lanes = ScanLanes<LANES_, STATES_, WALKERS, GROUP_>;
  static constexpr int PER = PER_, STEPS = STEPS_, AHEAD = AHEAD_;
  static constexpr int CHANNELS = Lanes::CHANNELS * PER;
  // A carrier has two channels, of every PHASES-th token.
  static constexpr int PHASES = WALKERS / (CHANNELS / 2), CARRIED = STEPS > PHASES ? STEPS / PHASES : 1;
  // On a processor at the same time, which limits registers.
  static constexpr int BLOCKS = Lanes::WIDTH > 64 ? 1 : 2;
  static_assert(GROUP_ % AHEAD == 0 && STEPS % GROUP_ == 0 && SCAN_CHUNK % STEPS == 0 && STEPS % 16 == 0);
};

// A stage: what is given to walkers, and what they say.
template <class Shape>
struct alignas(16) Stage {
  float B[Shape::STEPS][Shape::WIDTH];
  float C[Shape::STEPS][Shape::WIDTH];
  float given[Shape::STEPS][Shape::CHANNELS][2];       // the step, and it times x
  float parts[Shape::STEPS][WALKERS][Shape::PER];      // of the outputs
  uint8_t first[Shape::STEPS];                         // of a document
};

// What holds for all rows of a tensor: those of B and C have all states, and begin where an access of four numbers may;
// those of the others have an even number of channels, and begin where an access of two may.
struct Plain {
  bool rows, pairs;
};

// So many tokens in 32 bits; of more than that, as many as never end.
HYBRID_LM_DEVICE int scan_count(int64_t tokens) { return int(tokens < 1 << 30 ? tokens : 1 << 30); }

template <int VEC>
struct alignas(4 * VEC) Words {
  uint32_t at[VEC];
};

// Whether one of COUNT bytes is not 0.
template <int COUNT>
HYBRID_LM_DEVICE bool any(const uint8_t* bytes) {
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

template <class Shape>
struct Walker {
  static constexpr int PER = Shape::PER, STATES = Shape::STATES, GROUP = Shape::GROUP;
  int64_t row, channel;
  int count;      // of its channels that are there
  unsigned lane;  // of the channels'
  float A[PER][STATES], h[PER][STATES];

  HYBRID_LM_DEVICE Walker(const ScanArgs& a, int64_t row, int64_t block)
      : row(row), channel(block * Shape::CHANNELS + threadIdx.x / Shape::LANES * PER), lane(threadIdx.x % Shape::LANES) {
    const int64_t left = a.width - channel;
    count = left < 0 ? 0 : left < PER ? int(left) : PER;
    HYBRID_LM_UNROLL
    for (int c = 0; c < PER; ++c) {
      HYBRID_LM_UNROLL
      for (int k = 0; k < STATES; ++k) A[c][k] = h[c][k] = 0.0f;
    }
    each_state(a, [&](int c, int k, int64_t d, int64_t n) {
      A[c][k] = read(a.A, d * a.A.stride[0] + n * a.A.stride[1]) * float(LOG2E);
      h[c][k] = a.initial ? read(a.initial, place(a.initial, d, n)) : 0.0f;
    });
  }

  HYBRID_LM_DEVICE int64_t place(const View& v, int64_t d, int64_t n) const {
    return row * v.stride[0] + d * v.stride[1] + n * v.stride[2];
  }

  // f(channel's and state's number here, and among all) for those that are there; the others are 0.
  template <class F>
  HYBRID_LM_DEVICE void each_state(const ScanArgs& a, const F& f) {
    HYBRID_LM_UNROLL
    for (int c = 0; c < PER; ++c) {
      HYBRID_LM_UNROLL
      for (int k = 0; k < STATES; ++k) {
        const int64_t n = Shape::state(k, lane);
        if (c < count && n < a.states) f(c, k, channel + c, n);
      }
    }
  }

  // What a token needs.
  struct Token {
    float B[STATES], C[STATES];
    Floats<2 * PER> given;

    HYBRID_LM_DEVICE void fetch(const Stage<Shape>& stage, int t, unsigned lane) {
      scan_states<Shape>(stage.B[t], lane, B);
      scan_states<Shape>(stage.C[t], lane, C);
      given = *reinterpret_cast<const Floats<2 * PER>*>(stage.given[t][threadIdx.x / Shape::LANES * PER]);
    }
  };

  HYBRID_LM_DEVICE void step(const Token& token, Stage<Shape>& stage, int t) {
    Floats<PER> y;
    HYBRID_LM_UNROLL
    for (int c = 0; c < PER; ++c)
      y.at[c] = scan_token<STATES, Thread>(h[c], A[c], token.given.at[2 * c], token.given.at[2 * c + 1], token.B, token.C);
    *reinterpret_cast<Floats<PER>*>(stage.parts[t][threadIdx.x]) = y;
  }

  // Through the `left` tokens of a stage.
  HYBRID_LM_DEVICE void walk(Stage<Shape>& stage, int left) {
    // Some tokens are on their way: the compiler lets no load pass a store to the same memory.
    constexpr int AHEAD = Shape::AHEAD;
    int t = 0;
    if (!any<Shape::STEPS>(stage.first)) {
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

template <class T, class Shape>
struct Carrier {
  static constexpr int STEPS = Shape::STEPS, CARRIED = Shape::CARRIED, PHASES = Shape::PHASES, PAIRS = Shape::CHANNELS / 2;
  static constexpr int ROWS = 2 * STEPS * Shape::WIDTH / 4 / WALKERS;  // accesses of four numbers of B and C
  using Bits = typename T::Bits;
  using Pair = Row<T, 2>;
  int64_t row;
  int thread, pair, phase;
  int count;    // of its channels that are there
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

  // Its numbers of a stage, of which `left` tokens are there; the place moves on.
  HYBRID_LM_DEVICE void load(const View& v, bool pairs, int left, Bits*& at, Pair (&to)[CARRIED]) {
    const int step = int(v.stride[1]) * PHASES;
    if (pairs && left >= STEPS) {
      HYBRID_LM_UNROLL
      for (int i = 0; i < CARRIED; ++i) to[i].load(at + i * step);
    } else {
      HYBRID_LM_UNROLL
      for (int i = 0; i < CARRIED; ++i) to[i].load(at + i * step, phase + i * PHASES < left ? count : 0);
    }
    at += v.stride[1] * STEPS;
  }

  // What walkers need of the stage that begins at a token sets out.
  HYBRID_LM_DEVICE void fetch(const ScanArgs& a, const Plain& plain, int64_t start) {
    const int left = scan_count(a.tokens - start);
    load(a.x, plain.pairs, left, x_at, x);
    load(a.dt, plain.pairs, left, dt_at, dt);
    HYBRID_LM_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      const int at = (i * WALKERS + thread) * 4, t = at / Shape::WIDTH % STEPS, n = at % Shape::WIDTH;
      const View& v = at < STEPS * Shape::WIDTH ? a.B : a.C;
      const Bits* from = scan_at<T>(v, row, start + t, n);
      if (plain.rows && left >= STEPS)
        rows[i].load(from);
      else
        rows[i].load(from, t < left ? int(a.states) - n : 0);
    }
    first = thread < STEPS && mark_of(a, row, start + thread) == FIRST;
  }

  // And arrives.
  HYBRID_LM_DEVICE void put(const ScanArgs& a, Stage<Shape>& stage) {
    HYBRID_LM_UNROLL
    for (int i = 0; i < CARRIED; ++i) {
      float now[2], step[2];
      Floats<4> given;
      x[i].wide(now), dt[i].wide(step);
      HYBRID_LM_UNROLL
      for (int c = 0; c < 2; ++c) {
        step[c] += bias[c];
        const float positive = scan_softplus(step[c]);
        given.at[2 * c] = a.dt_softplus ? positive : step[c];
        given.at[2 * c + 1] = given.at[2 * c] * now[c];
      }
      *reinterpret_cast<Floats<4>*>(stage.given[phase + i * PHASES][2 * pair]) = given;
    }
    HYBRID_LM_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      Floats<4> numbers;
      rows[i].wide(numbers.at);
      reinterpret_cast<Floats<4>*>(stage.B)[i * WALKERS + thread] = numbers;
    }
    if (thread < STEPS) stage.first[thread] = first;
  }

  // The outputs of the stage before the one that is walked, of which `left` tokens are there.
  HYBRID_LM_DEVICE void finish(const ScanArgs& a, const Plain& plain, int left, const Stage<Shape>& stage) {
    // Once more, from the cache: registers for two more stages would be missing elsewhere.
    Pair done_x[CARRIED], z[CARRIED];
    load(a.x, plain.pairs, left, done_x_at, done_x);
    if (a.z) load(a.z, plain.pairs, left, z_at, z);
    float out[CARRIED][2];
    HYBRID_LM_UNROLL
    for (int i = 0; i < CARRIED; ++i) {
      sum_of(stage.parts[phase + i * PHASES][pair * 2 / Shape::PER * Shape::LANES], out[i]);
      float now[2];
      done_x[i].wide(now);
      out[i][0] += D[0] * now[0], out[i][1] += D[1] * now[1];
    }
    if (a.z) {
      HYBRID_LM_UNROLL
      for (int i = 0; i < CARRIED; ++i) {
        float gate[2];
        z[i].wide(gate);
        out[i][0] *= silu<Thread>(gate[0]), out[i][1] *= silu<Thread>(gate[1]);
      }
    }
    const int step = int(a.y.stride[1]) * PHASES;
    Pair y[CARRIED];
    HYBRID_LM_UNROLL
    for (int i = 0; i < CARRIED; ++i) y[i].narrow(out[i]);
    if (plain.pairs && left >= STEPS) {
      HYBRID_LM_UNROLL
      for (int i = 0; i < CARRIED; ++i)
        if (writes) y[i].store(y_at + i * step);
    } else {
      HYBRID_LM_UNROLL
      for (int i = 0; i < CARRIED; ++i) y[i].store(y_at + i * step, writes && phase + i * PHASES < left ? count : 0);
    }
    y_at += a.y.stride[1] * STEPS;
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

// A warp is one of walkers or one of carriers. Both meet at the end of every stage.
template <class T, class Shape>
__global__ void __launch_bounds__(THREADS, Shape::BLOCKS) scan_kernel(const ScanArgs a, const Plain plain) {
  auto* stages = reinterpret_cast<Stage<Shape>*>(shared_memory());
  const int64_t blocks = (a.width + Shape::CHANNELS - 1) / Shape::CHANNELS;
  const int64_t row = int64_t(blockIdx.x) / blocks, block = int64_t(blockIdx.x) % blocks;
  constexpr int STEPS = Shape::STEPS;
  if (threadIdx.x < WALKERS) {
    Walker<Shape> walker(a, row, block);
    __syncthreads();
    int turn = 0;
    for (int64_t start = 0; start < a.tokens; start += STEPS, turn = !turn) {
      if (a.before && start % SCAN_CHUNK == 0) {
        float* kept = static_cast<float*>(a.before.data) + (start / SCAN_CHUNK * a.batch + row) * a.states * a.width;
        walker.each_state(a, [&](int c, int k, int64_t d, int64_t n) { kept[n * a.width + d] = walker.h[c][k]; });
      }
      const int left = scan_count(a.tokens - start);
      walker.walk(stages[turn], left < STEPS ? left : STEPS);
      __syncthreads();
    }
    walker.each_state(a, [&](int c, int k, int64_t d, int64_t n) {
      write(a.state, walker.place(a.state, d, n), walker.h[c][k]);
    });
  } else {
    Carrier<T, Shape> carrier(a, row, block);
    carrier.fetch(a, plain, 0);
    carrier.put(a, stages[0]);
    __syncthreads();
    // Walkers are at the stage that ends where the next one begins; the one before is done, the next one takes its place.
    int turn = 1;
    int64_t next = STEPS;
    for (; next < a.tokens + STEPS; next += STEPS, turn = !turn) {
      // What sets out early needs registers until it arrives.
      constexpr bool EARLY = sizeof(typename T::Bits) * Shape::CARRIED <= 16;
      if (EARLY) carrier.fetch(a, plain, next);
      if (next > STEPS) carrier.finish(a, plain, STEPS, stages[turn]);
      if (!EARLY) carrier.fetch(a, plain, next);
      carrier.put(a, stages[turn]);
      __syncthreads();
    }
    carrier.finish(a, plain, int(a.tokens - (next - 2 * STEPS)), stages[turn]);
  }
}

// Whether rows of COUNT numbers of elements of this type begin where one access may.
template <int COUNT, class T>
bool in_one(const ScanArgs& a, const View& v) {
  if (!v) return true;
  const bool begins = reinterpret_cast<uintptr_t>(v.data) % (COUNT * sizeof(typename T::Bits)) == 0;
  return begins && (a.batch == 1 || v.stride[0] % COUNT == 0) && (a.tokens == 1 || v.stride[1] % COUNT == 0);
}

// The way a channel's states are spread over lanes, by the sizes alone, so that a call gives the same bits on every
// device: as few lanes as hold the states, and more where there are not channels enough to fill a device.
template <class F>
const char* with_shape(const ScanArgs& a, const F& f) {
  const int64_t channels = a.batch * a.width;
  if (a.states > 64) return f(Shape<16, 16, 1, 16, 4, 1>());
  if (a.states > 16) return f(Shape<4, 16, 1, 16, 8, 1>());
  if (channels * 8 < SCAN_ENOUGH) return f(Shape<8, 2, 1, 32, 16, 4>());
  if (channels * 4 < SCAN_ENOUGH * 3) return f(Shape<4, 4, 1, 32, 16, 4>());
  return f(Shape<2, 8, 2, 16, 8, 2>());
}

}  // namespace

const char* scan(const ScanArgs& a) {
  if (!a.batch || !a.width) return nullptr;
  return with_type(a.x.type, [&](auto type) {
    using T = decltype(type);
    return with_shape(a, [&](auto shape) {
      using Shape = decltype(shape);
      const int64_t blocks = a.batch * ((a.width + Shape::CHANNELS - 1) / Shape::CHANNELS);
      if (blocks > 0x7fffffff) return "selective_scan: more than 2^31 blocks of channels";
      Plain plain{a.states == Shape::WIDTH && in_one<4, T>(a, a.B) && in_one<4, T>(a, a.C), a.width % 2 == 0};
      for (const View* v : {&a.x, &a.dt, &a.z, &a.y}) plain.pairs = plain.pairs && in_one<2, T>(a, *v);
      return launch(scan_kernel<T, Shape>, dim3{unsigned(blocks), 1, 1}, THREADS, 2 * sizeof(Stage<Shape>), a.stream, a,
                    plain);
    });
  });
}

}  // namespace hybrid_lm
