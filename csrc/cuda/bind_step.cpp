// hybrid_lm_native::mamba2_step_. The schemas stand in hybrid_lm/ops/native.
#include "cuda/bind.h"
#include "cuda/step.h"

namespace hybrid_lm {
namespace {

Tensor mamba2_step_(Tensor xBC, Tensor dt, MaybeTensor z, MaybeTensor weight, MaybeTensor bias, Tensor A, MaybeTensor D,
                    MaybeTensor dt_bias, bool dt_softplus, double dt_low, double dt_high, int64_t groups,
                    MaybeTensor reset, MaybeTensor conv, Tensor state, MaybeTensor tickets) {
  const OnDevice device(xBC);
  STD_TORCH_CHECK(state.dim() == 4 && state.scalar_type() == ScalarType::Float && state.is_contiguous(),
                  "mamba2_step: state is (b h p n), float32 without gaps");
  StepArgs a{};
  const int64_t b = size(state, 0), h = size(state, 1), p = size(state, 2), n = size(state, 3);
  STD_TORCH_CHECK(groups > 0 && h % groups == 0, "mamba2_step: ", groups, " groups do not divide ", h, " heads");
  const int64_t c = h * p + 2 * groups * n, w = weight && weight->dim() == 2 ? size(*weight, 1) : 0;
  STD_TORCH_CHECK(w <= STEP_TAPS, "mamba2_step: ", w, " taps; the kernel for CUDA has at most ", STEP_TAPS);
  STD_TORCH_CHECK(w < 2 || (conv && tickets), "mamba2_step: a convolution has a state and tickets");
  a.stream = device.stream();
  a.batch = b, a.heads = h, a.head_dim = p, a.groups = groups, a.states = n, a.taps = w;
  a.xBC = view_of(xBC, "xBC", {b, c}), a.dt = view_of(dt, "dt", {b, h}), a.z = view_of(z, "z", {b, h, p});
  a.weight = view_of(weight, "weight", {c, w}), a.bias = view_of(bias, "bias", {c});
  a.A = view_of(A, "A", {h}), a.D = view_of(D, "D", {h}), a.dt_bias = view_of(dt_bias, "dt_bias", {h});
  a.reset = view_of(reset, "reset", {b}, true);
  a.dt_softplus = dt_softplus, a.dt_low = float(dt_low), a.dt_high = float(dt_high);
  a.state = view_of(state, "state", {b, h, p, n});
  if (w > 1) {
    STD_TORCH_CHECK(tickets->scalar_type() == ScalarType::Int && tickets->is_contiguous() &&
                        tickets->numel() >= b * groups,
                    "mamba2_step: tickets are int32, one for each sequence and group");
    a.conv = view_of(conv, "conv", {b, w - 1, c});
    a.tickets.data = tickets->data_ptr();
  }
  Tensor y = new_tensor(xBC, {b, h, p}, xBC.scalar_type());
  a.y = view_of(y, "y", {b, h, p});
  check(step(a));
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(hybrid_lm_native, HYBRID_LM_KEY, m) { m.impl("mamba2_step_", TORCH_BOX(&mamba2_step_)); }

}  // namespace
}  // namespace hybrid_lm
