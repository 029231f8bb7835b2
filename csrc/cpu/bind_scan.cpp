// hybrid_lm_native::selective_scan. The schemas stand in hybrid_lm/ops/native.
#include "cpu/bind.h"

namespace hybrid_lm {
namespace {

struct Inputs {
  const Tensor &x, &dt, &A, &B, &C;
  const MaybeTensor &D, &z, &dt_bias;
  bool dt_softplus;
  const MaybeTensor& reset;
};

void fill(ScanArgs& a, const Inputs& v) {
  STD_TORCH_CHECK(v.x.dim() == 3 && v.A.dim() == 2 && size(v.x, 1) > 0, "selective_scan: x is (b t d) with t > 0, A (d n)");
  const int64_t b = size(v.x, 0), t = size(v.x, 1), d = size(v.x, 2), n = size(v.A, 1);
  a.parallel = run_parallel;
  a.batch = b, a.tokens = t, a.width = d, a.states = n;
  a.x = view_of(v.x, "x", {b, t, d}), a.dt = view_of(v.dt, "dt", {b, t, d}), a.A = view_of(v.A, "A", {d, n});
  a.B = view_of(v.B, "B", {b, t, n}), a.C = view_of(v.C, "C", {b, t, n});
  a.D = view_of(v.D, "D", {d}), a.z = view_of(v.z, "z", {b, t, d}), a.dt_bias = view_of(v.dt_bias, "dt_bias", {d});
  a.dt_softplus = v.dt_softplus;
  a.reset = view_of(v.reset, "reset", {b, t}, true);
}

std::tuple<Tensor, Tensor, Tensor> selective_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, MaybeTensor D,
                                                  MaybeTensor z, MaybeTensor dt_bias, bool dt_softplus,
                                                  MaybeTensor initial, MaybeTensor reset, bool keep) {
  ScanArgs a{};
  fill(a, {x, dt, A, B, C, D, z, dt_bias, dt_softplus, reset});
  const int64_t b = a.batch, d = a.width, n = a.states, chunks = (a.tokens + SCAN_CHUNK - 1) / SCAN_CHUNK;
  a.initial = view_of(initial, "initial", {b, d, n});
  Tensor y = new_like(x), state = new_tensor(x, {b, d, n}, wide(x));
  Tensor before = new_tensor(x, keep ? std::vector<int64_t>{chunks, b, n, d} : std::vector<int64_t>{0}, wide(x));
  a.y = view_of(y, "y", {b, a.tokens, d}), a.state = view_of(state, "state", {b, d, n});
  if (keep) a.before = view_of(before, "before", {chunks, b, n, d});
  kernels().scan(a);
  return {y, state, before};
}

Tensor selective_scan_(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, MaybeTensor D, MaybeTensor z,
                       MaybeTensor dt_bias, bool dt_softplus, Tensor state, MaybeTensor reset) {
  ScanArgs a{};
  fill(a, {x, dt, A, B, C, D, z, dt_bias, dt_softplus, reset});
  Tensor y = new_like(x);
  a.y = view_of(y, "y", {a.batch, a.tokens, a.width});
  a.initial = a.state = view_of(state, "state", {a.batch, a.width, a.states});
  kernels().scan(a);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    MaybeTensor gy, MaybeTensor gstate, Tensor before, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C,
    MaybeTensor D, MaybeTensor z, MaybeTensor dt_bias, bool dt_softplus, MaybeTensor reset) {
  ScanGradArgs a{};
  fill(a, {x, dt, A, B, C, D, z, dt_bias, dt_softplus, reset});
  const int64_t b = a.batch, t = a.tokens, d = a.width, n = a.states, chunks = (t + SCAN_CHUNK - 1) / SCAN_CHUNK;
  STD_TORCH_CHECK(before.scalar_type() == wide(x), "before: another type than the forward pass keeps");
  a.before = view_of(before, "before", {chunks, b, n, d});
  a.gy = view_of(gy, "gy", {b, t, d}), a.gstate = view_of(gstate, "gstate", {b, d, n});
  Tensor gx = new_like(x), gdt = new_like(dt), gA = new_like(A), gB = new_like(B), gC = new_like(C);
  Tensor gD = new_like(D, x), gz = new_like(z, x), gdt_bias = new_like(dt_bias, x);
  Tensor ginitial = new_tensor(x, {b, d, n}, wide(x));
  a.gx = view_of(gx, "gx", {b, t, d}), a.gdt = view_of(gdt, "gdt", {b, t, d}), a.gA = view_of(gA, "gA", {d, n});
  a.gB = view_of(gB, "gB", {b, t, n}), a.gC = view_of(gC, "gC", {b, t, n});
  if (D) a.gD = view_of(gD, "gD", {d});
  if (z) a.gz = view_of(gz, "gz", {b, t, d});
  if (dt_bias) a.gdt_bias = view_of(gdt_bias, "gdt_bias", {d});
  a.ginitial = view_of(ginitial, "ginitial", {b, d, n});
  kernels().scan_backward(a);
  return {gx, gdt, gA, gB, gC, gD, gz, gdt_bias, ginitial};
}

STABLE_TORCH_LIBRARY_IMPL(hybrid_lm_native, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&selective_scan));
  m.impl("selective_scan_", TORCH_BOX(&selective_scan_));
  m.impl("selective_scan_backward", TORCH_BOX(&selective_scan_backward));
}

}  // namespace
}  // namespace hybrid_lm
