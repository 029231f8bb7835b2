// The selective scan, backward: from the last stretch of 64 tokens to the first.
//
// Of a stretch the state before it is known. A first pass computes the states before each group of tokens; then, from
// the last group to the first, a group's decays and states are computed once more, into registers, and walked back. So
// each token and state needs two exponentials, and nothing of the size of all states goes to memory.
//
// The gradients of B and C are sums over channels: first over those of a warp, by shuffles, then over the warps of a
// block, in shared memory, then over blocks, by a second kernel. No sum is done by atomic additions: a call gives the
// same bits every time.
#include "cuda/scan.cuh"

namespace hybrid_lm {
namespace {

// BLOCKS: how many shall run on a processor at the same time, which limits the registers of each.
template <int LANES, int STATES, int THREADS, int GROUP, int BLOCKS_>
struct Shape : ScanLanes<LANES, STATES, THREADS, GROUP> {
  static constexpr int BLOCKS = BLOCKS_;
  static constexpr int WIDTH = LANES * STATES;
  static constexpr int GROUPS = int(SCAN_CHUNK) / GROUP;  // of a stretch
  static constexpr int NEAR = 32 / LANES;                 // channels of a warp
  static constexpr int WARPS = THREADS / 32;
};

template <class Shape>
struct Shared {
  ScanStage<int(SCAN_CHUNK), Shape::WIDTH> stage;
  float starts[Shape::GROUPS][Shape::STATES][Shape::THREADS];             // the states before each group
  float sums[2][Shape::WARPS][Shape::GROUP][2][Shape::WIDTH];             // of B's and C's gradients, by turns
};

// Where sums over blocks and over the batch are put together; each part as the tensor itself.
struct Parts {
  int64_t blocks;               // of channels, for which gB and gC have a part each
  float *gB, *gC;               // [block](b t n)
  float *gA, *gD, *gdt_bias;    // [row](d n), [row](d), [row](d)
  int64_t tokens, rates, count;  // of one part of gB; of gA; of all
};

inline Parts parts_of(const ScanGradArgs& a, int64_t channels) {
  // Enough blocks to fill a device twice over; a block that has several groups of channels adds them up itself.
  const int64_t groups = (a.width + channels - 1) / channels, rows = a.batch ? a.batch : 1;
  const int64_t wanted = 264 / rows < 1 ? 1 : 264 / rows, rounds = (groups + wanted - 1) / wanted;
  Parts p;
  p.blocks = rounds ? (groups + rounds - 1) / rounds : 0;
  p.tokens = a.batch * a.tokens * a.states, p.rates = a.width * a.states;
  p.gB = a.scratch, p.gC = p.gB + p.blocks * p.tokens;
  p.gA = p.gC + p.blocks * p.tokens;
  p.gD = p.gA + a.batch * p.rates, p.gdt_bias = p.gD + a.batch * a.width;
  p.count = 2 * p.blocks * p.tokens + a.batch * (p.rates + 2 * a.width);
  return p;
}

// What a lane has of the tokens that it owns, of one group, on its way; the place moves from group to group.
template <class T, class Shape>
struct Owned {
  const typename T::Bits *x_at, *dt_at, *z_at, *gy_at;
  ScanOwned<T, Shape> x, dt, z, gy;

  HYBRID_LM_DEVICE Owned(const ScanGradArgs& a, const ScanPlace<Shape>& at, int64_t token)
      : x_at(scan_at<T>(a.x, at.row, token, at.channel)), dt_at(scan_at<T>(a.dt, at.row, token, at.channel)),
        z_at(a.z ? scan_at<T>(a.z, at.row, token, at.channel) : nullptr),
        gy_at(a.gy ? scan_at<T>(a.gy, at.row, token, at.channel) : nullptr), x{}, dt{}, z{}, gy{} {}

  // Two of the four are enough for the states.
  HYBRID_LM_DEVICE void fetch(const ScanGradArgs& a, int left, bool all) {
    x.fetch(x_at, int(a.x.stride[1]), left);
    dt.fetch(dt_at, int(a.dt.stride[1]), left);
    if (!all) return;
    if (z_at) z.fetch(z_at, int(a.z.stride[1]), left);
    if (gy_at) gy.fetch(gy_at, int(a.gy.stride[1]), left);
  }

  HYBRID_LM_DEVICE void move(const ScanGradArgs& a, int tokens) {
    x_at += tokens * int(a.x.stride[1]), dt_at += tokens * int(a.dt.stride[1]);
    if (z_at) z_at += tokens * int(a.z.stride[1]);
    if (gy_at) gy_at += tokens * int(a.gy.stride[1]);
  }
};

// The rows of a stretch, from memory to shared memory; 0 beyond the last token and state.
template <class T, class Shape>
HYBRID_LM_DEVICE void fill(const ScanArgs& a, int64_t row, int64_t start,
                           ScanStage<int(SCAN_CHUNK), Shape::WIDTH>& stage) {
  using Bits = typename T::Bits;
  const Bits *from_B = scan_at<T>(a.B, row, start, 0), *from_C = scan_at<T>(a.C, row, start, 0);
  HYBRID_LM_UNROLL_BY(4)
  for (int at = int(threadIdx.x); at < int(SCAN_CHUNK) * Shape::WIDTH; at += Shape::THREADS) {
    const int t = at / Shape::WIDTH, n = at % Shape::WIDTH;
    const bool there = start + t < a.tokens && n < a.states;
    (&stage.B[0][0])[at] = there ? T::wide(from_B[t * a.B.stride[1] + n]) : 0.0f;
    (&stage.C[0][0])[at] = there ? T::wide(from_C[t * a.C.stride[1] + n]) : 0.0f;
  }
  for (int t = int(threadIdx.x); t < int(SCAN_CHUNK); t += Shape::THREADS)
    stage.mark[t] = mark_of(a, row, start + t);
}

// One token forward: the state and the decay into it.
template <class Shape>
HYBRID_LM_DEVICE void forward(float (&h)[Shape::STATES], float (&decay)[Shape::STATES], const float (&A)[Shape::STATES],
                              float step, float input, const float* B_row, unsigned lane) {
  float B[Shape::STATES];
  scan_states<Shape>(B_row, lane, B);
  HYBRID_LM_UNROLL
  for (int k = 0; k < Shape::STATES; ++k) {
    decay[k] = Thread::exp2(step * A[k]);
    h[k] = decay[k] * h[k] + input * B[k];
  }
}

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::THREADS, Shape::BLOCKS)
    scan_backward_kernel(const ScanGradArgs a, const Parts parts) {
  using Bits = typename T::Bits;
  constexpr int GROUP = Shape::GROUP, OWN = Shape::OWN, STATES = Shape::STATES, LANES = Shape::LANES;
  constexpr int PAIR = GROUP < 2 ? GROUP : 2;  // tokens whose gradients of B and C are summed over a warp together
  constexpr int VALUES = PAIR * 2 * STATES, KEPT = VALUES > Shape::NEAR ? VALUES / Shape::NEAR : 1;
  auto& shared = *reinterpret_cast<Shared<Shape>*>(shared_memory());
  auto& stage = shared.stage;
  const int64_t blocks = (a.width + Shape::CHANNELS - 1) / Shape::CHANNELS;
  const int64_t row = int64_t(blockIdx.x) / parts.blocks, part = int64_t(blockIdx.x) % parts.blocks;
  const int64_t chunks = (a.tokens + SCAN_CHUNK - 1) / SCAN_CHUNK;
  int turn = 0;

  for (int64_t block = part; block < blocks; block += parts.blocks) {
    const ScanPlace<Shape> at(a, row, block);
    const int64_t own = at.lane / Shape::SAME * OWN;
    const bool writes = at.there && at.lane % Shape::SAME == 0;
    const unsigned warp = threadIdx.x / 32, near = threadIdx.x % 32 / LANES;
    const float D = a.D ? read(a.D, at.channel * a.D.stride[0]) : 0.0f;
    const float bias = a.dt_bias ? read(a.dt_bias, at.channel * a.dt_bias.stride[0]) : 0.0f;
    float A[STATES], later[STATES], rate[STATES], gD = 0.0f, gbias = 0.0f;
    scan_rates(a, at, A);
    HYBRID_LM_UNROLL
    for (int k = 0; k < STATES; ++k) {
      const int64_t n = Shape::state(k, at.lane);
      const int64_t place = row * a.gstate.stride[0] + at.channel * a.gstate.stride[1] + n * a.gstate.stride[2];
      later[k] = a.gstate && n < a.states ? read(a.gstate, place) : 0.0f;
      rate[k] = 0.0f;
    }

    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      const int64_t start = chunk * SCAN_CHUNK;
      const int64_t left = a.tokens - start;
      const int groups = left < SCAN_CHUNK ? int((left + GROUP - 1) / GROUP) : Shape::GROUPS;
      // The stretch before has been read by everybody.
      __syncthreads();
      fill<T, Shape>(a, row, start, stage);
      __syncthreads();

      // 1. the states before each group
      float first[STATES], h[STATES], decay[STATES];
      const float* kept = static_cast<const float*>(a.before.data) + (chunk * a.batch + row) * parts.rates + at.channel;
      HYBRID_LM_UNROLL
      for (int k = 0; k < STATES; ++k) {
        const int64_t n = Shape::state(k, at.lane);
        h[k] = n < a.states ? kept[n * a.width] : 0.0f;
      }
      Owned<T, Shape> next(a, at, start + own);
      const auto left_of = [&](int g) { return scan_left<Shape>(a.tokens - start - g * GROUP - own); };
      next.fetch(a, left_of(0), false);
      for (int g = 0; g + 1 < groups; ++g) {
        HYBRID_LM_UNROLL
        for (int k = 0; k < STATES; ++k) shared.starts[g][k][threadIdx.x] = h[k];
        float dt[OWN], input[OWN];
        HYBRID_LM_UNROLL
        for (int i = 0; i < OWN; ++i) dt[i] = T::wide(next.dt.at[i]), input[i] = T::wide(next.x.at[i]);
        next.move(a, GROUP);
        next.fetch(a, left_of(g + 1), g + 2 == groups);
        scan_steps(dt, bias, a.dt_softplus);
        HYBRID_LM_UNROLL
        for (int i = 0; i < OWN; ++i) input[i] *= dt[i];
        HYBRID_LM_UNROLL
        for (int i = 0; i < GROUP; ++i) {
          const int t = g * GROUP + i;
          const float step = scan_owners<Shape>(dt, i), in = scan_owners<Shape>(input, i);
          if (stage.mark[t]) {
            HYBRID_LM_UNROLL
            for (int k = 0; k < STATES; ++k) h[k] = 0.0f;
          }
          forward<Shape>(h, decay, A, step, in, stage.B[t], at.lane);
        }
      }
      HYBRID_LM_UNROLL
      for (int k = 0; k < STATES; ++k) shared.starts[groups - 1][k][threadIdx.x] = h[k];

      if (groups == 1) next.fetch(a, left_of(0), true);
      for (int g = groups - 1; g >= 0; --g) {
        const int left = left_of(g);
        // 2. what there is once for a token and channel
        float x[OWN], dt[OWN], input[OWN], gout[OWN], slope[OWN], gate[OWN];
        HYBRID_LM_UNROLL
        for (int i = 0; i < OWN; ++i) {
          x[i] = T::wide(next.x.at[i]), dt[i] = T::wide(next.dt.at[i]);
          gout[i] = a.gy && at.there ? T::wide(next.gy.at[i]) : 0.0f;
          if (!at.there) x[i] = 0.0f;
          slope[i] = a.dt_softplus ? sigmoid<Thread>(dt[i] + bias) : 1.0f;
          gate[i] = 0.0f;
          if (a.z) {
            const float z = T::wide(next.z.at[i]), s = sigmoid<Thread>(z);
            gate[i] = gout[i] * silu_slope<Thread>(z, s);
            gout[i] *= z * s;
          }
        }
        if (g > 0) {
          next.move(a, -GROUP);
          next.fetch(a, GROUP, true);
        }
        scan_steps(dt, bias, a.dt_softplus);
        HYBRID_LM_UNROLL
        for (int i = 0; i < OWN; ++i) {
          // Beyond the end there is a step of what the bias makes of 0.
          if (i >= left) dt[i] = 0.0f;
          input[i] = dt[i] * x[i];
        }

        // 3. the group's decays and states once more
        float decays[GROUP][STATES], states[GROUP][STATES], y[GROUP];
        HYBRID_LM_UNROLL
        for (int k = 0; k < STATES; ++k) h[k] = first[k] = shared.starts[g][k][threadIdx.x];
        HYBRID_LM_UNROLL
        for (int i = 0; i < GROUP; ++i) {
          const int t = g * GROUP + i;
          const float step = scan_owners<Shape>(dt, i), in = scan_owners<Shape>(input, i);
          y[i] = 0.0f;
          if (const int mark = stage.mark[t]) {
            // Then nothing of the token is written, and the way back leaves what later tokens ask as it is.
            if (mark == BEYOND) {
              HYBRID_LM_UNROLL
              for (int k = 0; k < STATES; ++k) decays[i][k] = 1.0f, states[i][k] = 0.0f;
              continue;
            }
            HYBRID_LM_UNROLL
            for (int k = 0; k < STATES; ++k) h[k] = 0.0f;
          }
          forward<Shape>(h, decays[i], A, step, in, stage.B[t], at.lane);
          float C[STATES];
          scan_states<Shape>(stage.C[t], at.lane, C);
          HYBRID_LM_UNROLL
          for (int k = 0; k < STATES; ++k) states[i][k] = h[k], y[i] += h[k] * C[k];
        }

        // 4. back through it
        float ginput[GROUP], gstep[GROUP];
        HYBRID_LM_UNROLL
        for (int pair = GROUP - PAIR; pair >= 0; pair -= PAIR) {
          float sums[VALUES];  // [token][B, C][state]
          HYBRID_LM_UNROLL
          for (int j = PAIR - 1; j >= 0; --j) {
            const int i = pair + j, t = g * GROUP + i;
            const float step = scan_owners<Shape>(dt, i), in = scan_owners<Shape>(input, i);
            const float out = scan_owners<Shape>(gout, i);
            float B[STATES], C[STATES];
            scan_states<Shape>(stage.B[t], at.lane, B);
            scan_states<Shape>(stage.C[t], at.lane, C);
            ginput[i] = gstep[i] = 0.0f;
            HYBRID_LM_UNROLL
            for (int k = 0; k < STATES; ++k) {
              const float gh = out * C[k] + later[k];
              sums[(j * 2 + 0) * STATES + k] = gh * in;
              sums[(j * 2 + 1) * STATES + k] = states[i][k] * out;
              ginput[i] += gh * B[k];
              later[k] = gh * decays[i][k];
            }
            // A document's first token finds a state of zeros, and asks nothing of what stands before it.
            if (stage.mark[t] == FIRST) {
              HYBRID_LM_UNROLL
              for (int k = 0; k < STATES; ++k) later[k] = 0.0f;
            } else {
              HYBRID_LM_UNROLL
              for (int k = 0; k < STATES; ++k) {
                // decay = exp2(step A), and the state that the token finds enters as decay * state
                const float exponent = later[k] * (i > 0 ? states[i > 0 ? i - 1 : 0][k] : first[k]);
                rate[k] += exponent * step;
                gstep[i] += exponent * A[k];
              }
            }
          }
          sum_over_lanes<VALUES, Shape::NEAR, LANES>(sums, near);
          const int from = kept_from<VALUES, Shape::NEAR>(near);
          HYBRID_LM_UNROLL
          for (int i = 0; i < KEPT; ++i) {
            const int value = from + i, j = value / (2 * STATES), which = value / STATES % 2, k = value % STATES;
            shared.sums[turn][warp][pair + j][which][Shape::state(k, at.lane)] = sums[i];
          }
        }

        // 5. the gradients of x, dt and z
        sum_over_lanes<GROUP, LANES>(ginput, at.lane);
        sum_over_lanes<GROUP, LANES>(gstep, at.lane);
        if (a.gz) sum_over_lanes<GROUP, LANES>(y, at.lane);
        // The gradients are new tensors without gaps: one place for all three.
        const int64_t place = ((row * a.tokens + start + g * GROUP + own) * a.width + at.channel);
        Bits *gx_at = static_cast<Bits*>(a.gx.data) + place, *gdt_at = static_cast<Bits*>(a.gdt.data) + place;
        Bits* gz_at = static_cast<Bits*>(a.gz.data) + place;
        HYBRID_LM_UNROLL
        for (int i = 0; i < OWN; ++i) {
          if (!writes || i >= left) continue;
          const float of_dt = (gstep[i] * float(1 / LOG2E) + ginput[i] * x[i]) * slope[i];
          gD += gout[i] * x[i];
          gbias += of_dt;
          gx_at[i * int(a.width)] = T::narrow(ginput[i] * dt[i] + gout[i] * D);
          gdt_at[i * int(a.width)] = T::narrow(of_dt);
          if (a.gz) gz_at[i * int(a.width)] = T::narrow(gate[i] * (y[i] + D * x[i]));
        }

        // 6. of B and C, over the block
        __syncthreads();
        const int64_t rows_at = part * parts.tokens + (row * a.tokens + start + g * GROUP) * a.states;
        const int rows_left = scan_left<Shape>(a.tokens - start - g * GROUP), states_there = int(a.states);
        for (int value = int(threadIdx.x); value < GROUP * 2 * Shape::WIDTH; value += Shape::THREADS) {
          const int n = value % Shape::WIDTH, which = value / Shape::WIDTH % 2, i = value / (2 * Shape::WIDTH);
          if (i >= rows_left || n >= states_there) continue;
          float sum = 0.0f;
          HYBRID_LM_UNROLL
          for (int w = 0; w < Shape::WARPS; ++w) sum += shared.sums[turn][w][i][which][n];
          float* to = (which ? parts.gC : parts.gB) + rows_at + (i * states_there + n);
          *to = block == part ? sum : *to + sum;
        }
        // The next group writes into the other half, which all have read before this group's barrier.
        turn = !turn;
      }
    }

    // 7. what there is once for a channel
    float once[2] = {gD, gbias};
    HYBRID_LM_UNROLL
    for (int step = LANES / 2; step > 0; step /= 2) {
      once[0] += __shfl_xor_sync(ALL_LANES, once[0], step);
      once[1] += __shfl_xor_sync(ALL_LANES, once[1], step);
    }
    if (at.there && at.lane == 0) {
      parts.gD[row * a.width + at.channel] = once[0];
      parts.gdt_bias[row * a.width + at.channel] = once[1];
    }
    HYBRID_LM_UNROLL
    for (int k = 0; k < STATES; ++k) {
      const int64_t n = Shape::state(k, at.lane);
      if (!at.there || n >= a.states) continue;
      parts.gA[row * parts.rates + at.channel * a.states + n] = rate[k];
      write(a.ginitial, row * a.ginitial.stride[0] + at.channel * a.ginitial.stride[1] + n * a.ginitial.stride[2],
            later[k]);
    }
  }
}

// A tensor that is the sum of parts which lie one after the other, each as the tensor itself without gaps.
struct Sum {
  const float* parts;
  int64_t count, size[3];
  View to;
};

struct Sums {
  Sum of[5];
};

constexpr int SUM_THREADS = 256;

__global__ void __launch_bounds__(SUM_THREADS) sum_kernel(const Sums sums) {
  const Sum& s = sums.of[blockIdx.y];
  if (!s.to) return;
  const int64_t size = s.size[0] * s.size[1] * s.size[2];
  for (int64_t i = int64_t(blockIdx.x) * SUM_THREADS + threadIdx.x; i < size; i += int64_t(gridDim.x) * SUM_THREADS) {
    float sum = 0.0f;
    for (int64_t k = 0; k < s.count; ++k) sum += s.parts[k * size + i];
    const int64_t last = i % s.size[2], middle = i / s.size[2] % s.size[1], first = i / s.size[2] / s.size[1];
    write(s.to, first * s.to.stride[0] + middle * s.to.stride[1] + last * s.to.stride[2], sum);
  }
}

// Fewer axes are the last ones.
inline Sum sum_of(const View& to, const float* parts, int64_t count, int64_t a, int64_t b, int64_t c, int axes) {
  Sum s{parts, count, {a, b, c}, to};
  for (int k = 0; k < 3; ++k) s.to.stride[k] = k < 3 - axes ? 0 : to.stride[k - (3 - axes)];
  return s;
}

// As in scan.cu; with fewer states for a lane, whose traces are in registers too.
template <class F>
auto with_shape(const ScanGradArgs& a, const F& f) {
  if (a.states > 128) return f(Shape<32, 8, 64, 4, 1>());
  if (a.states > 64) return f(Shape<32, 4, 128, 4, 1>());
  if (a.states > 16) return f(Shape<16, 4, 256, 4, 2>());
  if (a.batch * a.width < SCAN_ENOUGH / 2) return f(Shape<8, 2, 256, 8, 2>());
  return f(Shape<4, 4, 256, 4, 2>());
}

}  // namespace

int64_t scan_backward_scratch(const ScanGradArgs& a) {
  return with_shape(a, [&](auto shape) { return parts_of(a, decltype(shape)::CHANNELS).count; });
}

const char* scan_backward(const ScanGradArgs& a) {
  Parts parts;
  if (a.batch && a.width) {
    const char* wrong = with_type(a.x.type, [&](auto type) {
      return with_shape(a, [&](auto shape) {
        using Shape = decltype(shape);
        parts = parts_of(a, Shape::CHANNELS);
        if (a.batch * parts.blocks > 0x7fffffff) return "selective_scan: more than 2^31 blocks";
        return launch(scan_backward_kernel<decltype(type), Shape>, dim3{unsigned(a.batch * parts.blocks), 1, 1},
                      Shape::THREADS, sizeof(Shared<Shape>), a.stream, a, parts);
      });
    });
    if (wrong) return wrong;
  } else {
    parts = parts_of(a, 1);
    parts.blocks = 0;
  }
  const Sums sums{{sum_of(a.gB, parts.gB, parts.blocks, a.batch, a.tokens, a.states, 3),
                   sum_of(a.gC, parts.gC, parts.blocks, a.batch, a.tokens, a.states, 3),
                   sum_of(a.gA, parts.gA, a.batch, 1, a.width, a.states, 2),
                   sum_of(a.gD, parts.gD, a.batch, 1, 1, a.width, 1),
                   sum_of(a.gdt_bias, parts.gdt_bias, a.batch, 1, 1, a.width, 1)}};
  const int64_t most = parts.tokens > parts.rates ? parts.tokens : parts.rates, wanted = most / SUM_THREADS + 1;
  return launch(sum_kernel, dim3{unsigned(wanted < 4096 ? wanted : 4096), 5, 1}, SUM_THREADS, 0, a.stream, sums);
}

}  // namespace hybrid_lm
