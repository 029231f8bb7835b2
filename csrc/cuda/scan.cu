// The selective scan, forward.
//
// Half of a block's warps walk the tokens, the other half carry. A walker has STATES states of each of PER neighbouring
// channels, in registers; LANES lanes of a warp share these channels. Carriers bring what walkers need, a stage of
// tokens ahead: rows of B and C as floats, and for each token and channel the step after softplus and the input. And
// they add up what lanes have of the outputs and write them, a stage behind. So walkers wait for no memory but the
// shared one, and do little more than the exponentials and multiplications that there are for each state.
#include "cuda/scan_carry.cuh"
#include "cuda/scan_walk.cuh"

namespace hybrid_lm {
namespace {

// A warp is one of walkers or one of carriers. Both meet at the end of every stage.
template <class T, class Shape>
__global__ void __launch_bounds__(SCAN_THREADS, Shape::BLOCKS) scan_kernel(const ScanArgs a, const ScanPlain plain) {
  auto* stages = reinterpret_cast<WalkStage<Shape>*>(shared_memory());
  const int64_t blocks = (a.width + Shape::CHANNELS - 1) / Shape::CHANNELS;
  const int64_t row = int64_t(blockIdx.x) / blocks, block = int64_t(blockIdx.x) % blocks;
  constexpr int STEPS = Shape::STEPS;

  float *rates = reinterpret_cast<float*>(stages), *states = rates + Shape::NUMBERS;
  const auto place = [&](const View& v, int64_t d, int64_t n) {
    return row * v.stride[0] + d * v.stride[1] + n * v.stride[2];
  };
  each_number<Shape>(a, block, [&](int at, int64_t d, int64_t n, bool there) {
    rates[at] = there ? read(a.A, d * a.A.stride[0] + n * a.A.stride[1]) * float(LOG2E) : 0.0f;
    states[at] = there && a.initial ? read(a.initial, place(a.initial, d, n)) : 0.0f;
  });
  __syncthreads();
  // Where nothing is after the last stage.
  float* last = reinterpret_cast<float*>(stages + (a.tokens + STEPS - 1) / STEPS % 2);

  if (threadIdx.x < WALKERS) {
    Walker<Shape> walker(a, row, block, rates, states);
    __syncthreads();
    __syncthreads();
    int turn = 0;
    for (int64_t start = 0; start < a.tokens; start += STEPS, turn = !turn) {
      if (a.before && start % SCAN_CHUNK == 0) walker.keep(a, start);
      const int left = scan_count(a.tokens - start);
      walker.walk(stages[turn], left < STEPS ? left : STEPS);
      __syncthreads();
    }
    walker.put(last);
  } else {
    Carrier<T, Shape> carrier(a, row, block);
    carrier.fetch(a, plain, 0);
    __syncthreads();
    carrier.put(a, plain, 0, stages[0]);
    __syncthreads();
    // Walkers are at the stage that ends where the next one begins; what they did before is written, and the next one
    // takes its place.
    int turn = 1;
    int64_t next = STEPS;
    for (; next < a.tokens + STEPS; next += STEPS, turn = !turn) {
      // What sets out early needs registers until it arrives.
      constexpr bool EARLY = sizeof(typename T::Bits) * Shape::CARRIED <= 16;
      if (EARLY) carrier.fetch(a, plain, next);
      if (next > STEPS) carrier.finish(a, plain, STEPS, stages[turn]);
      if (!EARLY) carrier.fetch(a, plain, next);
      carrier.put(a, plain, next, stages[turn]);
      __syncthreads();
    }
    carrier.finish(a, plain, int(a.tokens - (next - 2 * STEPS)), stages[turn]);
  }
  __syncthreads();
  each_number<Shape>(a, block, [&](int at, int64_t d, int64_t n, bool there) {
    if (there) write(a.state, place(a.state, d, n), last[at]);
  });
}

// Whether rows of COUNT numbers of elements of this type begin where one access may.
template <int COUNT, class T>
bool in_one(const ScanArgs& a, const View& v) {
  if (!v) return true;
  const bool begins = reinterpret_cast<uintptr_t>(v.data) % (COUNT * sizeof(typename T::Bits)) == 0;
  return begins && (a.batch == 1 || v.stride[0] % COUNT == 0) && (a.tokens == 1 || v.stride[1] % COUNT == 0);
}

// Up to FEW channels eight lanes each fill a large device better, from MANY on two: by estimates from the machine code,
// until a GPU says otherwise. Tests have fewer, and want all shapes.
#if defined(HYBRID_LM_EMULATE)
constexpr int64_t FEW = 6, MANY = 36;
#else
constexpr int64_t FEW = 2048, MANY = 16384;
#endif

// The way a channel's states are spread over lanes, by the sizes alone, so that a call gives the same bits on every
// device: as few lanes as hold the states, and more where there are not channels enough to fill a device.
template <class F>
const char* with_shape(const ScanArgs& a, const F& f) {
  const int64_t channels = a.batch * a.width;
  if (a.states > 64) return f(ScanShape<16, 16, 1, 16, 4, 1>());
  if (a.states > 16) return f(ScanShape<4, 16, 1, 16, 8, 1>());
  if (channels <= FEW) return f(ScanShape<8, 2, 1, 32, 16, 4>());
  if (channels < MANY) return f(ScanShape<4, 4, 1, 32, 16, 4>());
  return f(ScanShape<2, 8, 2, 16, 8, 2>());
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
      const bool rows = a.states == Shape::WIDTH && in_one<4, T>(a, a.B) && in_one<4, T>(a, a.C);
      ScanPlain plain{rows, a.width % 2 == 0};
      for (const View* v : {&a.x, &a.dt, &a.z, &a.y}) plain.pairs = plain.pairs && in_one<2, T>(a, *v);
      return launch(scan_kernel<T, Shape>, dim3{unsigned(blocks), 1, 1}, SCAN_THREADS, 2 * sizeof(WalkStage<Shape>),
                    a.stream, a, plain);
    });
  });
}

}  // namespace hybrid_lm
