// hybrid_lm_native::causal_conv1d. The schemas stand in hybrid_lm/ops/native.
#include "cuda/bind.h"
#include "cuda/conv.h"

namespace hybrid_lm {
namespace {

// The tensors of a call, as the kernels take them: `args` points into them.
struct Inputs {
  Tensor x;
  MaybeTensor gy;
  ScalarType type;  // of x and y, here

  Inputs(const Tensor& x, const MaybeTensor& gy = std::nullopt) : x(x), gy(gy) {
    type = common_type({&this->x, maybe(this->gy)});
  }

  void fill(ConvArgs& a, const OnDevice& device, const Tensor& weight, const MaybeTensor& bias, bool silu,
            const MaybeTensor& initial, const MaybeTensor& reset) {
    STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2 && size(x, 1) > 0 && size(weight, 1) > 0,
                    "causal_conv1d: x is (b t d) and weight (d w), with t, w > 0");
    const int64_t b = size(x, 0), t = size(x, 1), d = size(x, 2), w = size(weight, 1);
    STD_TORCH_CHECK(w <= CONV_TAPS, "causal_conv1d: ", w, " taps; the kernels for CUDA have at most ", CONV_TAPS);
    a.stream = device.stream();
    a.batch = b, a.tokens = t, a.width = d, a.taps = w, a.silu = silu;
    // Sizes and types as they were given are checked before anything is copied.
    view_of(x, "x", {b, t, d});
    x = in_rows(x, type);
    a.x = view_of(x, "x", {b, t, d});
    a.weight = view_of(weight, "weight", {d, w}), a.bias = view_of(bias, "bias", {d});
    a.initial = view_of(initial, "initial", {b, w - 1, d}), a.reset = view_of(reset, "reset", {b, t}, true);
  }
};

std::tuple<Tensor, Tensor> causal_conv1d(Tensor x, Tensor weight, MaybeTensor bias, bool silu, MaybeTensor initial,
                                         MaybeTensor reset) {
  const OnDevice device(x);
  ConvArgs a{};
  Inputs inputs(x);
  inputs.fill(a, device, weight, bias, silu, initial, reset);
  Tensor y = new_tensor(x, {a.batch, a.tokens, a.width}, inputs.type);
  Tensor state = new_tensor(x, {a.batch, a.taps - 1, a.width}, x.scalar_type());
  a.y = view_of(y, "y", {a.batch, a.tokens, a.width});
  a.state = view_of(state, "state", {a.batch, a.taps - 1, a.width});
  check(conv(a));
  return {as_type(y, x.scalar_type()), state};
}

Tensor causal_conv1d_(Tensor x, Tensor weight, MaybeTensor bias, bool silu, Tensor state, MaybeTensor reset) {
  const OnDevice device(x);
  ConvArgs a{};
  Inputs inputs(x);
  inputs.fill(a, device, weight, bias, silu, state, reset);
  STD_TORCH_CHECK(state.scalar_type() == x.scalar_type(), "causal_conv1d: the state is of another type than x");
  Tensor y = new_tensor(x, {a.batch, a.tokens, a.width}, inputs.type);
  a.y = view_of(y, "y", {a.batch, a.tokens, a.width});
  const std::vector<int64_t> sizes{a.batch, a.taps - 1, a.width};
  const bool in_place = conv_is_whole(a);
  Tensor after = in_place ? state : new_tensor(state, sizes, state.scalar_type());
  a.state = view_of(after, "state", sizes);
  check(conv(a));
  if (!in_place) torch::stable::copy_(state, after);
  return as_type(y, x.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(MaybeTensor gy, MaybeTensor gstate, Tensor x,
                                                                  Tensor weight, MaybeTensor bias, bool silu,
                                                                  MaybeTensor initial, MaybeTensor reset) {
  const OnDevice device(x);
  ConvGradArgs a{};
  Inputs inputs(x, gy);
  inputs.fill(a, device, weight, bias, silu, initial, reset);
  const int64_t b = a.batch, t = a.tokens, d = a.width, w = a.taps;
  view_of(gy, "gy", {b, t, d}), view_of(gstate, "gstate", {b, w - 1, d});
  inputs.gy = in_rows(inputs.gy, inputs.type), gstate = in_rows(gstate, inputs.type);
  a.gy = view_of(inputs.gy, "gy", {b, t, d}), a.gstate = view_of(gstate, "gstate", {b, w - 1, d});
  Tensor gx = new_tensor(x, {b, t, d}, inputs.type), gweight = new_tensor(weight, {d, w}, weight.scalar_type());
  Tensor gbias = bias ? new_tensor(*bias, {d}, bias->scalar_type()) : new_tensor(x, {0}, x.scalar_type());
  Tensor ginitial = new_tensor(x, initial ? std::vector<int64_t>{b, w - 1, d} : std::vector<int64_t>{0}, inputs.type);
  a.gx = view_of(gx, "gx", {b, t, d}), a.gweight = view_of(gweight, "gweight", {d, w});
  if (bias) a.gbias = view_of(gbias, "gbias", {d});
  if (initial) a.ginitial = view_of(ginitial, "ginitial", {b, w - 1, d});
  const int64_t count = conv_parts(a);
  Tensor parts = new_tensor(x, {count}, ScalarType::Float);
  a.parts = view_of(parts, "parts", {count});
  check(conv_backward(a));
  if (initial) ginitial = as_type(ginitial, initial->scalar_type());
  return {as_type(gx, x.scalar_type()), gweight, gbias, ginitial};
}

STABLE_TORCH_LIBRARY_IMPL(hybrid_lm_native, HYBRID_LM_KEY, m) {
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d));
  m.impl("causal_conv1d_", TORCH_BOX(&causal_conv1d_));
  m.impl("causal_conv1d_backward", TORCH_BOX(&causal_conv1d_backward));
}

}  // namespace
}  // namespace hybrid_lm
