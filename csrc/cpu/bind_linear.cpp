// hybrid_lm_native::linear. The schema stands in hybrid_lm/ops/native.
#include "cpu/bind.h"

namespace hybrid_lm {
namespace {

Tensor linear(Tensor x, Tensor weight, MaybeTensor bias) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "linear: x is (rows d_in), weight (d_out d_in)");
  LinearArgs a{};
  a.parallel = run_parallel;
  a.rows = size(x, 0), a.width = size(x, 1), a.outputs = size(weight, 0);
  a.x = view_of(x, "x", {a.rows, a.width}), a.weight = view_of(weight, "weight", {a.outputs, a.width});
  a.bias = view_of(bias, "bias", {a.outputs});
  STD_TORCH_CHECK(a.width == 1 || a.weight.stride[1] == 1, "linear: the rows of weight are not contiguous");
  Tensor y = new_tensor(x, {a.rows, a.outputs});
  a.y = view_of(y, "y", {a.rows, a.outputs});
  kernels().linear(a);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(hybrid_lm_native, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }

}  // namespace
}  // namespace hybrid_lm
