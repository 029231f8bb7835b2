// Torch's tensors as kernels see them, by torch's stable ABI: one library for torch 2.10 and later. The only header here
// that needs torch. Before it, HYBRID_LM_DEVICE_TYPE names the device type of the tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "hybrid_lm/view.h"

namespace hybrid_lm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline int64_t size(const Tensor& t, int64_t dim) { return t.sizes()[dim]; }

// A view of a tensor with just these sizes. The op's Python side has friendlier messages; these keep a wrong direct
// call from reading beyond its memory.
inline View view_of(const Tensor& t, const char* name, const std::vector<int64_t>& sizes, bool flags = false) {
  STD_TORCH_CHECK(t.device().type() == torch::headeronly::DeviceType::HYBRID_LM_DEVICE_TYPE, name,
                  ": not a tensor of the device that the kernels are for");
  STD_TORCH_CHECK(t.dim() == int64_t(sizes.size()), name, ": ", t.dim(), " dimensions instead of ", sizes.size());
  View v;
  for (size_t k = 0; k < sizes.size(); ++k) {
    STD_TORCH_CHECK(size(t, k) == sizes[k], name, ": size ", size(t, k), " in dimension ", k, " instead of ", sizes[k]);
    v.stride[k] = t.strides()[k];
  }
  v.data = t.data_ptr();
  const ScalarType type = t.scalar_type();
  if (flags) {
    STD_TORCH_CHECK(type == ScalarType::Bool, name, ": not bool");
    return v;
  }
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  name, ": neither float32, float64, bfloat16 nor float16");
  v.type = type == ScalarType::Float    ? Type::f32
           : type == ScalarType::Double ? Type::f64
           : type == ScalarType::Half   ? Type::f16
                                        : Type::bf16;
  return v;
}

inline View view_of(const MaybeTensor& t, const char* name, const std::vector<int64_t>& sizes, bool flags = false) {
  return t ? view_of(*t, name, sizes, flags) : View{};
}

// What sums and states are held in.
inline ScalarType wide(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace hybrid_lm
