// What kernels for CUDA are written with: a thread's numbers, elements of any type, sums over lanes, launching. The
// same source compiles for the host, where `emulation.h` stands for the device (HYBRID_LM_EMULATE).
#pragma once

#include <cstddef>
#include <type_traits>

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
  static uint32_t narrow2(float low, float high) { return uint32_t(narrow(low)) | uint32_t(narrow(high)) << 16; }
#else
  static HYBRID_LM_DEVICE float wide(Bits v) { return __uint_as_float(unsigned(v) << 16); }
  static HYBRID_LM_DEVICE Bits narrow(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
  static HYBRID_LM_DEVICE uint32_t narrow2(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
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
  static uint32_t narrow2(float low, float high) { return uint32_t(narrow(low)) | uint32_t(narrow(high)) << 16; }
#else
  static HYBRID_LM_DEVICE float wide(Bits v) { return __half2float(__ushort_as_half(v)); }
  static HYBRID_LM_DEVICE Bits narrow(float v) { return __half_as_ushort(__float2half_rn(v)); }
  static HYBRID_LM_DEVICE uint32_t narrow2(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
#endif
};

// So many bytes in one access. A plain store of a struct may become several.
#if defined(HYBRID_LM_EMULATE)
template <size_t BYTES>
struct alignas(BYTES) Access {
  char at[BYTES];
};
template <class A>
inline void store_whole(A* to, A all) {
  *to = all;
}
#else
template <size_t BYTES>
using Access = std::conditional_t<
    BYTES == 16, uint4,
    std::conditional_t<BYTES == 8, uint2, std::conditional_t<BYTES == 4, uint32_t, uint16_t>>>;
HYBRID_LM_DEVICE void store_whole(uint16_t* to, uint16_t v) { *to = v; }
HYBRID_LM_DEVICE void store_whole(uint32_t* to, uint32_t v) { *to = v; }
HYBRID_LM_DEVICE void store_whole(uint2* to, uint2 v) {
  asm("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(v.x), "r"(v.y) : "memory");
}
HYBRID_LM_DEVICE void store_whole(uint4* to, uint4 v) {
  asm("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
#endif

// VEC neighbouring numbers as they lie in memory; two of two bytes in a word, so that they take one register.
template <class T, int VEC>
struct alignas(VEC * sizeof(typename T::Bits)) Row {
  using Bits = typename T::Bits;
  static constexpr int PER = VEC > 1 && sizeof(Bits) == 2 ? 2 : 1;
  std::conditional_t<PER == 2, uint32_t, Bits> words[VEC / PER];

  HYBRID_LM_DEVICE Bits bits(int v) const {
    if constexpr (PER == 2)
      return Bits(words[v / 2] >> v % 2 * 16);
    else
      return words[v];
  }

  // One access: all are there, and lie where one may begin.
  HYBRID_LM_DEVICE void load(const Bits* from) {
    const auto all = *reinterpret_cast<const Access<sizeof(Row)>*>(from);
    memcpy(this, &all, sizeof(Row));
  }
  HYBRID_LM_DEVICE void store(Bits* to) const {
    Access<sizeof(Row)> all;
    memcpy(&all, this, sizeof(Row));
    store_whole(reinterpret_cast<Access<sizeof(Row)>*>(to), all);
  }

  // The first `count`, one by one; the others are 0.
  HYBRID_LM_DEVICE void load(const Bits* from, int count) {
    HYBRID_LM_UNROLL
    for (int w = 0; w < VEC / PER; ++w) {
      if constexpr (PER == 2)
        words[w] = (2 * w < count ? uint32_t(from[2 * w]) : 0u) |
                   (2 * w + 1 < count ? uint32_t(from[2 * w + 1]) << 16 : 0u);
      else
        words[w] = w < count ? from[w] : Bits(0);
    }
  }
  HYBRID_LM_DEVICE void store(Bits* to, int count) const {
    HYBRID_LM_UNROLL
    for (int v = 0; v < VEC; ++v)
      if (v < count) to[v] = bits(v);
  }

  HYBRID_LM_DEVICE void wide(float (&to)[VEC]) const {
    HYBRID_LM_UNROLL
    for (int w = 0; w < VEC / PER; ++w) {
      if constexpr (PER == 2)
        to[2 * w] = T::wide(Bits(words[w])), to[2 * w + 1] = T::wide(Bits(words[w] >> 16));
      else
        to[w] = T::wide(words[w]);
    }
  }
  HYBRID_LM_DEVICE void narrow(const float (&from)[VEC]) {
    HYBRID_LM_UNROLL
    for (int w = 0; w < VEC / PER; ++w) {
      if constexpr (PER == 2)
        words[w] = T::narrow2(from[2 * w], from[2 * w + 1]);
      else
        words[w] = T::narrow(from[w]);
    }
  }
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

// Bytes of shared memory that a block can have on the current device.
inline size_t shared_room() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
    return 0;
  return size_t(bytes);
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
