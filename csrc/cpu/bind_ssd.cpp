// hybrid_lm_native::ssd. The schemas stand in hybrid_lm/ops/native.
#include "cpu/bind.h"

namespace hybrid_lm {
namespace {

struct Inputs {
  const Tensor &x, &dt, &A, &B, &C;
  const MaybeTensor &D, &dt_bias;
  bool dt_softplus;
  double dt_low, dt_high;
  const MaybeTensor& reset;
};

void fill(SsdArgs& a, const Inputs& v) {
  STD_TORCH_CHECK(v.x.dim() == 4 && v.B.dim() == 4 && size(v.x, 1) > 0,
                  "ssd: x is (b t h p) and B (b t g n), with t > 0");
  const int64_t b = size(v.x, 0), t = size(v.x, 1), h = size(v.x, 2), p = size(v.x, 3);
  const int64_t g = size(v.B, 2), n = size(v.B, 3);
  STD_TORCH_CHECK(g > 0 && h % g == 0, "ssd: ", h, " heads are no multiple of ", g, " groups");
  a.parallel = run_parallel;
  a.batch = b, a.tokens = t, a.heads = h, a.head_dim = p, a.groups = g, a.states = n;
  a.x = view_of(v.x, "x", {b, t, h, p}), a.dt = view_of(v.dt, "dt", {b, t, h}), a.A = view_of(v.A, "A", {h});
  a.B = view_of(v.B, "B", {b, t, g, n}), a.C = view_of(v.C, "C", {b, t, g, n});
  a.D = view_of(v.D, "D", {h}), a.dt_bias = view_of(v.dt_bias, "dt_bias", {h});
  a.dt_softplus = v.dt_softplus, a.dt_low = v.dt_low, a.dt_high = v.dt_high;
  a.reset = view_of(v.reset, "reset", {b, t}, true);
}

std::vector<int64_t> kept(const SsdArgs& a) {
  return {(a.tokens + SSD_CHUNK - 1) / SSD_CHUNK, a.batch, a.heads, a.states, a.head_dim};
}

std::tuple<Tensor, Tensor, Tensor> ssd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, MaybeTensor D,
                                       MaybeTensor dt_bias, bool dt_softplus, double dt_low, double dt_high,
                                       MaybeTensor initial, MaybeTensor reset, bool keep) {
  SsdArgs a{};
  fill(a, {x, dt, A, B, C, D, dt_bias, dt_softplus, dt_low, dt_high, reset});
  const int64_t b = a.batch, h = a.heads, p = a.head_dim, n = a.states;
  a.initial = view_of(initial, "initial", {b, h, p, n});
  Tensor y = new_like(x), state = new_tensor(x, {b, h, p, n}, wide(x));
  Tensor before = new_tensor(x, keep ? kept(a) : std::vector<int64_t>{0}, wide(x));
  a.y = view_of(y, "y", {b, a.tokens, h, p}), a.state = view_of(state, "state", {b, h, p, n});
  if (keep) a.before = view_of(before, "before", kept(a));
  kernels().ssd(a);
  return {y, state, before};
}

Tensor ssd_(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, MaybeTensor D, MaybeTensor dt_bias, bool dt_softplus,
            double dt_low, double dt_high, Tensor state, MaybeTensor reset) {
  SsdArgs a{};
  fill(a, {x, dt, A, B, C, D, dt_bias, dt_softplus, dt_low, dt_high, reset});
  STD_TORCH_CHECK(state.scalar_type() == wide(x) && state.is_contiguous(),
                  "ssd: a state that is updated in place is contiguous and of the type of the sums");
  Tensor y = new_like(x);
  a.y = view_of(y, "y", {a.batch, a.tokens, a.heads, a.head_dim});
  a.initial = a.state = view_of(state, "state", {a.batch, a.heads, a.head_dim, a.states});
  kernels().ssd(a);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ssd_backward(
    MaybeTensor gy, MaybeTensor gstate, Tensor before, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C,
    MaybeTensor D, MaybeTensor dt_bias, bool dt_softplus, double dt_low, double dt_high, MaybeTensor initial,
    MaybeTensor reset) {
  SsdGradArgs a{};
  fill(a, {x, dt, A, B, C, D, dt_bias, dt_softplus, dt_low, dt_high, reset});
  const int64_t b = a.batch, t = a.tokens, h = a.heads, p = a.head_dim, g = a.groups, n = a.states;
  STD_TORCH_CHECK(before.scalar_type() == wide(x), "before: another type than the forward pass keeps");
  a.before = view_of(before, "before", kept(a));
  a.initial = view_of(initial, "initial", {b, h, p, n});
  a.gy = view_of(gy, "gy", {b, t, h, p}), a.gstate = view_of(gstate, "gstate", {b, h, p, n});
  Tensor gx = new_like(x), gdt = new_like(dt), gA = new_like(A), gB = new_like(B), gC = new_like(C);
  Tensor gD = new_like(D, x), gdt_bias = new_like(dt_bias, x), ginitial = new_like(initial, x);
  a.gx = view_of(gx, "gx", {b, t, h, p}), a.gdt = view_of(gdt, "gdt", {b, t, h}), a.gA = view_of(gA, "gA", {h});
  a.gB = view_of(gB, "gB", {b, t, g, n}), a.gC = view_of(gC, "gC", {b, t, g, n});
  if (D) a.gD = view_of(gD, "gD", {h});
  if (dt_bias) a.gdt_bias = view_of(gdt_bias, "gdt_bias", {h});
  if (initial) a.ginitial = view_of(ginitial, "ginitial", {b, h, p, n});
  kernels().ssd_backward(a);
  return {gx, gdt, gA, gB, gC, gD, gdt_bias, ginitial};
}

STABLE_TORCH_LIBRARY_IMPL(hybrid_lm_native, CPU, m) {
  m.impl("ssd", TORCH_BOX(&ssd));
  m.impl("ssd_", TORCH_BOX(&ssd_));
  m.impl("ssd_backward", TORCH_BOX(&ssd_backward));
}

}  // namespace
}  // namespace hybrid_lm
