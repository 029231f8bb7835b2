// The causal convolution, forward.
#include "cuda/conv.cuh"

namespace hybrid_lm {
namespace {

// The last inputs, read once more: to have them in registers until here would take registers from all tokens.
// `document` is the first token of the last document. A state in the place of `initial` is read before it is
// overwritten.
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

// TAPS tokens from t on.
template <bool PLAIN, class T, int VEC, int TAPS>
HYBRID_LM_DEVICE void conv_tokens(const ConvArgs& a, const ConvPlace& at, const ConvWeights<VEC, TAPS>& w,
                                  float (&ring)[TAPS][VEC], ConvNext<T, VEC, TAPS>& next, typename T::Bits*& y_at,
                                  int64_t t, int& closed) {
  HYBRID_LM_UNROLL
  for (int i = 0; i < TAPS; ++i, y_at += a.y.stride[1]) {
    const bool there = PLAIN || t + i < at.end;
    if (!PLAIN && there && conv_reset(a, at, t + i)) closed = TAPS - 1 + i;
    next.template take<PLAIN>(i, ring[(TAPS - 1 + i) % TAPS]);
    float y[VEC];
    conv_sum<PLAIN>(w, ring, i, closed, y);
    if (a.silu) {
      HYBRID_LM_UNROLL
      for (int v = 0; v < VEC; ++v) y[v] = silu<Thread>(y[v]);
    }
    ConvRow<T, VEC> bits;
    bits.narrow(y);
    if constexpr (PLAIN)
      bits.Row<T, VEC>::store(y_at);
    else
      bits.store(y_at, there ? at.count : 0);
  }
  closed -= TAPS;
}

template <class T, int VEC, int TAPS>
__global__ void __launch_bounds__(CONV_THREADS, 4) conv_kernel(const ConvArgs a, const ConvGrid grid) {
  const int64_t thread = int64_t(blockIdx.x) * CONV_THREADS + threadIdx.x, walk = thread / grid.vectors;
  if (walk >= a.batch * grid.stretches) return;
  const ConvPlace at(a, grid.length, VEC, walk / grid.stretches, walk % grid.stretches, thread % grid.vectors);
  const ConvWeights<VEC, TAPS> w(a, at);
  float ring[TAPS][VEC];
  int closed = conv_before<T, VEC, TAPS>(a, at, w.first, ring);
  ConvNext<T, VEC, TAPS> next(a.x, at, at.end);
  auto* y_at = conv_at<T>(a.y, at, at.begin);
  int64_t t = at.begin;
  for (; t < at.end; t += TAPS) {
    if (conv_plain<VEC, TAPS>(a, at, w.first, closed, t, at.end))
      conv_tokens<true>(a, at, w, ring, next, y_at, t, closed);
    else
      conv_tokens<false>(a, at, w, ring, next, y_at, t, closed);
  }
  if (a.state && at.end == a.tokens) conv_state<T, VEC>(a, at, t - (TAPS - 1) + closed);
}

template <class T, int VEC, int TAPS>
const char* start(const ConvArgs& a) {
  const ConvGrid grid(a.batch, a.tokens, a.width, VEC);
  const int64_t blocks = (a.batch * grid.stretches * grid.vectors + CONV_THREADS - 1) / CONV_THREADS;
  if (blocks > 0x7fffffff) return "causal_conv1d: more than 2^31 blocks of channels and tokens";
  return launch(conv_kernel<T, VEC, TAPS>, dim3{unsigned(blocks), 1, 1}, CONV_THREADS, 0, a.stream, a, grid);
}

template <class T, int VEC>
const char* start_in_vectors(const ConvArgs& a) {
  const bool aligned = conv_aligned<T>(a, a.x, VEC) && conv_aligned<T>(a, a.y, VEC);
  return aligned ? start<T, VEC, 4>(a) : start<T, 1, 4>(a);
}

}  // namespace

const char* conv(const ConvArgs& a) {
  if (!a.batch || !a.width) return nullptr;
  return with_conv_type(a.x.type, [&](auto type) {
    using T = decltype(type);
    // Accesses of 16 bytes; with 8 taps in registers there is room for half as many channels.
    constexpr int VEC = 16 / sizeof(typename T::Bits);
    return a.taps > 4 ? start<T, VEC / 2, 8>(a) : start_in_vectors<T, VEC>(a);
  });
}

bool conv_is_whole(const ConvArgs& a) { return ConvGrid(a.batch, a.tokens, a.width, 1).stretches == 1; }

}  // namespace hybrid_lm
