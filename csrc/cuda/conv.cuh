// What the forward and the backward pass of the causal convolution share: who does what, and how rows come in.
//
// A thread owns VEC neighbouring channels, which are one access to memory, for a stretch of tokens. It walks down the
// stretch TAPS tokens at a time with the last TAPS inputs in a ring of registers, and the next TAPS on their way. The
// kernels exist for 4 and for 8 taps; a narrower filter leaves out the first ones. Channels that do not begin where an
// access of VEC may have a kernel of their own for 4 taps, and with 8 they go one by one.
//
// Rows are numbered from the first that a group's first token sees: row i + k is what tap k of token i multiplies, and
// lies in the ring at (i + k) % TAPS. A reset at token i closes all rows below i + TAPS - 1: `closed` is the number of
// the last document's first row.
#pragma once

#include "cuda/conv.h"
#include "cuda/device.cuh"

namespace hybrid_lm {

constexpr int CONV_THREADS = 128;
constexpr int CONV_LANES = 32, CONV_WARPS = CONV_THREADS / CONV_LANES;

// How tokens are cut into stretches: by the shape alone, so that the same call gives the same bits everywhere.
struct ConvGrid {
  int64_t vectors;    // threads that a token's channels take
  int64_t length;     // tokens of a stretch
  int64_t stretches;  // of a sequence

  ConvGrid(int64_t batch, int64_t tokens, int64_t width, int vec) : vectors((width + vec - 1) / vec) {
    // Each stretch reads the rows before it once more, and is special at both ends; threads enough for a large device
    // are worth that. Not by `vec`, which hangs on where the tensors lie: sums must not.
    const int64_t walks = batch * ((width + 3) / 4);
    length = 128;
    while (length > 16 && walks * ((tokens + length - 1) / length) < 131072) length /= 2;
    stretches = (tokens + length - 1) / length;
  }
};

// What a thread has to do.
struct ConvPlace {
  int64_t row, begin, end;  // of the batch; tokens
  int64_t channel;
  int count;                // of its channels that are there, 0 for none

  HYBRID_LM_DEVICE ConvPlace(const ConvArgs& a, int64_t length, int vec, int64_t row, int64_t stretch, int64_t vector)
      : row(row), begin(stretch * length), channel(vector * vec) {
    end = begin + length < a.tokens ? begin + length : a.tokens;
    const int64_t left = a.width - channel;
    count = begin >= end || left <= 0 ? 0 : left < vec ? int(left) : vec;
  }
};

// VEC neighbouring channels, in one access if all are there and begin where one may.
template <class T, int VEC>
struct ConvRow : Row<T, VEC> {
  using Bits = typename T::Bits;
  static HYBRID_LM_DEVICE bool whole(const Bits* at, int count) {
    return count == VEC && reinterpret_cast<uintptr_t>(at) % sizeof(Row<T, VEC>) == 0;
  }
  HYBRID_LM_DEVICE void load(const Bits* from, int count) {
    whole(from, count) ? Row<T, VEC>::load(from) : Row<T, VEC>::load(from, count);
  }
  HYBRID_LM_DEVICE void store(Bits* to, int count) const {
    whole(to, count) ? Row<T, VEC>::store(to) : Row<T, VEC>::store(to, count);
  }
};

template <class T>
HYBRID_LM_DEVICE typename T::Bits* conv_at(const View& v, const ConvPlace& at, int64_t token) {
  return static_cast<typename T::Bits*>(v.data) + at.row * v.stride[0] + token * v.stride[1] + at.channel;
}

// Place of a number of one of the small tensors (b w-1 d).
HYBRID_LM_DEVICE int64_t conv_small(const View& v, const ConvPlace& at, int64_t j, int channel) {
  return at.row * v.stride[0] + j * v.stride[1] + (at.channel + channel) * v.stride[2];
}

HYBRID_LM_DEVICE bool conv_reset(const ConvArgs& a, const ConvPlace& at, int64_t token) {
  return a.reset && static_cast<const uint8_t*>(a.reset.data)[at.row * a.reset.stride[0] + token * a.reset.stride[1]];
}

// Numbers of a small tensor of any type: to[v] = v[base + v * step] for the first `count`, else 0.
template <int VEC, class Number>
HYBRID_LM_DEVICE void conv_numbers(const Number* from, int64_t step, int count, float (&to)[VEC]) {
  HYBRID_LM_UNROLL
  for (int v = 0; v < VEC; ++v) to[v] = v < count ? float(from[v * step]) : 0.0f;
}

template <int VEC>
HYBRID_LM_DEVICE void conv_numbers(const View& from, int64_t base, int64_t step, int count, float (&to)[VEC]) {
  // What type it is, is asked once: a question for each number would be a branch for each.
  if (from.type == Type::f32) return conv_numbers(static_cast<const float*>(from.data) + base, step, count, to);
  if (from.type == Type::f64) return conv_numbers(static_cast<const double*>(from.data) + base, step, count, to);
  const auto* bits = static_cast<const uint16_t*>(from.data) + base;
  HYBRID_LM_UNROLL
  for (int v = 0; v < VEC; ++v) {
    const uint16_t one = v < count ? bits[v * step] : uint16_t(0);
    to[v] = from.type == Type::bf16 ? BFloat::wide(one) : Half::wide(one);
  }
}

// A thread's weights; what is not there is 0.
template <int VEC, int TAPS>
struct ConvWeights {
  float tap[TAPS][VEC], bias[VEC];
  int first;  // the filter's first tap

  HYBRID_LM_DEVICE ConvWeights(const ConvArgs& a, const ConvPlace& at) : first(TAPS - int(a.taps)) {
    conv_numbers(a.bias, at.channel * a.bias.stride[0], a.bias.stride[0], a.bias ? at.count : 0, bias);
    HYBRID_LM_UNROLL
    for (int k = 0; k < TAPS; ++k)
      conv_numbers(a.weight, at.channel * a.weight.stride[0] + (k - first) * a.weight.stride[1], a.weight.stride[0],
                   k < first ? 0 : at.count, tap[k]);
  }
};

// The rows before a stretch's first token. Returns `closed`.
template <class T, int VEC, int TAPS>
HYBRID_LM_DEVICE int conv_before(const ConvArgs& a, const ConvPlace& at, int first, float (&ring)[TAPS][VEC]) {
  int closed = 0;
  HYBRID_LM_UNROLL
  for (int j = 0; j < TAPS; ++j) {
    const int64_t token = at.begin - (TAPS - 1) + j;
    HYBRID_LM_UNROLL
    for (int v = 0; v < VEC; ++v) ring[j][v] = 0.0f;
    if (j < first || j == TAPS - 1) continue;
    if (token >= 0) {
      ConvRow<T, VEC> bits;
      bits.load(conv_at<T>(a.x, at, token), at.count);
      bits.wide(ring[j]);
      if (conv_reset(a, at, token)) closed = j;
    } else if (a.initial && token + a.taps - 1 >= 0) {
      conv_numbers(a.initial, conv_small(a.initial, at, token + a.taps - 1, 0), a.initial.stride[2], at.count, ring[j]);
    }
  }
  return closed;
}

// The next rows of a tensor (b t d), on their way: zeros from the token `stop` on.
template <class T, int VEC, int TAPS>
struct ConvNext {
  ConvRow<T, VEC> at[TAPS];
  const typename T::Bits* here;
  int64_t step;
  int left, count;

  HYBRID_LM_DEVICE ConvNext(const View& from, const ConvPlace& place, int64_t stop)
      : here(conv_at<T>(from, place, place.begin)),
        step(from.stride[1]),
        left(from ? int(stop - place.begin) : 0),
        count(place.count) {
    HYBRID_LM_UNROLL
    for (int i = 0; i < TAPS; ++i) fetch(i);
  }

  template <bool PLAIN = false>
  HYBRID_LM_DEVICE void fetch(int i) {
    if constexpr (PLAIN)
      at[i].Row<T, VEC>::load(here);
    else
      at[i].load(here, left > 0 ? count : 0);
    here += step, --left;
  }

  // Row i of the ring as numbers; the one that comes TAPS tokens later sets out.
  template <bool PLAIN>
  HYBRID_LM_DEVICE void take(int i, float (&to)[VEC]) {
    at[i].wide(to);
    fetch<PLAIN>(i);
  }
};

// Whether nothing is special about TAPS tokens from t on, and about those that set out meanwhile: all are there, with
// all channels and taps, and in one document. Most are such, and for them the loops ask nothing. (Not of eight taps,
// where there are no registers for two ways to go on.)
template <int VEC, int TAPS>
HYBRID_LM_DEVICE bool conv_plain(const ConvArgs& a, const ConvPlace& at, int first, int closed, int64_t t,
                                 int64_t stop) {
  if (TAPS > 4 || t + 2 * TAPS > stop || at.count != VEC || first != 0 || closed > 0) return false;
  bool any = false;
  HYBRID_LM_UNROLL
  for (int i = 0; i < TAPS; ++i) any = any || conv_reset(a, at, t + i);
  return !any;
}

// The sum of a token, before the activation.
template <bool PLAIN, int VEC, int TAPS>
HYBRID_LM_DEVICE void conv_sum(const ConvWeights<VEC, TAPS>& w, const float (&ring)[TAPS][VEC], int i, int closed,
                               float (&sum)[VEC]) {
  HYBRID_LM_UNROLL
  for (int v = 0; v < VEC; ++v) sum[v] = w.bias[v];
  HYBRID_LM_UNROLL
  for (int k = 0; k < TAPS; ++k) {
    // Not a factor of 0: what stands before the filter or the document may be infinite.
    if (!PLAIN && (k < w.first || i + k < closed)) continue;
    HYBRID_LM_UNROLL
    for (int v = 0; v < VEC; ++v) sum[v] += w.tap[k][v] * ring[(i + k) % TAPS][v];
  }
}

// Whether rows of VEC numbers begin where an access of their size may.
template <class T>
inline bool conv_aligned(const ConvArgs& a, const View& v, int vec) {
  if (!v) return true;
  if (reinterpret_cast<uintptr_t>(v.data) % (vec * sizeof(typename T::Bits))) return false;
  return (a.batch == 1 || v.stride[0] % vec == 0) && (a.tokens == 1 || v.stride[1] % vec == 0);
}

template <class F>
inline const char* with_conv_type(Type type, const F& f) {
  if (type == Type::f32) return f(Float());
  return type == Type::bf16 ? f(BFloat()) : f(Half());
}

}  // namespace hybrid_lm
