// One token of Mamba-2 in one kernel, between the two matrix products: the convolution with its state, silu, the step
// of the recurrence, the direct path, the gate. All states are updated where they lie.
//
// A block has a sequence's head, or where those are few, some rows of it. B and C are the same for all heads of a
// group: each block convolves them for itself, and the last block of a group to have read their inputs moves them on.
// The state goes through registers once: LANES lanes of a warp have a row's states, VEC each, in one access.
#include "cuda/device.cuh"
#include "cuda/step.h"

#if defined(HYBRID_LM_EMULATE)
namespace hybrid_lm {
// Blocks run one after the other.
inline unsigned atomicInc(unsigned* at, unsigned last) {
  const unsigned old = *at;
  *at = old >= last ? 0 : old + 1;
  return old;
}
inline void __threadfence() {}
}  // namespace hybrid_lm
#endif

namespace hybrid_lm {
namespace {

constexpr int STEP_THREADS = 128;
// Rows that a thread has on their way at the same time.
constexpr int STEP_ROWS = 4;

// What a block works on.
struct StepPlace {
  int64_t row, head, group;
  int64_t first, count;  // of the head's rows
  bool reset;

  HYBRID_LM_DEVICE StepPlace(const StepArgs& a, int64_t rows) {
    const int64_t slices = (a.head_dim + rows - 1) / rows, block = blockIdx.x;
    row = block / slices / a.heads, head = block / slices % a.heads;
    group = head / (a.heads / a.groups);
    first = block % slices * rows;
    count = a.head_dim - first < rows ? a.head_dim - first : rows;
    reset = a.reset && static_cast<const uint8_t*>(a.reset.data)[row * a.reset.stride[0]];
  }
};

HYBRID_LM_DEVICE int64_t step_before(const StepArgs& a, const StepPlace& at, int64_t j, int64_t channel) {
  return at.row * a.conv.stride[0] + j * a.conv.stride[1] + channel * a.conv.stride[2];
}

// Place of row p of the block in y, or in z.
HYBRID_LM_DEVICE int64_t step_output(const View& v, const StepPlace& at, int64_t p) {
  return at.row * v.stride[0] + at.head * v.stride[1] + (at.first + p) * v.stride[2];
}

// A channel after the convolution.
HYBRID_LM_DEVICE float step_channel(const StepArgs& a, const StepPlace& at, int64_t channel) {
  const float now = read(a.xBC, at.row * a.xBC.stride[0] + channel * a.xBC.stride[1]);
  if (!a.taps) return now;
  float sum = a.bias ? read(a.bias, channel * a.bias.stride[0]) : 0.0f;
  for (int64_t k = 0; k < a.taps; ++k) {
    const float tap = read(a.weight, channel * a.weight.stride[0] + k * a.weight.stride[1]);
    if (k == a.taps - 1)
      sum += tap * now;
    else if (!at.reset)
      sum += tap * read(a.conv, step_before(a, at, k, channel));
  }
  return silu<Thread>(sum);
}

// The channel's last inputs move on by one.
HYBRID_LM_DEVICE void step_move(const StepArgs& a, const StepPlace& at, int64_t channel) {
  for (int64_t j = 0; j < a.taps - 1; ++j) {
    const float value = j == a.taps - 2 ? read(a.xBC, at.row * a.xBC.stride[0] + channel * a.xBC.stride[1])
                        : at.reset      ? 0.0f
                                        : read(a.conv, step_before(a, at, j + 1, channel));
    write(a.conv, step_before(a, at, j, channel), value);
  }
}

template <int LANES, int VEC>
__global__ void __launch_bounds__(STEP_THREADS) step_kernel(const StepArgs a, int64_t rows, unsigned sharing) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  float *B = shared, *C = B + a.states, *x = C + a.states;
  int* last = reinterpret_cast<int*>(x + rows);
  const StepPlace at(a, rows);
  const int64_t inner = a.heads * a.head_dim, own = at.head * a.head_dim + at.first;
  const int64_t B_at = inner + at.group * a.states, C_at = B_at + a.groups * a.states;

  // 1. the convolution
  for (int64_t i = threadIdx.x; i < 2 * a.states + at.count; i += STEP_THREADS) {
    if (i < a.states) {
      B[i] = step_channel(a, at, B_at + i);
    } else if (i < 2 * a.states) {
      C[i - a.states] = step_channel(a, at, C_at + i - a.states);
    } else {
      x[i - 2 * a.states] = step_channel(a, at, own + i - 2 * a.states);
      step_move(a, at, own + i - 2 * a.states);
    }
  }
  __syncthreads();
  if (a.taps > 1) {
    if (threadIdx.x == 0) {
      __threadfence();
      auto* ticket = static_cast<unsigned*>(a.tickets.data) + at.row * a.groups + at.group;
      // Counts to the number of blocks and begins anew.
      *last = atomicInc(ticket, sharing - 1) == sharing - 1;
    }
    __syncthreads();
    if (*last)
      for (int64_t i = threadIdx.x; i < 2 * a.states; i += STEP_THREADS)
        step_move(a, at, i < a.states ? B_at + i : C_at + i - a.states);
  }

  // 2. the step of the head
  float dt = read(a.dt, at.row * a.dt.stride[0] + at.head * a.dt.stride[1]);
  if (a.dt_bias) dt += read(a.dt_bias, at.head * a.dt_bias.stride[0]);
  if (a.dt_softplus) dt = softplus<Thread>(dt);
  dt = dt < a.dt_low ? a.dt_low : dt > a.dt_high ? a.dt_high : dt;
  const float decay = Thread::exp2(dt * read(a.A, at.head * a.A.stride[0]) * float(LOG2E));
  const float D = a.D ? read(a.D, at.head * a.D.stride[0]) : 0.0f;

  // 3. the recurrence, STEP_ROWS rows at a time
  constexpr int WARP = 32, AT_ONCE = WARP / LANES * (STEP_THREADS / WARP);
  const int lane = threadIdx.x % LANES, mine = threadIdx.x / LANES;
  auto* state = static_cast<float*>(a.state.data) + ((at.row * a.heads + at.head) * a.head_dim + at.first) * a.states;
  for (int64_t start = 0; start < at.count; start += STEP_ROWS * AT_ONCE) {
    float y[STEP_ROWS] = {};
    for (int64_t n = lane * VEC; n < (a.states + LANES * VEC - 1) / (LANES * VEC) * (LANES * VEC); n += LANES * VEC) {
      Floats<VEC> h[STEP_ROWS];
      HYBRID_LM_UNROLL
      for (int r = 0; r < STEP_ROWS; ++r) {
        const int64_t p = start + r * AT_ONCE + mine;
        if (p < at.count && n < a.states) h[r] = *reinterpret_cast<const Floats<VEC>*>(state + p * a.states + n);
      }
      HYBRID_LM_UNROLL
      for (int r = 0; r < STEP_ROWS; ++r) {
        const int64_t p = start + r * AT_ONCE + mine;
        if (p >= at.count || n >= a.states) continue;
        const float input = dt * x[p];
        HYBRID_LM_UNROLL
        for (int v = 0; v < VEC; ++v) {
          // A new document does not ask what the state was, not even times 0.
          h[r].at[v] = (at.reset ? 0.0f : decay * h[r].at[v]) + input * B[n + v];
          y[r] += h[r].at[v] * C[n + v];
        }
        *reinterpret_cast<Floats<VEC>*>(state + p * a.states + n) = h[r];
      }
    }
    // Each lane keeps one row's sum, or several lanes the same one.
    sum_over_lanes<STEP_ROWS, LANES>(y, unsigned(lane));
    constexpr int KEPT = STEP_ROWS >= LANES ? STEP_ROWS / LANES : 1, SAME = LANES > STEP_ROWS ? LANES / STEP_ROWS : 1;
    if (lane % SAME) continue;
    HYBRID_LM_UNROLL
    for (int r = 0; r < KEPT; ++r) {
      const int64_t p = start + (kept_from<STEP_ROWS, LANES>(unsigned(lane)) + r) * AT_ONCE + mine;
      if (p >= at.count) continue;
      // 4. the direct path and the gate
      float out = y[r] + D * x[p];
      if (a.z) out *= silu<Thread>(read(a.z, step_output(a.z, at, p)));
      write(a.y, step_output(a.y, at, p), out);
    }
  }
}

template <int LANES, int VEC>
const char* start(const StepArgs& a) {
  // A whole head, unless there are too few of them for a large device's 132 processors, four each.
  const int64_t rows = a.batch * a.heads >= 528 || a.head_dim < 16 ? a.head_dim : 16;
  const int64_t slices = (a.head_dim + rows - 1) / rows, blocks = a.batch * a.heads * slices;
  if (blocks > 0x7fffffff) return "mamba2_step: more than 2^31 heads";
  const size_t bytes = sizeof(float) * (2 * a.states + rows + 1);
  if (bytes > 200 * 1024) return "mamba2_step: more states than a block has memory for";
  return launch(step_kernel<LANES, VEC>, dim3{unsigned(blocks), 1, 1}, STEP_THREADS, bytes, a.stream, a, rows,
                unsigned(a.heads / a.groups * slices));
}

}  // namespace

const char* step(const StepArgs& a) {
  if (!a.batch || !a.heads || !a.head_dim) return nullptr;
  const bool aligned = a.states % 4 == 0 && reinterpret_cast<uintptr_t>(a.state.data) % 16 == 0;
  if (!aligned) return a.states > 8 ? start<32, 1>(a) : start<8, 1>(a);
  if (a.states > 64) return start<32, 4>(a);
  if (a.states > 16) return start<16, 4>(a);
  return start<4, 4>(a);
}

}  // namespace hybrid_lm
