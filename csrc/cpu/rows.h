// Reading and writing rows of a tensor whatever its element type and stride: kernels compute in S (float, or double
// for double tensors) on rows that are packed in scratch memory.
#pragma once

#include <type_traits>

#include "cpu/simd.h"
#include "hybrid_lm/view.h"

namespace hybrid_lm {
namespace HYBRID_LM_ISA {

// bfloat16: the upper half of a float.
struct BFloat16 {
  uint16_t bits;

  HYBRID_LM_FN operator float() const {
    uint32_t wide = uint32_t(bits) << 16;
    float f;
    std::memcpy(&f, &wide, 4);
    return f;
  }
  HYBRID_LM_FN static BFloat16 from(float f) {
    uint32_t wide;
    std::memcpy(&wide, &f, 4);
    // To the nearest, halves to even; a NaN keeps its sign and becomes the quiet one.
    uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1)) >> 16;
    uint32_t nan = (wide >> 16) | 0x40;
    return {uint16_t((wide & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
  }
};

template <class E, class S>
HYBRID_LM_FN S widened(E e) {
  if constexpr (sizeof(E) == 2) return S(float(e));
  return S(e);
}

template <class E, class S>
HYBRID_LM_FN E narrowed(S s) {
  if constexpr (std::is_same_v<E, BFloat16>)
    return BFloat16::from(float(s));
  else
    return E(s);
}

template <class E, class S>
inline void load_as(const E* from, int64_t stride, int64_t count, S* __restrict__ to) {
  if (stride == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = widened<E, S>(from[i]);
  // An expanded tensor, like the gradient of a sum: worth not going one by one.
  else if (stride == 0)
    for (int64_t i = 0; i < count; ++i) to[i] = widened<E, S>(from[0]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = widened<E, S>(from[i * stride]);
}

template <class E, class S>
inline void store_as(E* to, int64_t stride, int64_t count, const S* __restrict__ from) {
  if (stride == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = narrowed<E, S>(from[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i * stride] = narrowed<E, S>(from[i]);
}

// `count` elements of a tensor from element `offset` on, `stride` apart, as S.
template <class S>
inline void load_row(const View& v, int64_t offset, int64_t stride, int64_t count, S* to) {
  switch (v.type) {
    case Type::f32: return load_as(static_cast<const float*>(v.data) + offset, stride, count, to);
    case Type::f64: return load_as(static_cast<const double*>(v.data) + offset, stride, count, to);
    case Type::bf16: return load_as(static_cast<const BFloat16*>(v.data) + offset, stride, count, to);
    case Type::f16: return load_as(static_cast<const _Float16*>(v.data) + offset, stride, count, to);
  }
}

template <class S>
inline void store_row(const View& v, int64_t offset, int64_t stride, int64_t count, const S* from) {
  switch (v.type) {
    case Type::f32: return store_as(static_cast<float*>(v.data) + offset, stride, count, from);
    case Type::f64: return store_as(static_cast<double*>(v.data) + offset, stride, count, from);
    case Type::bf16: return store_as(static_cast<BFloat16*>(v.data) + offset, stride, count, from);
    case Type::f16: return store_as(static_cast<_Float16*>(v.data) + offset, stride, count, from);
  }
}

}  // namespace HYBRID_LM_ISA
}  // namespace hybrid_lm
