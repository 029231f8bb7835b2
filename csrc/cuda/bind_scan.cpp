// hybrid_lm_native::selective_scan. The schemas stand in hybrid_lm/ops/native.
#include "cuda/bind.h"

namespace hybrid_lm {
namespace {

// The tensors of a call, as the kernels take them: `args` points into them.
struct Inputs {
  Tensor x, dt, A, B, C;
  MaybeTensor D, z, dt_bias, reset;
  bool dt_softplus;
  ScalarType type;  // of x, dt, B, C, z, here

  Inputs(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C, const MaybeTensor& D,
         const MaybeTensor& z, const MaybeTensor& dt_bias, bool dt_softplus, const MaybeTensor& reset,
         bool any_type = true, const MaybeTensor& gy = std::nullopt)
      : x(x), dt(dt), A(A), B(B), C(C), D(D), z(z), dt_bias(dt_bias), reset(reset), dt_softplus(dt_softplus) {
    type = common_type({&this->x, &this->dt, &this->B, &this->C, maybe(this->z), maybe(gy)});
    if (!any_type) type = ScalarType::Float;
  }

  void fill(ScanArgs& a, const OnDevice& device) {
    STD_TORCH_CHECK(x.dim() == 3 && A.dim() == 2 && size(x, 1) > 0, "selective_scan: x is (b t d) with t > 0, A (d n)");
    const int64_t b = size(x, 0), t = size(x, 1), d = size(x, 2), n = size(A, 1);
    STD_TORCH_CHECK(n <= SCAN_STATES, "selective_scan: ", n, " states; the kernels for CUDA have room for ", SCAN_STATES);
    a.stream = device.stream();
    a.batch = b, a.tokens = t, a.width = d, a.states = n;
    // Sizes and types as they were given are checked before anything is copied.
    a.x = rows(x, "x", {b, t, d}), a.dt = rows(dt, "dt", {b, t, d}), a.A = view_of(A, "A", {d, n});
    a.B = rows(B, "B", {b, t, n}), a.C = rows(C, "C", {b, t, n});
    a.D = view_of(D, "D", {d}), a.dt_bias = view_of(dt_bias, "dt_bias", {d});
    if (z) a.z = rows(*z, "z", {b, t, d});
    a.dt_softplus = dt_softplus;
    a.reset = view_of(reset, "reset", {b, t}, true);
  }

  View rows(Tensor& v, const char* name, const std::vector<int64_t>& sizes) {
    view_of(v, name, sizes);
    v = in_rows(v, type);
    return view_of(v, name, sizes);
  }
};

std::tuple<Tensor, Tensor, Tensor> selective_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, MaybeTensor D,
                                                  MaybeTensor z, MaybeTensor dt_bias, bool dt_softplus,
                                                  MaybeTensor initial, MaybeTensor reset, bool keep) {
  const OnDevice device(x);
  ScanArgs a{};
  Inputs inputs(x, dt, A, B, C, D, z, dt_bias, dt_softplus, reset);
  inputs.fill(a, device);
  const int64_t b = a.batch, t = a.tokens, d = a.width, n = a.states, chunks = (t + SCAN_CHUNK - 1) / SCAN_CHUNK;
  a.initial = view_of(initial, "initial", {b, d, n});
  Tensor y = new_tensor(x, {b, t, d}, inputs.type), state = new_tensor(x, {b, d, n}, ScalarType::Float);
  Tensor before = new_tensor(x, keep ? std::vector<int64_t>{chunks, b, n, d} : std::vector<int64_t>{0}, ScalarType::Float);
  a.y = view_of(y, "y", {b, t, d}), a.state = view_of(state, "state", {b, d, n});
  if (keep) a.before = view_of(before, "before", {chunks, b, n, d});
  check(scan(a));
  return {as_type(y, x.scalar_type()), state, before};
}

Tensor selective_scan_(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, MaybeTensor D, MaybeTensor z,
                       MaybeTensor dt_bias, bool dt_softplus, Tensor state, MaybeTensor reset) {
  const OnDevice device(x);
  ScanArgs a{};
  Inputs inputs(x, dt, A, B, C, D, z, dt_bias, dt_softplus, reset);
  inputs.fill(a, device);
  Tensor y = new_tensor(x, {a.batch, a.tokens, a.width}, inputs.type);
  a.y = view_of(y, "y", {a.batch, a.tokens, a.width});
  a.initial = a.state = view_of(state, "state", {a.batch, a.width, a.states});
  check(scan(a));
  return as_type(y, x.scalar_type());
}

// What the kernel writes as `type`, and the caller gets as the input's own.
struct Gradient {
  Tensor written;
  ScalarType type;
  Gradient(const Tensor& of, ScalarType type)
      : written(new_tensor(of, {of.sizes().begin(), of.sizes().end()}, type)), type(of.scalar_type()) {}
  Tensor done() const { return as_type(written, type); }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    MaybeTensor gy, MaybeTensor gstate, Tensor before, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C,
    MaybeTensor D, MaybeTensor z, MaybeTensor dt_bias, bool dt_softplus, MaybeTensor reset) {
  const OnDevice device(x);
  ScanGradArgs a{};
  Inputs inputs(x, dt, A, B, C, D, z, dt_bias, dt_softplus, reset, A.dim() != 2 || size(A, 1) <= SCAN_TYPED, gy);
  inputs.fill(a, device);
  const int64_t b = a.batch, t = a.tokens, d = a.width, n = a.states, chunks = (t + SCAN_CHUNK - 1) / SCAN_CHUNK;
  STD_TORCH_CHECK(before.scalar_type() == ScalarType::Float, "before: another type than the forward pass keeps");
  const Tensor kept = torch::stable::contiguous(before);
  a.before = view_of(kept, "before", {chunks, b, n, d});
  Tensor gy_rows = gy ? *gy : x;
  if (gy) a.gy = inputs.rows(gy_rows, "gy", {b, t, d});
  a.gstate = view_of(gstate, "gstate", {b, d, n});
  const Gradient gx(x, inputs.type), gdt(dt, inputs.type), gz(z ? *z : x, inputs.type);
  const auto own = [](const Tensor& of) { return new_tensor(of, {of.sizes().begin(), of.sizes().end()}, of.scalar_type()); };
  const auto maybe_own = [&](const MaybeTensor& of) { return of ? own(*of) : new_tensor(x, {0}, x.scalar_type()); };
  Tensor gA = own(A), gB = own(B), gC = own(C), gD = maybe_own(D), gdt_bias = maybe_own(dt_bias);
  Tensor ginitial = new_tensor(x, {b, d, n}, ScalarType::Float);
  a.gx = view_of(gx.written, "gx", {b, t, d}), a.gdt = view_of(gdt.written, "gdt", {b, t, d});
  a.gA = view_of(gA, "gA", {d, n}), a.gB = view_of(gB, "gB", {b, t, n}), a.gC = view_of(gC, "gC", {b, t, n});
  if (D) a.gD = view_of(gD, "gD", {d});
  if (z) a.gz = view_of(gz.written, "gz", {b, t, d});
  if (dt_bias) a.gdt_bias = view_of(gdt_bias, "gdt_bias", {d});
  a.ginitial = view_of(ginitial, "ginitial", {b, d, n});
  const Tensor scratch = new_tensor(x, {scan_backward_scratch(a)}, ScalarType::Float);
  a.scratch = static_cast<float*>(scratch.data_ptr());
  check(scan_backward(a));
  const Tensor none = new_tensor(x, {0}, x.scalar_type());
  return {gx.done(), gdt.done(), gA, gB, gC, gD, z ? gz.done() : none, gdt_bias, ginitial};
}

STABLE_TORCH_LIBRARY_IMPL(hybrid_lm_native, HYBRID_LM_KEY, m) {
  m.impl("selective_scan", TORCH_BOX(&selective_scan));
  m.impl("selective_scan_", TORCH_BOX(&selective_scan_));
  m.impl("selective_scan_backward", TORCH_BOX(&selective_scan_backward));
}

}  // namespace
}  // namespace hybrid_lm
