// What the forward and the backward pass of the norms share: a row's group of channels, which is used where it lies
// in contiguous float32 (float64) tensors, and packed in scratch memory otherwise.
#pragma once

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace hybrid_lm {
namespace HYBRID_LM_ISA {

// Rows of one work item: of the shapes only, so that sums over items are the same on any number of threads.
inline int64_t norm_block(int64_t rows) {
  const int64_t each = (rows + 31) / 32;
  return each < 1 ? 1 : each > 1024 ? 1024 : each;
}

// A row (width) as (group, channel).
template <class S>
struct NormShape {
  int64_t groups, channels, pitch;  // pitch: channels of a group, filled up to whole vectors

  explicit NormShape(const NormArgs& a)
      : groups(a.groups),
        channels(a.width / a.groups),
        pitch((channels + Lanes<S>::COUNT - 1) / Lanes<S>::COUNT * Lanes<S>::COUNT) {}
};

// One tensor's group of one row at a time.
template <class S>
struct NormRows {
  const View& view;
  const NormShape<S>& shape;
  bool direct;
  S* packed;

  NormRows(const View& v, const NormShape<S>& shape, S* packed) : view(v), shape(shape), packed(packed) {
    const bool same = v.type == (sizeof(S) == sizeof(double) ? Type::f64 : Type::f32);
    direct = same && v.stride[1] == 1 && shape.channels == shape.pitch;
  }

  int64_t offset(int64_t row, int64_t group) const {
    return row * view.stride[0] + group * shape.channels * view.stride[1];
  }
  // Where to find, or to put, the values.
  S* at(int64_t row, int64_t group) const {
    return direct ? static_cast<S*>(view.data) + offset(row, group) : packed;
  }
  const S* read(int64_t row, int64_t group) const {
    if (!direct) {
      load_row(view, offset(row, group), view.stride[1], shape.channels, packed);
      for (int64_t c = shape.channels; c < shape.pitch; ++c) packed[c] = 0;
    }
    return at(row, group);
  }
  void write(int64_t row, int64_t group) const {
    if (!direct) store_row(view, offset(row, group), view.stride[1], shape.channels, packed);
  }
};

// The factors of all groups' channels, weight + offset, or ones where there is no weight.
template <class S>
void norm_factors(const NormArgs& a, const NormShape<S>& shape, S* to) {
  const int64_t stride = a.weight.stride[0];
  for (int64_t group = 0; group < shape.groups; ++group, to += shape.pitch) {
    for (int64_t c = 0; c < shape.pitch; ++c) to[c] = 1 - S(a.offset);
    if (a.weight) load_row(a.weight, group * shape.channels * stride, stride, shape.channels, to);
    for (int64_t c = 0; c < shape.pitch; ++c) to[c] += S(a.offset);
  }
}

// K sums over `width` channels: term(c, sums) adds those of the vector at c. There are four sets of them, so that an
// addition need not wait for the one before it.
template <class S, int K, class F>
HYBRID_LM_FN void norm_sums(int64_t width, S* totals, const F& term) {
  using L = Lanes<S>;
  typename L::V sums[4][K]{};
  int64_t c = 0;
  for (; c + 4 * L::COUNT <= width; c += 4 * L::COUNT)
    for (int j = 0; j < 4; ++j) term(c + j * L::COUNT, sums[j]);
  for (; c < width; c += L::COUNT) term(c, sums[0]);
  for (int k = 0; k < K; ++k) totals[k] = L::sum((sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k]));
}

}  // namespace HYBRID_LM_ISA
}  // namespace hybrid_lm
