// hybrid_lm_native::causal_conv1d. The schemas stand in hybrid_lm/ops/native.
#include "cpu/bind.h"

namespace hybrid_lm {
namespace {

void fill(ConvArgs& a, const Tensor& x, const Tensor& weight, const MaybeTensor& bias, bool silu,
          const MaybeTensor& initial, const MaybeTensor& reset) {
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2 && size(x, 1) > 0 && size(weight, 1) > 0,
                  "causal_conv1d: x is (b t d) and weight (d w), with t, w > 0");
  const int64_t b = size(x, 0), t = size(x, 1), d = size(x, 2), w = size(weight, 1);
  a.parallel = run_parallel;
  a.batch = b, a.tokens = t, a.width = d, a.taps = w, a.silu = silu;
  a.x = view_of(x, "x", {b, t, d}), a.weight = view_of(weight, "weight", {d, w}), a.bias = view_of(bias, "bias", {d});
  a.initial = view_of(initial, "initial", {b, w - 1, d}), a.reset = view_of(reset, "reset", {b, t}, true);
}

std::tuple<Tensor, Tensor> causal_conv1d(Tensor x, Tensor weight, MaybeTensor bias, bool silu, MaybeTensor initial,
                                         MaybeTensor reset) {
  ConvArgs a{};
  fill(a, x, weight, bias, silu, initial, reset);
  Tensor y = new_like(x), state = new_tensor(x, {a.batch, a.taps - 1, a.width});
  a.y = view_of(y, "y", {a.batch, a.tokens, a.width});
  a.state = view_of(state, "state", {a.batch, a.taps - 1, a.width});
  kernels().conv(a);
  return {y, state};
}

Tensor causal_conv1d_(Tensor x, Tensor weight, MaybeTensor bias, bool silu, Tensor state, MaybeTensor reset) {
  ConvArgs a{};
  fill(a, x, weight, bias, silu, state, reset);
  STD_TORCH_CHECK(state.scalar_type() == x.scalar_type(), "causal_conv1d: the state is of another type than x");
  Tensor y = new_like(x);
  a.y = view_of(y, "y", {a.batch, a.tokens, a.width});
  a.state = a.initial;
  kernels().conv(a);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(MaybeTensor gy, MaybeTensor gstate, Tensor x,
                                                                  Tensor weight, MaybeTensor bias, bool silu,
                                                                  MaybeTensor initial, MaybeTensor reset) {
  ConvGradArgs a{};
  fill(a, x, weight, bias, silu, initial, reset);
  const int64_t b = a.batch, t = a.tokens, d = a.width, w = a.taps;
  a.gy = view_of(gy, "gy", {b, t, d}), a.gstate = view_of(gstate, "gstate", {b, w - 1, d});
  Tensor gx = new_like(x), gweight = new_like(weight), gbias = new_like(bias, x), ginitial = new_like(initial, x);
  a.gx = view_of(gx, "gx", {b, t, d}), a.gweight = view_of(gweight, "gweight", {d, w});
  if (bias) a.gbias = view_of(gbias, "gbias", {d});
  if (initial) a.ginitial = view_of(ginitial, "ginitial", {b, w - 1, d});
  kernels().conv_backward(a);
  return {gx, gweight, gbias, ginitial};
}

STABLE_TORCH_LIBRARY_IMPL(hybrid_lm_native, CPU, m) {
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d));
  m.impl("causal_conv1d_", TORCH_BOX(&causal_conv1d_));
  m.impl("causal_conv1d_backward", TORCH_BOX(&causal_conv1d_backward));
}

}  // namespace
}  // namespace hybrid_lm
