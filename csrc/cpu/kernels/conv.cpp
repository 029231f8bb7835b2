// causal_conv1d, forward: y_t = act(bias + sum_k weight[:, k] x_{t-w+1+k}).
#include "cpu/kernels/conv.h"

namespace hybrid_lm {
namespace HYBRID_LM_ISA {
namespace {

// The last w - 1 inputs, those before the last reset zeroed.
template <class S>
void conv_state(ConvInputs<S>& in, const S** rows) {
  const int64_t before = in.taps - 1;
  in.window(in.args.tokens - before, in.args.tokens - 1, rows);
  for (int64_t k = 0; k < before; ++k) write_conv_row(in.args.state, in.item, k, rows[k]);
}

template <class S, int TAPS>
void conv_item(const ConvArgs& a, const ConvItem& item) {
  const int64_t taps = a.taps;
  ConvScratch<S> memory(ConvInputs<S>::rows(taps) + CONV_BLOCK, item.pitch, CONV_BLOCK + taps - 1);
  ConvInputs<S> in(a, item, memory);
  ConvRows<S> y(a.y, item, in.zeros, memory.rows(CONV_BLOCK), CONV_BLOCK);
  const S** rows = memory.pointers();
  if (item.begin == 0) conv_state(in, rows);
  for (int64_t t = item.begin; t < item.end;) {
    const bool block = t + CONV_BLOCK <= item.end && in.resets.block(t);
    const int64_t next = block ? t + CONV_BLOCK : t + 1;
    in.window(t - taps + 1, next - 1, rows);
    S* out[CONV_BLOCK];
    for (int64_t u = t; u < next; ++u) out[u - t] = y.row(u);
    if (block)
      convolve<S, TAPS, CONV_BLOCK>(rows, in.weight, in.bias, taps, item.pitch, a.silu, out,
                                    in.x.ahead(next, a.tokens), y.ahead(next, a.tokens));
    else
      convolve<S, TAPS, 1>(rows, in.weight, in.bias, taps, item.pitch, a.silu, out, {}, {});
    y.write(t, next);
    t = next;
  }
}

template <class S, int TAPS>
void conv_items(const ConvArgs& a) {
  const ConvGrid grid(a);
  for_each_item(a.parallel, grid.items(), a.batch * a.tokens * a.width * a.taps, [&](int64_t i) {
    conv_item<S, TAPS>(a, ConvItem(grid, i, Lanes<S>::COUNT));
  });
}

template <class S>
void conv_as(const ConvArgs& a) {
  switch (a.taps) {
    case 2: return conv_items<S, 2>(a);
    case 3: return conv_items<S, 3>(a);
    case 4: return conv_items<S, 4>(a);
    default: return conv_items<S, 0>(a);
  }
}

}  // namespace

void conv(const ConvArgs& a) { a.x.type == Type::f64 ? conv_as<double>(a) : conv_as<float>(a); }

}  // namespace HYBRID_LM_ISA
}  // namespace hybrid_lm
