// Between torch's tensors and the kernels' views, by torch's stable ABI: one library for torch 2.10 and later.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <optional>
#include <vector>

#include "cpu/dispatch.h"

namespace hybrid_lm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline int64_t size(const Tensor& t, int64_t dim) { return t.sizes()[dim]; }

// A view of a tensor with just these sizes. The op's Python side has friendlier messages; these keep a wrong direct
// call from reading beyond its memory.
inline View view_of(const Tensor& t, const char* name, const std::vector<int64_t>& sizes, bool flags = false) {
  STD_TORCH_CHECK(t.device().type() == torch::headeronly::DeviceType::CPU, name, ": not a CPU tensor");
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

// Asks for large pages in a large tensor's fresh memory: mapping and clearing it 4 KiB at a time, as it is first
// written, can take longer than the kernel does.
inline void prefer_large_pages(const Tensor& t) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t PAGE = uintptr_t(1) << 21;
  const uintptr_t data = reinterpret_cast<uintptr_t>(t.data_ptr()), bytes = t.numel() * t.element_size();
  const uintptr_t from = (data + PAGE - 1) / PAGE * PAGE, to = (data + bytes) / PAGE * PAGE;
  if (to > from) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes,
                         std::optional<ScalarType> type = std::nullopt) {
  const torch::headeronly::IntHeaderOnlyArrayRef shape(sizes.data(), sizes.size());
  Tensor t = torch::stable::new_empty(like, shape, type);
  prefer_large_pages(t);
  return t;
}

inline Tensor new_like(const Tensor& t) { return new_tensor(t, {t.sizes().begin(), t.sizes().end()}); }

// Of the same sizes, or empty in the place of an absent one: an operator cannot return None.
inline Tensor new_like(const MaybeTensor& t, const Tensor& other) { return t ? new_like(*t) : new_tensor(other, {0}); }

// What sums and states are held in.
inline ScalarType wide(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// kernels.h: `Parallel`.
inline void run_parallel(int64_t items, const void* work, void (*run)(const void* work, int64_t item)) {
  const int64_t threads = torch::stable::get_num_threads();
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, items < threads ? items : threads, 1, [&](int64_t, int64_t) {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) run(work, item);
  });
}

}  // namespace hybrid_lm
