// Between torch's tensors and the kernels' views: the stream, new tensors, and copies where a kernel wants numbers side
// by side. With HYBRID_LM_EMULATE the tensors are the CPU's, and the kernels run on the host, for tests.
#pragma once

#if defined(HYBRID_LM_EMULATE)
#define HYBRID_LM_DEVICE_TYPE CPU
#define HYBRID_LM_KEY CPU
#else
#define HYBRID_LM_DEVICE_TYPE CUDA
#define HYBRID_LM_KEY CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include <initializer_list>

#include "cuda/kernels.h"
#include "hybrid_lm/tensors.h"

namespace hybrid_lm {

// Makes a tensor's device the current one, as long as this lives; and its stream.
class OnDevice {
 public:
#if defined(HYBRID_LM_EMULATE)
  explicit OnDevice(const Tensor&) {}
  void* stream() const { return nullptr; }
#else
  explicit OnDevice(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {}
  void* stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return stream;
  }

 private:
  torch::stable::accelerator::DeviceIndex index_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline void check(const char* error) { STD_TORCH_CHECK(error == nullptr, error ? error : ""); }

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), type);
}

inline Tensor as_type(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

// The one type that all of these have, if kernels are made for it, else float32, which holds what any of them has.
inline ScalarType common_type(std::initializer_list<const Tensor*> tensors) {
  const ScalarType first = (*tensors.begin())->scalar_type();
  STD_TORCH_CHECK(first != ScalarType::Double, "float64: the kernels for CUDA compute in float32; backend='torch' has it");
  for (const Tensor* t : tensors)
    if (t && t->scalar_type() != first) return ScalarType::Float;
  return first;
}

inline const Tensor* maybe(const MaybeTensor& t) { return t ? &*t : nullptr; }

// Of this type and with its numbers along the last axis side by side, and rows so near to each other that 32 bits hold
// the way from one to the last of a stage of the scan, the 31st after it: itself, or a copy.
inline Tensor in_rows(const Tensor& t, ScalarType type) {
  constexpr int64_t FAR = int64_t(1) << 26;
  const int64_t last = t.dim() - 1;
  bool side_by_side = last < 0 || t.strides()[last] == 1 || size(t, last) <= 1;
  if (last > 0) side_by_side = side_by_side && t.strides()[last - 1] < FAR;
  const Tensor typed = as_type(t, type);
  return side_by_side && typed.get() == t.get() ? t : torch::stable::contiguous(typed);
}

inline MaybeTensor in_rows(const MaybeTensor& t, ScalarType type) {
  return t ? MaybeTensor(in_rows(*t, type)) : std::nullopt;
}

}  // namespace hybrid_lm
