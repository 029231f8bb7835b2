// The causal convolution, forward.
#include "cuda/conv.cuh"

namespace hybrid_lm {
namespace {

template <class T, int VEC, int TAPS, int GROUP>
__global__ void __launch_bounds__(CONV_THREADS) conv_kernel(const ConvArgs a, const ConvGrid grid) {
  const int64_t thread = int64_t(blockIdx.x) * CONV_THREADS + threadIdx.x, walk = thread / grid.vectors;
  if (walk >= a.batch * grid.stretches) return;
  const ConvPlace at(a, grid.length, VEC, walk / grid.stretches, walk % grid.stretches, thread % grid.vectors);
  const ConvWeights<VEC, TAPS> w(a, at);
  float row[TAPS - 1 + GROUP][VEC];
  int closed = conv_before<T, VEC, TAPS>(a, at, w.first, row);
  ConvGroup<T, VEC, GROUP> next;
  next.fetch(a.x, at, at.begin, at.end);
  for (int64_t t = at.begin; t < at.end; t += GROUP) {
    HYBRID_LM_UNROLL
    for (int i = 0; i < GROUP; ++i) next.at[i].wide(row[TAPS - 1 + i]);
    next.fetch(a.x, at, t + GROUP, at.end);
    HYBRID_LM_UNROLL
    for (int i = 0; i < GROUP; ++i) {
      if (t + i >= at.end) break;
      if (conv_reset(a, at, t + i)) closed = TAPS - 1 + i;
      float y[VEC];
      conv_sum(w, row, i, closed, y);
      if (a.silu) {
        HYBRID_LM_UNROLL
        for (int v = 0; v < VEC; ++v) y[v] = silu<Thread>(y[v]);
      }
      ConvRow<T, VEC> bits;
      bits.narrow(y);
      bits.store(conv_at<T>(a.y, at, t + i), at.count);
      if (a.state && t + i == a.tokens - 1) {
        HYBRID_LM_UNROLL
        for (int k = 0; k < TAPS - 1; ++k) {
          if (k < w.first) continue;
          HYBRID_LM_UNROLL
          for (int v = 0; v < VEC; ++v)
            if (v < at.count)
              write(a.state, conv_small(a.state, at, k - w.first, v), i + 1 + k < closed ? 0.0f : row[i + 1 + k][v]);
        }
      }
    }
    HYBRID_LM_UNROLL
    for (int j = 0; j < TAPS - 1; ++j) {
      HYBRID_LM_UNROLL
      for (int v = 0; v < VEC; ++v) row[j][v] = row[j + GROUP][v];
    }
    closed -= GROUP;
  }
}

template <class T, int VEC, int TAPS>
const char* start(const ConvArgs& a) {
  // Eight channels and eight taps are many registers: one token at a time.
  constexpr int GROUP = VEC * TAPS > 32 ? 1 : VEC * TAPS > 16 ? 2 : 4;
  const ConvGrid grid(a.batch, a.tokens, a.width, VEC);
  const int64_t blocks = (a.batch * grid.stretches * grid.vectors + CONV_THREADS - 1) / CONV_THREADS;
  if (blocks > 0x7fffffff) return "causal_conv1d: more than 2^31 blocks of channels and tokens";
  return launch(conv_kernel<T, VEC, TAPS, GROUP>, dim3{unsigned(blocks), 1, 1}, CONV_THREADS, 0, a.stream, a, grid);
}

// Channels of an access of 16 bytes.
template <class T>
constexpr int conv_vector() {
  return 16 / sizeof(typename T::Bits);
}

template <class T>
bool conv_in_vectors(const ConvArgs& a) {
  return conv_aligned<T>(a, a.x, conv_vector<T>()) && conv_aligned<T>(a, a.y, conv_vector<T>());
}

}  // namespace

const char* conv(const ConvArgs& a) {
  if (!a.batch || !a.width) return nullptr;
  return with_conv_type(a.x.type, [&](auto type) {
    using T = decltype(type);
    constexpr int VEC = conv_vector<T>();
    if (!conv_in_vectors<T>(a)) return a.taps > 4 ? start<T, 1, 8>(a) : start<T, 1, 4>(a);
    return a.taps > 4 ? start<T, VEC, 8>(a) : start<T, VEC, 4>(a);
  });
}

bool conv_is_whole(const ConvArgs& a) {
  const int64_t shortest = ConvGrid(a.batch, a.tokens, a.width, 1).stretches;
  const int64_t longest = ConvGrid(a.batch, a.tokens, a.width, 8).stretches;
  return shortest == 1 && longest == 1;
}

}  // namespace hybrid_lm
