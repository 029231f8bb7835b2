// rms_norm and gated_rms_norm, backward. With v what the norm is taken of, scale = 1 / sqrt(mean(v^2) + eps),
// u = v scale and gu the gradient of u: gv = scale (gu - u mean(gu u)).
#include <cstdlib>

#include "cpu/kernels/norm.h"

namespace hybrid_lm {
namespace HYBRID_LM_ISA {
namespace {

// The rows of one group.
template <class S>
struct NormGroup {
  const S *x, *gate, *factor, *gy;
  S *gx, *ggate, *gweight;  // gweight: is added to; may be absent
  S* sigmoids;              // of the gate: scratch memory
};

template <class S, int ORDER>
inline void norm_row_backward(const NormArgs& a, const NormShape<S>& shape, const NormGroup<S>& r) {
  using L = Lanes<S>;
  using V = typename L::V;
  constexpr bool BEFORE = ORDER == NormArgs::GATE_NORM, BEHIND = ORDER == NormArgs::NORM_GATE;
  S totals[2];  // of v^2 and of gu v
  norm_sums<S, 2>(shape.pitch, totals, [&](int64_t c, V* sums) {
    V v = L::load(r.x + c), gu = L::load(r.gy + c) * L::load(r.factor + c);
    if (BEFORE || BEHIND) {
      const V gate = L::load(r.gate + c), s = sigmoid<L>(gate);
      L::store(r.sigmoids + c, s);
      (BEFORE ? v : gu) *= gate * s;
    }
    sums[0] += v * v;
    sums[1] += gu * v;
  });
  const S scale = 1 / S(__builtin_sqrt(totals[0] / S(shape.channels) + S(a.eps)));
  const S mean = totals[1] * scale / S(shape.channels);
  for (int64_t c = 0; c < shape.pitch; c += L::COUNT) {
    const V x = L::load(r.x + c), gy = L::load(r.gy + c), factor = L::load(r.factor + c);
    V gate{}, s{}, act = L::broadcast(1);
    if (BEFORE || BEHIND) gate = L::load(r.gate + c), s = L::load(r.sigmoids + c), act = gate * s;
    const V u = (BEFORE ? x * act : x) * scale, gu = (BEHIND ? gy * act : gy) * factor, gv = scale * (gu - u * mean);
    L::store(r.gx + c, BEFORE ? gv * act : gv);
    if (BEFORE) L::store(r.ggate + c, gv * x * silu_slope<L>(gate, s));
    if (BEHIND) L::store(r.ggate + c, gy * u * factor * silu_slope<L>(gate, s));
    if (r.gweight) L::store(r.gweight + c, L::load(r.gweight + c) + (BEHIND ? gy * act : gy) * u);
  }
}

// y = x silu(gate)
template <class S>
inline void gate_row_backward(const NormShape<S>& shape, const NormGroup<S>& r) {
  using L = Lanes<S>;
  for (int64_t c = 0; c < shape.pitch; c += L::COUNT) {
    const auto x = L::load(r.x + c), gate = L::load(r.gate + c), gy = L::load(r.gy + c), s = sigmoid<L>(gate);
    L::store(r.gx + c, gy * gate * s);
    L::store(r.ggate + c, gy * x * silu_slope<L>(gate, s));
  }
}

// Rows first ... last - 1; gweight: sums of all groups, or absent.
template <class S, int ORDER>
void norm_rows_backward(const NormGradArgs& a, const NormShape<S>& shape, int64_t first, int64_t last, S* gweight) {
  S* memory = static_cast<S*>(scratch((shape.groups + 6) * shape.pitch * sizeof(S)));
  S *sigmoids = memory + 5 * shape.pitch, *factors = sigmoids + shape.pitch;
  const NormRows<S> x(a.x, shape, memory), gate(a.gate, shape, memory + shape.pitch),
      gy(a.gy, shape, memory + 2 * shape.pitch), gx(a.gx, shape, memory + 3 * shape.pitch),
      ggate(a.ggate, shape, memory + 4 * shape.pitch);
  norm_factors(a, shape, factors);
  for (int64_t row = first; row < last; ++row)
    for (int64_t group = 0; group < shape.groups; ++group) {
      const int64_t at = group * shape.pitch;
      NormGroup<S> r{x.read(row, group), nullptr, factors + at, gy.read(row, group), gx.at(row, group), nullptr,
                     gweight ? gweight + at : nullptr, sigmoids};
      if (ORDER != NormArgs::NORM) r.gate = gate.read(row, group), r.ggate = ggate.at(row, group);
      if (ORDER == NormArgs::GATE)
        gate_row_backward(shape, r);
      else
        norm_row_backward<S, ORDER>(a, shape, r);
      gx.write(row, group);
      if (ORDER != NormArgs::NORM) ggate.write(row, group);
    }
}

// gweight: the items' sums, added in their order.
template <class S>
void norm_add_sums(const NormGradArgs& a, const NormShape<S>& shape, int64_t items, S* sums) {
  const int64_t width = shape.groups * shape.pitch, stride = a.gweight.stride[0];
  for (int64_t item = 1; item < items; ++item)
    for (int64_t c = 0; c < width; ++c) sums[c] += sums[item * width + c];
  for (int64_t group = 0; group < shape.groups; ++group)
    store_row(a.gweight, group * shape.channels * stride, stride, shape.channels, sums + group * shape.pitch);
}

template <class S, int ORDER>
void norm_items_backward(const NormGradArgs& a) {
  const NormShape<S> shape(a);
  const int64_t each = norm_block(a.rows), items = (a.rows + each - 1) / each, width = shape.groups * shape.pitch;
  // Whole cache lines, and at least one item's sums: without rows they are zeros.
  const size_t bytes = ((items ? items : 1) * width * sizeof(S) + 63) / 64 * 64;
  S* sums = a.gweight ? static_cast<S*>(std::aligned_alloc(64, bytes)) : nullptr;
  if (sums) std::memset(sums, 0, bytes);
  for_each_item(a.parallel, items, a.rows * a.width * 16, [&](int64_t item) {
    const int64_t last = (item + 1) * each < a.rows ? (item + 1) * each : a.rows;
    norm_rows_backward<S, ORDER>(a, shape, item * each, last, sums ? sums + item * width : nullptr);
  });
  if (sums) norm_add_sums(a, shape, items, sums);
  std::free(sums);
}

template <class S>
void norm_as_backward(const NormGradArgs& a) {
  switch (a.order) {
    case NormArgs::NORM: return norm_items_backward<S, NormArgs::NORM>(a);
    case NormArgs::GATE_NORM: return norm_items_backward<S, NormArgs::GATE_NORM>(a);
    case NormArgs::NORM_GATE: return norm_items_backward<S, NormArgs::NORM_GATE>(a);
    case NormArgs::GATE: return norm_items_backward<S, NormArgs::GATE>(a);
  }
}

}  // namespace

void norm_backward(const NormGradArgs& a) {
  a.x.type == Type::f64 ? norm_as_backward<double>(a) : norm_as_backward<float>(a);
}

}  // namespace HYBRID_LM_ISA
}  // namespace hybrid_lm
