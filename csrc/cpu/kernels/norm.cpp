// rms_norm and gated_rms_norm, forward: y = x / sqrt(mean(x^2) + eps) * (weight + offset), and a silu gate before or
// behind it. A row is read from memory once: the second pass over it finds it in the L1 cache.
#include "cpu/kernels/norm.h"

namespace hybrid_lm {
namespace HYBRID_LM_ISA {
namespace {

// One group of one row; `gated` is scratch memory for x silu(gate).
template <class S, int ORDER>
inline void norm_row(const NormArgs& a, const NormShape<S>& shape, const S* x, const S* gate, const S* factor,
                     S* gated, S* y) {
  using L = Lanes<S>;
  using V = typename L::V;
  const auto gate_at = [&](int64_t c) { return silu<L>(L::load(gate + c)); };
  S scale = 1;
  if (ORDER != NormArgs::GATE) {
    S square;
    norm_sums<S, 1>(shape.pitch, &square, [&](int64_t c, V* sums) {
      V v = L::load(x + c);
      if (ORDER == NormArgs::GATE_NORM) L::store(gated + c, v *= gate_at(c));
      sums[0] += v * v;
    });
    scale = 1 / S(__builtin_sqrt(square / S(shape.channels) + S(a.eps)));
  }
  const S* from = ORDER == NormArgs::GATE_NORM ? gated : x;
  for (int64_t c = 0; c < shape.pitch; c += L::COUNT) {
    V v = L::load(from + c);
    if (ORDER != NormArgs::GATE) v *= scale * L::load(factor + c);
    if (ORDER == NormArgs::NORM_GATE || ORDER == NormArgs::GATE) v *= gate_at(c);
    L::store(y + c, v);
  }
}

template <class S, int ORDER>
void norm_items(const NormArgs& a) {
  const NormShape<S> shape(a);
  const int64_t each = norm_block(a.rows), items = (a.rows + each - 1) / each;
  for_each_item(a.parallel, items, a.rows * a.width * 8, [&](int64_t item) {
    S* memory = static_cast<S*>(scratch((shape.groups + 4) * shape.pitch * sizeof(S)));
    S *gated = memory + 3 * shape.pitch, *factors = gated + shape.pitch;
    const NormRows<S> xs(a.x, shape, memory), gates(a.gate, shape, memory + shape.pitch),
        ys(a.y, shape, memory + 2 * shape.pitch);
    norm_factors(a, shape, factors);
    const int64_t last = (item + 1) * each < a.rows ? (item + 1) * each : a.rows;
    for (int64_t row = item * each; row < last; ++row)
      for (int64_t group = 0; group < shape.groups; ++group) {
        const S *x = xs.read(row, group), *gate = ORDER == NormArgs::NORM ? nullptr : gates.read(row, group);
        norm_row<S, ORDER>(a, shape, x, gate, factors + group * shape.pitch, gated, ys.at(row, group));
        ys.write(row, group);
      }
  });
}

template <class S>
void norm_as(const NormArgs& a) {
  switch (a.order) {
    case NormArgs::NORM: return norm_items<S, NormArgs::NORM>(a);
    case NormArgs::GATE_NORM: return norm_items<S, NormArgs::GATE_NORM>(a);
    case NormArgs::NORM_GATE: return norm_items<S, NormArgs::NORM_GATE>(a);
    case NormArgs::GATE: return norm_items<S, NormArgs::GATE>(a);
  }
}

}  // namespace

void norm(const NormArgs& a) { a.x.type == Type::f64 ? norm_as<double>(a) : norm_as<float>(a); }

}  // namespace HYBRID_LM_ISA
}  // namespace hybrid_lm
