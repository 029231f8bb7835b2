// A tensor as a kernel sees it: a pointer, the type of an element, and strides counted in elements.
#pragma once

#include "hybrid_lm/portable.h"

namespace hybrid_lm {

enum class Type : int8_t { f32, f64, bf16, f16 };

struct View {
  void* data = nullptr;  // null: the tensor is absent
  Type type = Type::f32;
  int64_t stride[5] = {0, 0, 0, 0, 0};

  HYBRID_LM_FN explicit operator bool() const { return data != nullptr; }
};

}  // namespace hybrid_lm
