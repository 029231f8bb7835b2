// The causal convolution, forward.
#include "cuda/conv.cuh"

namespace hybrid_lm {
namespace {

// The last inputs, read once more: to have them in registers until here would take registers from all tokens. `document`
// is the first token of the last document. A state in the place of `initial` is read before it is overwritten.
template <class T, int VEC>
HYBRID_LM_DEVICE void conv_state(const ConvArgs& a, const ConvPlace& at, int64_t document) {
  for (int64_t j = 0; j < a.taps - 1; ++j) {
    const int64_t token = a.tokens - (a.taps - 1) + j;
    for (int v = 0; v < at.count; ++v) {
      float value = 0.0f;
      if (token >= document) {
        if (token >= 0)
          value = T::wide(conv_at<T>(a.x, at, token)[v]);
        else if (a.initial)
          value = read(a.initial, conv_small(a.initial, at, token + a.taps - 1, v));
      }
      write(a.state, conv_small(a.state, at, j, v), value);
    }
  }
}

template <class T, int VEC, int TAPS, int GROUP>
__global__ void __launch_bounds__(CONV_THREADS, 4) conv_kernel(const ConvArgs a, const ConvGrid grid) {
  const int64_t thread = int64_t(blockIdx.x) * CONV_THREADS + threadIdx.x, walk = thread / grid.vectors;
  if (walk >= a.batch * grid.stretches) return;
  const ConvPlace at(a, grid.length, VEC, walk / grid.stretches, walk % grid.stretches, thread % grid.vectors);
  const ConvWeights<VEC, TAPS> w(a, at);
  float row[TAPS - 1 + GROUP][VEC];
  int closed = conv_before<T, VEC, TAPS>(a, at, w.first, row);
  ConvGroup<T, VEC, GROUP> next;
  next.fetch(a.x, at, at.begin, at.end);
  int64_t t = at.begin;
  for (; t < at.end; t += GROUP) {
    HYBRID_LM_UNROLL
    for (int i = 0; i < GROUP; ++i) next.at[i].wide(row[TAPS - 1 + i]);
    next.fetch(a.x, at, t + GROUP, at.end);
    HYBRID_LM_UNROLL
    for (int i = 0; i < GROUP; ++i) {
      const bool there = t + i < at.end;
      if (there && conv_reset(a, at, t + i)) closed = TAPS - 1 + i;
      float y[VEC];
      conv_sum(w, row, i, closed, y);
      if (a.silu) {
        HYBRID_LM_UNROLL
        for (int v = 0; v < VEC; ++v) y[v] = silu<Thread>(y[v]);
      }
      ConvRow<T, VEC> bits;
      bits.narrow(y);
      bits.store(conv_at<T>(a.y, at, t + i), there ? at.count : 0);
    }
    HYBRID_LM_UNROLL
    for (int j = 0; j < TAPS - 1; ++j) {
      HYBRID_LM_UNROLL
      for (int v = 0; v < VEC; ++v) row[j][v] = row[j + GROUP][v];
    }
    closed -= GROUP;
  }
  if (a.state && at.end == a.tokens) conv_state<T, VEC>(a, at, t - (TAPS - 1) + closed);
}

template <class T, int VEC, int TAPS>
const char* start(const ConvArgs& a) {
  constexpr int GROUP = VEC * TAPS > 16 ? 2 : 4;
  const ConvGrid grid(a.batch, a.tokens, a.width, VEC);
  const int64_t blocks = (a.batch * grid.stretches * grid.vectors + CONV_THREADS - 1) / CONV_THREADS;
  if (blocks > 0x7fffffff) return "causal_conv1d: more than 2^31 blocks of channels and tokens";
  return launch(conv_kernel<T, VEC, TAPS, GROUP>, dim3{unsigned(blocks), 1, 1}, CONV_THREADS, 0, a.stream, a, grid);
}

template <class T, int VEC, int TAPS>
const char* start_in_vectors(const ConvArgs& a) {
  const bool aligned = conv_aligned<T>(a, a.x, VEC) && conv_aligned<T>(a, a.y, VEC);
  return aligned ? start<T, VEC, TAPS>(a) : start<T, 1, TAPS>(a);
}

}  // namespace

const char* conv(const ConvArgs& a) {
  if (!a.batch || !a.width) return nullptr;
  return with_conv_type(a.x.type, [&](auto type) {
    using T = decltype(type);
    // Accesses of 16 bytes; of 8 taps, registers leave room for 4 channels.
    return a.taps > 4 ? start_in_vectors<T, 4, 8>(a) : start_in_vectors<T, 16 / sizeof(typename T::Bits), 4>(a);
  });
}

bool conv_is_whole(const ConvArgs& a) { return ConvGrid(a.batch, a.tokens, a.width, 1).stretches == 1; }

}  // namespace hybrid_lm
