// Vectors of the widest kind that this build of the kernels may use, by the compiler's vector extension: one source
// for AVX-512, AVX2, SSE2 and NEON. HYBRID_LM_ISA names the build, and everything in it lies in the namespace of that
// name: the linker can never take one build's function for another's.
#pragma once

#include <cstdint>
#include <cstring>

#include "hybrid_lm/math.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace hybrid_lm {
namespace HYBRID_LM_ISA {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

template <class T, int BYTES>
struct VectorOf {
  typedef T type __attribute__((vector_size(BYTES)));
};
template <class T, int BYTES = VECTOR_BYTES>
using Vec = typename VectorOf<T, BYTES>::type;

// 2^r for |r| <= 1/2, exactly 1 at 0. float: the polynomial of degree 5 of least relative error, 9.2e-8. double:
// ln(2)^k / k!, of which the first term left out is 1.3e-17.
HYBRID_LM_FN Vec<float> exp2_polynomial(Vec<float> r) {
  return ((((r * 1.326472725e-3f + 9.671512786e-3f) * r + 5.550733744e-2f) * r + 2.402224208e-1f) * r +
          6.931469776e-1f) * r + 1.0f;
}

HYBRID_LM_FN Vec<double> exp2_polynomial(Vec<double> r) {
  constexpr double c[] = {1.0,
                          6.931471805599453094e-1, 2.402265069591007123e-1, 5.550410866482157995e-2,
                          9.618129107628477162e-3, 1.333355814642844342e-3, 1.540353039338160995e-4,
                          1.525273380405984028e-5, 1.321548679014430949e-6, 1.017808600923969973e-7,
                          7.054911620801123330e-9, 4.445538271870811498e-10, 2.567843599348820514e-11,
                          1.369148885390412888e-12};
  Vec<double> p = c[13] - Vec<double>{};
  for (int k = 12; k >= 0; --k) p = p * r + c[k];
  return p;
}

// log(1 + t) / t for 0 <= t <= 1. float: degree 8 of least relative error, 3.0e-8. double: 2 atanh(t / (2 + t)) / t,
// whose terms shrink by 9; the first left out is 2e-17.
HYBRID_LM_FN Vec<float> log1p_over(Vec<float> t) {
  constexpr float c[] = {0.99999997f,  -0.499994931f, 0.333190968f,  -0.248429819f, 0.191060055f,
                         -0.136632432f, 0.0782259211f, -0.0295052198f, 0.00523268949f};
  Vec<float> p = c[8] - Vec<float>{};
  for (int k = 7; k >= 0; --k) p = p * t + c[k];
  return p;
}

HYBRID_LM_FN Vec<double> log1p_over(Vec<double> t) {
  Vec<double> s = t / (t + 2.0), s2 = s * s, p = 1.0 / 33 - Vec<double>{};
  for (int k = 15; k >= 0; --k) p = p * s2 + 1.0 / (2 * k + 1);
  return p * 2.0 / (t + 2.0);
}

// 2^v by the bits of the exponent: adding 1.5 2^MANTISSA leaves the nearest whole number in the lowest bits. Two
// factors, each 2^(whole / 2), reach denormal results and infinity.
template <class V, class I, class S, int MANTISSA, int BIAS>
HYBRID_LM_FN V exp2_by_bits(V v) {
  constexpr S magic = S(3ll << (MANTISSA - 1));
  const V top = S(BIAS + 1) - V{}, bottom = S(-BIAS - MANTISSA - 1) - V{};
  // A NaN fails both comparisons and stays.
  v = v > top ? top : (v < bottom ? bottom : v);
  V shifted = v + magic, whole = shifted - magic;
  I k = (I)shifted - (I)(magic - V{}), half = k >> 1;
  V first = (V)((half + BIAS) << MANTISSA), second = (V)((k - half + BIAS) << MANTISSA);
  return exp2_polynomial(v - whole) * first * second;
}

#if defined(__AVX512F__)
// scalef is right at both infinities, where the polynomial is NaN. (The plain intrinsics make GCC warn of their own
// uninitialised operand; the masked ones are the same instruction.)
HYBRID_LM_FN Vec<float> exp2_of(Vec<float> v) {
  Vec<float> whole = _mm512_maskz_roundscale_ps(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_maskz_scalef_ps(0xffff, exp2_polynomial(v - whole), whole);
}

HYBRID_LM_FN Vec<double> exp2_of(Vec<double> v) {
  Vec<double> whole = _mm512_maskz_roundscale_pd(0xff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_maskz_scalef_pd(0xff, exp2_polynomial(v - whole), whole);
}
#else
HYBRID_LM_FN Vec<float> exp2_of(Vec<float> v) { return exp2_by_bits<Vec<float>, Vec<int32_t>, float, 23, 127>(v); }

HYBRID_LM_FN Vec<double> exp2_of(Vec<double> v) { return exp2_by_bits<Vec<double>, Vec<int64_t>, double, 52, 1023>(v); }
#endif

// What the functions of csrc/include compute with here: LANES numbers of type T at once.
template <class T>
struct Lanes {
  using S = T;
  using V = Vec<T>;
  static constexpr int COUNT = VECTOR_BYTES / sizeof(T);

  static HYBRID_LM_FN V broadcast(S s) { return s - V{}; }
  template <class M>
  static HYBRID_LM_FN V select(M mask, V yes, V no) {
    return mask ? yes : no;
  }
  static HYBRID_LM_FN V reciprocal(V v) { return broadcast(1) / v; }
  static HYBRID_LM_FN V exp2(V v) { return exp2_of(v); }
  static HYBRID_LM_FN V log1p(V t) { return t * log1p_over(t); }
  // From and to memory of any alignment.
  static HYBRID_LM_FN V load(const S* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
  }
  static HYBRID_LM_FN void store(S* p, V v) { std::memcpy(p, &v, sizeof(V)); }
  // Sum of all lanes, by halves.
  static HYBRID_LM_FN S sum(V v) { return half_sum<VECTOR_BYTES>(v); }

 private:
  template <int BYTES>
  static HYBRID_LM_FN S half_sum(Vec<T, BYTES> v) {
    if constexpr (BYTES == 2 * sizeof(T)) {
      return v[0] + v[1];
    } else {
      Vec<T, BYTES / 2> half[2];
      std::memcpy(half, &v, BYTES);
      return half_sum<BYTES / 2>(half[0] + half[1]);
    }
  }
};

}  // namespace HYBRID_LM_ISA
}  // namespace hybrid_lm
