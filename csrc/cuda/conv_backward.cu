// The causal convolution, backward.
//
// A thread goes on for the taps beyond its stretch, whose gradients are its own rows' too, and computes the sums before
// the activation again. A row's gradient is complete, and stored, when the last token that sees it is done. What a
// thread has of the weights' gradients is added up over the block's stretches, in one order, and stored as a part; a
// second kernel adds the parts.
#include "cuda/conv.cuh"

namespace hybrid_lm {
namespace {

template <int VEC>
struct ConvBlocks {
  ConvGrid grid;
  int64_t tiles;   // of channels: LANES threads each
  int64_t groups;  // of stretches of a sequence: WARPS each

  explicit ConvBlocks(const ConvArgs& a) : grid(a.batch, a.tokens, a.width, VEC) {
    tiles = (grid.vectors + CONV_LANES - 1) / CONV_LANES;
    groups = (grid.stretches + CONV_WARPS - 1) / CONV_WARPS;
  }
  HYBRID_LM_FN int64_t parts(int64_t batch) const { return batch * groups; }
};

// Stores the finished gradient of a token's input, or of one of `initial`, if it is this thread's.
template <class T, int VEC>
HYBRID_LM_DEVICE void conv_finish(const ConvGradArgs& a, const ConvPlace& at, int64_t token, bool open,
                                  float (&g)[VEC]) {
  const int64_t before = token + a.taps - 1, kept = before - a.tokens;  // its place in `initial`, and in the state
  if (token >= at.end || before < 0 || (token < at.begin && at.begin > 0)) return;
  ConvRow<T, VEC> bits;
  if (a.gstate && kept >= 0 && open) {
    float more[VEC];
    bits.load(conv_at<T>(a.gstate, at, kept), at.count);
    bits.wide(more);
    HYBRID_LM_UNROLL
    for (int v = 0; v < VEC; ++v) g[v] += more[v];
  }
  const bool own = token >= 0;
  bits.narrow(g);
  bits.store(conv_at<T>(own ? a.gx : a.ginitial, at, own ? token : before), own || a.ginitial ? at.count : 0);
}

// TAPS tokens from t on.
template <bool PLAIN, class T, int VEC, int TAPS>
HYBRID_LM_DEVICE void conv_tokens(const ConvGradArgs& a, const ConvPlace& at, const ConvWeights<VEC, TAPS>& w,
                                  float (&ring)[TAPS][VEC], float (&gring)[TAPS][VEC], float (&gtap)[TAPS + 1][VEC],
                                  ConvNext<T, VEC, TAPS>& x_next, ConvNext<T, VEC, TAPS>& gy_next, int64_t t,
                                  int64_t stop, int& closed) {
  HYBRID_LM_UNROLL
  for (int i = 0; i < TAPS; ++i) {
    if (!PLAIN && t + i < stop && conv_reset(a, at, t + i)) closed = TAPS - 1 + i;
    float g[VEC];
    gy_next.template take<PLAIN>(i, g);
    x_next.template take<PLAIN>(i, ring[(TAPS - 1 + i) % TAPS]);
    if (a.silu) {
      float sum[VEC];
      conv_sum<PLAIN>(w, ring, i, closed, sum);
      HYBRID_LM_UNROLL
      for (int v = 0; v < VEC; ++v) g[v] *= silu_slope<Thread>(sum[v], sigmoid<Thread>(sum[v]));
    }
    const bool own = PLAIN || t + i < at.end;
    HYBRID_LM_UNROLL
    for (int k = 0; k < TAPS; ++k) {
      if (!PLAIN && (k < w.first || i + k < closed)) continue;
      HYBRID_LM_UNROLL
      for (int v = 0; v < VEC; ++v) {
        gring[(i + k) % TAPS][v] += w.tap[k][v] * g[v];
        if (own) gtap[k][v] += g[v] * ring[(i + k) % TAPS][v];
      }
    }
    if (own) {
      HYBRID_LM_UNROLL
      for (int v = 0; v < VEC; ++v) gtap[TAPS][v] += g[v];
    }
    const int64_t row = t - (TAPS - 1) + i;
    if constexpr (PLAIN) {
      ConvRow<T, VEC> bits;
      bits.narrow(gring[i]);
      bits.Row<T, VEC>::store(conv_at<T>(a.gx, at, row));
    } else {
      conv_finish<T>(a, at, row, i >= closed, gring[i]);
    }
    HYBRID_LM_UNROLL
    for (int v = 0; v < VEC; ++v) gring[i][v] = 0.0f;
  }
  closed -= TAPS;
}

template <class T, int VEC, int TAPS>
__global__ void __launch_bounds__(CONV_THREADS, 3)
    conv_backward_kernel(const ConvGradArgs a, const ConvBlocks<VEC> blocks) {
  const int64_t tile = int64_t(blockIdx.x) % blocks.tiles, part = int64_t(blockIdx.x) / blocks.tiles;
  const int lane = threadIdx.x % CONV_LANES, warp = threadIdx.x / CONV_LANES;
  const ConvPlace at(a, blocks.grid.length, VEC, part / blocks.groups, part % blocks.groups * CONV_WARPS + warp,
                     tile * CONV_LANES + lane);
  float gtap[TAPS + 1][VEC];  // the last: of the bias
  HYBRID_LM_UNROLL
  for (int k = 0; k <= TAPS; ++k) {
    HYBRID_LM_UNROLL
    for (int v = 0; v < VEC; ++v) gtap[k][v] = 0.0f;
  }
  if (at.count) {
    const ConvWeights<VEC, TAPS> w(a, at);
    float ring[TAPS][VEC], gring[TAPS][VEC];  // inputs, and what has come together of their gradients
    int closed = conv_before<T, VEC, TAPS>(a, at, w.first, ring);
    HYBRID_LM_UNROLL
    for (int j = 0; j < TAPS; ++j) {
      HYBRID_LM_UNROLL
      for (int v = 0; v < VEC; ++v) gring[j][v] = 0.0f;
    }
    const int64_t stop = at.end + a.taps - 1 < a.tokens ? at.end + a.taps - 1 : a.tokens;
    ConvNext<T, VEC, TAPS> x_next(a.x, at, stop), gy_next(a.gy, at, stop);
    int64_t t = at.begin;
    for (; t < stop; t += TAPS) {
      // The rows that these tokens finish must be the stretch's, and the tokens too.
      const bool own = a.gy && t - (TAPS - 1) >= at.begin && t + TAPS <= at.end;
      if (own && conv_plain<VEC, TAPS>(a, at, w.first, closed, t, stop))
        conv_tokens<true>(a, at, w, ring, gring, gtap, x_next, gy_next, t, stop, closed);
      else
        conv_tokens<false>(a, at, w, ring, gring, gtap, x_next, gy_next, t, stop, closed);
    }
    HYBRID_LM_UNROLL
    for (int j = 0; j < TAPS - 1; ++j) conv_finish<T>(a, at, t - (TAPS - 1) + j, j >= closed, gring[j]);
  }
  auto* shared = reinterpret_cast<float*>(shared_memory());  // [warp][tap][lane][channel]
  constexpr int TILE = CONV_LANES * VEC;
  HYBRID_LM_UNROLL
  for (int k = 0; k <= TAPS; ++k) {
    HYBRID_LM_UNROLL
    for (int v = 0; v < VEC; ++v) shared[(warp * (TAPS + 1) + k) * TILE + lane * VEC + v] = gtap[k][v];
  }
  __syncthreads();
  const int first = TAPS - int(a.taps);
  auto* parts = static_cast<float*>(a.parts.data) + part * (a.taps + 1) * a.width;
  for (int at_tile = threadIdx.x; at_tile < (TAPS + 1) * TILE; at_tile += CONV_THREADS) {
    const int k = at_tile / TILE;
    const int64_t channel = tile * TILE + at_tile % TILE;
    if (k < first || channel >= a.width) continue;
    float sum = 0.0f;
    for (int from = 0; from < CONV_WARPS; ++from) sum += shared[from * (TAPS + 1) * TILE + at_tile];
    parts[(k - first) * a.width + channel] = sum;
  }
}

// The sums over all parts: a block has LANES channels of one tap, and each of its warps every WARPS-th part.
__global__ void __launch_bounds__(CONV_THREADS)
    conv_weights_kernel(const ConvGradArgs a, int64_t count, int64_t tiles) {
  const int lane = threadIdx.x % CONV_LANES, warp = threadIdx.x / CONV_LANES;
  const int64_t tap = int64_t(blockIdx.x) / tiles, channel = int64_t(blockIdx.x) % tiles * CONV_LANES + lane;
  const auto* from = static_cast<const float*>(a.parts.data) + tap * a.width + channel;
  const int64_t step = (a.taps + 1) * a.width;
  float sum = 0.0f;
  if (channel < a.width) {
    for (int64_t part = warp; part < count; part += CONV_WARPS) sum += from[part * step];
  }
  auto* shared = reinterpret_cast<float*>(shared_memory());
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (warp || channel >= a.width) return;
  for (int other = 1; other < CONV_WARPS; ++other) sum += shared[other * CONV_LANES + lane];
  if (tap < a.taps)
    write(a.gweight, channel * a.gweight.stride[0] + tap * a.gweight.stride[1], sum);
  else if (a.gbias)
    write(a.gbias, channel * a.gbias.stride[0], sum);
}

template <class T, int VEC, int TAPS>
const char* start(const ConvGradArgs& a) {
  const ConvBlocks<VEC> blocks(a);
  const int64_t count = blocks.parts(a.batch), grid = count * blocks.tiles;
  const int64_t tiles = (a.width + CONV_LANES - 1) / CONV_LANES;
  if (grid > 0x7fffffff || tiles * (a.taps + 1) > 0x7fffffff)
    return "causal_conv1d: more than 2^31 blocks of channels and tokens";
  const size_t bytes = sizeof(float) * CONV_WARPS * (TAPS + 1) * CONV_LANES * VEC;
  // Without a sequence there are no parts, and the sums are zeros.
  const char* error = count == 0 ? nullptr
                                 : launch(conv_backward_kernel<T, VEC, TAPS>, dim3{unsigned(grid), 1, 1},
                                          CONV_THREADS, bytes, a.stream, a, blocks);
  if (error) return error;
  return launch(conv_weights_kernel, dim3{unsigned(tiles * (a.taps + 1)), 1, 1}, CONV_THREADS,
                sizeof(float) * CONV_THREADS, a.stream, static_cast<const ConvGradArgs&>(a), count, tiles);
}

template <class T, int VEC>
const char* start_in_vectors(const ConvGradArgs& a) {
  bool aligned = true;
  for (const View* v : {&a.x, &a.gy, &a.gx, &a.gstate, &a.ginitial}) aligned = aligned && conv_aligned<T>(a, *v, VEC);
  return aligned ? start<T, VEC, 4>(a) : start<T, 1, 4>(a);
}

}  // namespace

const char* conv_backward(const ConvGradArgs& a) {
  if (!a.width) return nullptr;
  return with_conv_type(a.x.type, [&](auto type) {
    using T = decltype(type);
    // Accesses of 8 bytes: more channels would be more registers than leave room for other threads.
    constexpr int VEC = 8 / sizeof(typename T::Bits);
    return a.taps > 4 ? start<T, 2, 8>(a) : start_in_vectors<T, VEC>(a);
  });
}

int64_t conv_parts(const ConvGradArgs& a) { return ConvBlocks<1>(a).parts(a.batch) * (a.taps + 1) * a.width; }

}  // namespace hybrid_lm
