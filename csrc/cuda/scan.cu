// The selective scan, forward.
#include "cuda/scan.cuh"

namespace hybrid_lm {
namespace {

constexpr int THREADS = 128;
constexpr int STAGED = 512;  // numbers of B, and of C, in a stage

template <int LANES, int STATES>
struct Shape : ScanLanes<LANES, STATES, THREADS, (STAGED / (LANES * STATES) < 8 ? STAGED / (LANES * STATES) : 8)> {
  static constexpr int STEPS = STAGED / (LANES * STATES);
};

template <class T, class Shape>
__global__ void __launch_bounds__(THREADS) scan_kernel(const ScanArgs a) {
  using Bits = typename T::Bits;
  constexpr int GROUP = Shape::GROUP, OWN = Shape::OWN, STATES = Shape::STATES;
  auto* stages = reinterpret_cast<ScanStage<Shape::STEPS, Shape::WIDTH>*>(shared_memory());
  const int64_t blocks = (a.width + Shape::CHANNELS - 1) / Shape::CHANNELS;
  const ScanPlace<Shape> at(a, int64_t(blockIdx.x) / blocks, int64_t(blockIdx.x) % blocks);

  float A[STATES], h[STATES];
  scan_rates(a, at, A);
  HYBRID_LM_UNROLL
  for (int k = 0; k < STATES; ++k) {
    const int64_t n = Shape::state(k, at.lane);
    const int64_t place = at.row * a.initial.stride[0] + at.channel * a.initial.stride[1] + n * a.initial.stride[2];
    h[k] = a.initial && n < a.states ? read(a.initial, place) : 0.0f;
  }
  const float D = a.D ? read(a.D, at.channel * a.D.stride[0]) : 0.0f;
  const float bias = a.dt_bias ? read(a.dt_bias, at.channel * a.dt_bias.stride[0]) : 0.0f;

  // The first token of a group that this lane owns, and what it has of these tokens.
  const int64_t own = at.lane / Shape::SAME * OWN;
  const Bits* x_at = scan_at<T>(a.x, at.row, own, at.channel);
  const Bits* dt_at = scan_at<T>(a.dt, at.row, own, at.channel);
  const Bits* z_at = a.z ? scan_at<T>(a.z, at.row, own, at.channel) : nullptr;
  Bits* y_at = scan_at<T>(a.y, at.row, own, at.channel);
  ScanOwned<T, Shape> x_next, dt_next, z_next{};
  const int x_step = int(a.x.stride[1]), dt_step = int(a.dt.stride[1]), z_step = int(a.z.stride[1]);
  const int y_step = int(a.y.stride[1]);
  auto fetch = [&](int left) {
    x_next.fetch(x_at, x_step, left);
    dt_next.fetch(dt_at, dt_step, left);
    x_at += GROUP * x_step, dt_at += GROUP * dt_step;
    if (!z_at) return;
    z_next.fetch(z_at, z_step, left);
    z_at += GROUP * z_step;
  };
  fetch(scan_left<Shape>(a.tokens - own));

  ScanRows<T, Shape, Shape::STEPS> rows;
  rows.fetch(a, at.row, 0);
  int half = 0;
  for (int64_t start = 0; start < a.tokens; start += Shape::STEPS, half = !half) {
    // Nobody still reads what this stage replaces: the barrier of the stage between stood behind that.
    auto& stage = stages[half];
    rows.put(stage);
    __syncthreads();
    rows.fetch(a, at.row, start + Shape::STEPS);
    for (int g = 0; g < Shape::STEPS; g += GROUP) {
      const int64_t token = start + g;
      if (token >= a.tokens) break;
      const int left = scan_left<Shape>(a.tokens - token - own);
      if (a.before && token % SCAN_CHUNK == 0 && at.there) {
        auto* kept = static_cast<float*>(a.before.data) +
                     (token / SCAN_CHUNK * a.batch + at.row) * a.states * a.width + at.channel;
        HYBRID_LM_UNROLL
        for (int k = 0; k < STATES; ++k) {
          const int64_t n = Shape::state(k, at.lane);
          if (n < a.states) kept[n * a.width] = h[k];
        }
      }
      float x[OWN], dt[OWN], input[OWN], z[OWN];
      HYBRID_LM_UNROLL
      for (int i = 0; i < OWN; ++i) {
        x[i] = T::wide(x_next.at[i]), dt[i] = T::wide(dt_next.at[i]);
        z[i] = z_at ? T::wide(z_next.at[i]) : 0.0f;
      }
      fetch(scan_left<Shape>(a.tokens - token - own - GROUP));
      scan_steps(dt, bias, a.dt_softplus);
      HYBRID_LM_UNROLL
      for (int i = 0; i < OWN; ++i) input[i] = dt[i] * x[i];

      float y[GROUP];
      HYBRID_LM_UNROLL
      for (int i = 0; i < GROUP; ++i) {
        const float step = scan_owners<Shape>(dt, i), in = scan_owners<Shape>(input, i);
        y[i] = 0.0f;
        if (const int mark = stage.mark[g + i]) {
          if (mark == BEYOND) continue;
          HYBRID_LM_UNROLL
          for (int k = 0; k < STATES; ++k) h[k] = 0.0f;
        }
        float B[STATES], C[STATES];
        scan_states<Shape>(stage.B[g + i], at.lane, B);
        scan_states<Shape>(stage.C[g + i], at.lane, C);
        y[i] = scan_token<STATES, Thread>(h, A, step, in, B, C);
      }
      sum_over_lanes<GROUP, Shape::LANES>(y, at.lane);
      if (at.there && at.lane % Shape::SAME == 0) {
        HYBRID_LM_UNROLL
        for (int i = 0; i < OWN; ++i) {
          float out = y[i] + D * x[i];
          if (z_at) out *= silu<Thread>(z[i]);
          if (i < left) y_at[i * y_step] = T::narrow(out);
        }
      }
      y_at += GROUP * y_step;
    }
  }
  if (!at.there) return;
  HYBRID_LM_UNROLL
  for (int k = 0; k < STATES; ++k) {
    const int64_t n = Shape::state(k, at.lane);
    if (n < a.states)
      write(a.state, at.row * a.state.stride[0] + at.channel * a.state.stride[1] + n * a.state.stride[2], h[k]);
  }
}

// The way a channel's states are spread over lanes, by the sizes alone, so that a call gives the same bits on every
// device: as few lanes as hold the states, and more where there are not channels enough to fill a device.
template <class F>
const char* with_shape(const ScanArgs& a, const F& f) {
  const int64_t channels = a.batch * a.width;
  if (a.states > 128) return f(Shape<16, 16>());
  if (a.states > 64) return f(Shape<8, 16>());
  if (a.states > 16) return f(Shape<4, 16>());
  if (channels * 4 < SCAN_ENOUGH) return f(Shape<8, 2>());
  if (channels * 2 < SCAN_ENOUGH) return f(Shape<4, 4>());
  if (channels < SCAN_ENOUGH) return f(Shape<2, 8>());
  return f(Shape<1, 16>());
}

}  // namespace

const char* scan(const ScanArgs& a) {
  if (!a.batch || !a.width) return nullptr;
  return with_type(a.x.type, [&](auto type) {
    return with_shape(a, [&](auto shape) {
      using Shape = decltype(shape);
      const int64_t blocks = a.batch * ((a.width + Shape::CHANNELS - 1) / Shape::CHANNELS);
      if (blocks > 0x7fffffff) return "selective_scan: more than 2^31 blocks of channels";
      return launch(scan_kernel<decltype(type), Shape>, dim3{unsigned(blocks), 1, 1}, THREADS,
                    2 * sizeof(ScanStage<Shape::STEPS, Shape::WIDTH>), a.stream, a);
    });
  });
}

}  // namespace hybrid_lm
