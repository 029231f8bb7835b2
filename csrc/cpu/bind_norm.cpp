// hybrid_lm_native::rms_norm, plain and gated. The schemas stand in hybrid_lm/ops/native.
#include "cpu/bind.h"

namespace hybrid_lm {
namespace {

void fill(NormArgs& a, const Tensor& x, const MaybeTensor& gate, const MaybeTensor& weight, double eps, double offset,
          int64_t groups, int64_t order) {
  STD_TORCH_CHECK(x.dim() == 2 && groups > 0 && size(x, 1) % groups == 0,
                  "rms_norm: x is (rows d), d a multiple of the groups");
  STD_TORCH_CHECK(order >= NormArgs::NORM && order <= NormArgs::GATE && (order == NormArgs::NORM) == !gate,
                  "rms_norm: a gate and an order that uses it go together");
  a.parallel = run_parallel;
  a.rows = size(x, 0), a.width = size(x, 1), a.groups = groups;
  a.x = view_of(x, "x", {a.rows, a.width}), a.gate = view_of(gate, "gate", {a.rows, a.width});
  a.weight = view_of(weight, "weight", {a.width});
  a.eps = eps, a.offset = offset, a.order = NormArgs::Order(order);
}

Tensor rms_norm(Tensor x, MaybeTensor gate, MaybeTensor weight, double eps, double offset, int64_t groups,
                int64_t order) {
  NormArgs a{};
  fill(a, x, gate, weight, eps, offset, groups, order);
  Tensor y = new_like(x);
  a.y = view_of(y, "y", {a.rows, a.width});
  kernels().norm(a);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_backward(Tensor gy, Tensor x, MaybeTensor gate, MaybeTensor weight,
                                                     double eps, double offset, int64_t groups, int64_t order) {
  NormGradArgs a{};
  fill(a, x, gate, weight, eps, offset, groups, order);
  Tensor gx = new_like(x), ggate = new_like(gate, x), gweight = new_like(weight, x);
  a.gy = view_of(gy, "gy", {a.rows, a.width}), a.gx = view_of(gx, "gx", {a.rows, a.width});
  if (gate) a.ggate = view_of(ggate, "ggate", {a.rows, a.width});
  if (weight) a.gweight = view_of(gweight, "gweight", {a.width});
  kernels().norm_backward(a);
  return {gx, ggate, gweight};
}

STABLE_TORCH_LIBRARY_IMPL(hybrid_lm_native, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace
}  // namespace hybrid_lm
