// y = x W^T + b for few rows of x, as in decoding: every weight is read once, so what counts is reading them in one
// stream, at the speed of memory. For many rows a matrix product of a BLAS is right.
#include <cstdlib>

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace hybrid_lm {
namespace HYBRID_LM_ISA {
namespace {

// LANES elements of a row of weights, as S.
template <class S, class E>
HYBRID_LM_FN Vec<S> weights(const E* p) {
  constexpr int COUNT = Lanes<S>::COUNT;
  if constexpr (std::is_same_v<E, S>) {
    return Lanes<S>::load(p);
  } else if constexpr (std::is_same_v<E, BFloat16> && std::is_same_v<S, float>) {
    Vec<uint16_t, COUNT * 2> narrow;
    std::memcpy(&narrow, p, sizeof(narrow));
    return (Vec<S>)(__builtin_convertvector(narrow, Vec<uint32_t>) << 16);
  } else {
    Vec<S> v;
    for (int i = 0; i < COUNT; ++i) v[i] = widened<E, S>(p[i]);
    return v;
  }
}

// The products of one row of weights w (width) with M rows of x, `pitch` apart. Two sums for each row of x, so that an
// addition need not wait for the one before it.
template <int M, class S, class E>
HYBRID_LM_FN void products(const E* w, const S* x, int64_t width, int64_t pitch, S* out) {
  using L = Lanes<S>;
  Vec<S> even[M] = {}, odd[M] = {};
  int64_t i = 0;
  for (; i + 2 * L::COUNT <= width; i += 2 * L::COUNT) {
    const Vec<S> a = weights<S>(w + i), b = weights<S>(w + i + L::COUNT);
    for (int m = 0; m < M; ++m) {
      even[m] += a * L::load(x + m * pitch + i);
      odd[m] += b * L::load(x + m * pitch + i + L::COUNT);
    }
  }
  for (int m = 0; m < M; ++m) out[m] = L::sum(even[m] + odd[m]);
  for (; i < width; ++i)
    for (int m = 0; m < M; ++m) out[m] += widened<E, S>(w[i]) * x[m * pitch + i];
}

// Calls `f` with the number of rows as a constant.
template <class F>
HYBRID_LM_FN void with_rows(int64_t rows, const F& f) {
  switch (rows) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    default: return f(std::integral_constant<int, 4>());
  }
}

template <class S, class E>
void run(const LinearArgs& a) {
  const int64_t pitch = (a.width + 15) / 16 * 16;
  S* x = static_cast<S*>(std::malloc(a.rows * pitch * sizeof(S)));
  for (int64_t m = 0; m < a.rows; ++m) load_row(a.x, m * a.x.stride[0], a.x.stride[1], a.width, x + m * pitch);
  // 128 KiB of weights in a work item.
  const int64_t fitting = (int64_t(1) << 17) / (a.width * int64_t(sizeof(E)) + 1);
  const int64_t block = fitting > 16 ? fitting : 16, items = (a.outputs + block - 1) / block;
  for_each_item(a.parallel, items, a.rows * a.width * a.outputs, [&](int64_t item) {
    const int64_t end = (item + 1) * block < a.outputs ? (item + 1) * block : a.outputs;
    for (int64_t o = item * block; o < end; ++o) {
      const E* w = static_cast<const E*>(a.weight.data) + o * a.weight.stride[0];
      S bias = 0, out[4];
      if (a.bias) load_row(a.bias, o * a.bias.stride[0], 0, 1, &bias);
      // More rows than four take the weights from the cache again.
      for (int64_t first = 0; first < a.rows; first += 4)
        with_rows(a.rows - first, [&](auto rows) {
          products<rows()>(w, x + first * pitch, a.width, pitch, out);
          for (int m = 0; m < rows(); ++m) {
            const S y = out[m] + bias;
            store_row(a.y, (first + m) * a.y.stride[0] + o * a.y.stride[1], 0, 1, &y);
          }
        });
    }
  });
  std::free(x);
}

}  // namespace

void linear(const LinearArgs& a) {
  switch (a.weight.type) {
    case Type::f32: return run<float, float>(a);
    case Type::f64: return run<double, double>(a);
    case Type::bf16: return run<float, BFloat16>(a);
    case Type::f16: return run<float, _Float16>(a);
  }
}

}  // namespace HYBRID_LM_ISA
}  // namespace hybrid_lm
