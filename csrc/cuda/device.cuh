// What kernels for CUDA are written with: a thread's numbers, elements of any type, sums over lanes, launching. The
// same source compiles for the host, where `emulation.h` stands for the device (HYBRID_LM_EMULATE).
#pragma once

#include <cstddef>

#include "hybrid_lm/math.h"
#include "hybrid_lm/view.h"

#if defined(HYBRID_LM_EMULATE)
#include "cuda/emulation.h"
#define HYBRID_LM_UNROLL
#define HYBRID_LM_UNROLL_BY(n)
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define HYBRID_LM_UNROLL _Pragma("unroll")
#define HYBRID_LM_UNROLL_BY(n) _Pragma(HYBRID_LM_TEXT(unroll n))
#define HYBRID_LM_TEXT(x) #x
#endif

#define HYBRID_LM_DEVICE __device__ __forceinline__

namespace hybrid_lm {

constexpr unsigned ALL_LANES = 0xffffffffu;

// What the functions of csrc/include compute with here: one float of one thread.
struct Thread {
  using V = float;
  using S = float;
  static HYBRID_LM_DEVICE V broadcast(S s) { return s; }
  static HYBRID_LM_DEVICE V select(bool mask, V yes, V no) { return mask ? yes : no; }
  // One instruction, of which the relative error is 2^-22; what is below 2^-126 is 0.
  static HYBRID_LM_DEVICE V exp2(V v) {
#if defined(HYBRID_LM_EMULATE)
    return std::exp2(v);
#else
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(v) : "f"(v));
    return v;
#endif
  }
  // Two instructions, of which the relative error is 2 roundings; 0 for infinity, and for all above 2^126.
  static HYBRID_LM_DEVICE V reciprocal(V v) {
#if defined(HYBRID_LM_EMULATE)
    return 1 / v;
#else
    return __fdividef(1.0f, v);
#endif
  }
  // On [0, 1]: the polynomial of cpu/simd.h.
  static HYBRID_LM_DEVICE V log1p(V t) {
    V p = 0.00523268949f;
    p = p * t - 0.0295052198f;
    p = p * t + 0.0782259211f;
    p = p * t - 0.136632432f;
    p = p * t + 0.191060055f;
    p = p * t - 0.248429819f;
    p = p * t + 0.333190968f;
    p = p * t - 0.499994931f;
    p = p * t + 0.99999997f;
    return t * p;
  }
};

// Elements of a tensor: their bits as they lie in memory, and to and from float. Kernels load bits ahead of time and
// turn them into numbers when they need them: a conversion waits for its load.
struct Float {
  using Bits = float;
  static constexpr Type TYPE = Type::f32;
  static HYBRID_LM_DEVICE float wide(Bits v) { return v; }
  static HYBRID_LM_DEVICE Bits narrow(float v) { return v; }
};

struct BFloat {
  using Bits = uint16_t;
  static constexpr Type TYPE = Type::bf16;
#if defined(HYBRID_LM_EMULATE)
  static float wide(Bits v) {
    const uint32_t bits = uint32_t(v) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
  }
  // To the nearest, halves to even; a NaN becomes a quiet one.
  static Bits narrow(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if (v != v) return Bits(bits >> 16 | 0x40);
    return Bits((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
  }
#else
  static HYBRID_LM_DEVICE float wide(Bits v) { return __uint_as_float(unsigned(v) << 16); }
  static HYBRID_LM_DEVICE Bits narrow(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
#endif
};

struct Half {
  using Bits = uint16_t;
  static constexpr Type TYPE = Type::f16;
#if defined(HYBRID_LM_EMULATE)
  static float wide(Bits v) {
    _Float16 h;
    std::memcpy(&h, &v, 2);
    return float(h);
  }
  static Bits narrow(float v) {
    const _Float16 h = _Float16(v);
    Bits bits;
    std::memcpy(&bits, &h, 2);
    return bits;
  }
#else
  static HYBRID_LM_DEVICE float wide(Bits v) { return __half2float(__ushort_as_half(v)); }
  static HYBRID_LM_DEVICE Bits narrow(float v) { return __half_as_ushort(__float2half_rn(v)); }
#endif
};

// One element of a tensor of any type, for what is read or written once.
HYBRID_LM_DEVICE float read(const View& v, int64_t at) {
  if (v.type == Type::f32) return static_cast<const float*>(v.data)[at];
  if (v.type == Type::f64) return float(static_cast<const double*>(v.data)[at]);
  const uint16_t bits = static_cast<const uint16_t*>(v.data)[at];
  return v.type == Type::bf16 ? BFloat::wide(bits) : Half::wide(bits);
}

HYBRID_LM_DEVICE void write(const View& v, int64_t at, float value) {
  if (v.type == Type::f32)
    static_cast<float*>(v.data)[at] = value;
  else if (v.type == Type::f64)
    static_cast<double*>(v.data)[at] = double(value);
  else
    static_cast<uint16_t*>(v.data)[at] = v.type == Type::bf16 ? BFloat::narrow(value) : Half::narrow(value);
}

// `VEC` floats in shared memory as one access.
template <int VEC>
struct alignas(VEC * sizeof(float)) Floats {
  float at[VEC];
};

// Sums COUNT numbers over LANES lanes that lie STRIDE apart; `lane` is the place of this one among them. Each keeps
// max(1, COUNT / LANES) of the sums, at the start of v: those from `kept_from<COUNT, LANES>(lane)` on. Two lanes give
// each other the half that they do not keep, so that there is about one shuffle for a number, however many the lanes.
// The order of additions is always the same.
template <int COUNT, int LANES, int STRIDE = 1>
HYBRID_LM_DEVICE void sum_over_lanes(float (&v)[COUNT], unsigned lane) {
  static_assert((COUNT & (COUNT - 1)) == 0 && (LANES & (LANES - 1)) == 0);
  if constexpr (LANES > 1) {
    constexpr int STEP = LANES / 2;
    if constexpr (COUNT > 1) {
      constexpr int HALF = COUNT / 2;
      const bool upper = lane & STEP;
      float kept[HALF];
      HYBRID_LM_UNROLL
      for (int i = 0; i < HALF; ++i) {
        const float own = upper ? v[i + HALF] : v[i], given = upper ? v[i] : v[i + HALF];
        kept[i] = own + __shfl_xor_sync(ALL_LANES, given, STEP * STRIDE);
      }
      sum_over_lanes<HALF, STEP, STRIDE>(kept, lane);
      HYBRID_LM_UNROLL
      for (int i = 0; i < HALF; ++i) v[i] = kept[i];
    } else {
      v[0] += __shfl_xor_sync(ALL_LANES, v[0], STEP * STRIDE);
      sum_over_lanes<1, STEP, STRIDE>(v, lane);
    }
  }
}

template <int COUNT, int LANES>
HYBRID_LM_DEVICE int kept_from(unsigned lane) {
  return COUNT >= LANES ? int(lane) * (COUNT / LANES) : int(lane) / (LANES / COUNT);
}

#if !defined(HYBRID_LM_EMULATE)
// The block's shared memory, as many bytes as it was launched with.
HYBRID_LM_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// Starts a kernel and says what went wrong, or null.
template <class... P, class... Args>
inline const char* launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes, void* stream,
                          Args... args) {
  // More than this has to be asked for.
  if (shared_bytes > 48 * 1024) {
    const cudaError_t refused = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                     cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (refused != cudaSuccess) {
      cudaGetLastError();  // or the next call would be told of it
      return "this GPU has too little shared memory for these sizes; backend='torch' does without";
    }
  }
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

}  // namespace hybrid_lm
