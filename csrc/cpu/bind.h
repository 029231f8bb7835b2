// Between torch's tensors and the kernels' views: new tensors, threads.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>

#define HYBRID_LM_DEVICE_TYPE CPU
#include "cpu/dispatch.h"
#include "hybrid_lm/tensors.h"

namespace hybrid_lm {

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

// kernels.h: `Parallel`.
inline void run_parallel(int64_t items, const void* work, void (*run)(const void* work, int64_t item)) {
  const int64_t threads = torch::stable::get_num_threads();
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, items < threads ? items : threads, 1, [&](int64_t, int64_t) {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) run(work, item);
  });
}

}  // namespace hybrid_lm
