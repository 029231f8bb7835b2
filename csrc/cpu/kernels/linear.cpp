// y = x W^T + b for few rows of x, as in decoding: every weight is read once, so what counts is reading them at the
// speed of memory. For many rows a matrix product of a BLAS is right.
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

// The products of R rows of weights, w[0] ... w[R - 1] (width), with M rows of x, `pitch` apart: out[r * M + m].
template <int R, int M, class S, class E>
HYBRID_LM_FN void products(const E* const* w, const S* x, int64_t width, int64_t pitch, S* out) {
  using L = Lanes<S>;
  // Elements of a row that are asked for ahead of time.
  constexpr int64_t AHEAD = 4096 / sizeof(E);
  Vec<S> sum[R][M] = {};
  int64_t i = 0;
  for (; i + L::COUNT <= width; i += L::COUNT) {
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(w[r] + i + AHEAD, 0, 2);
      const Vec<S> v = weights<S>(w[r] + i);
      for (int m = 0; m < M; ++m) sum[r][m] += v * L::load(x + m * pitch + i);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) {
      S y = L::sum(sum[r][m]);
      for (int64_t k = i; k < width; ++k) y += widened<E, S>(w[r][k]) * x[m * pitch + k];
      out[r * M + m] = y;
    }
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
struct Linear {
  const LinearArgs& a;
  const S* x;  // packed, `pitch` from row to row
  int64_t pitch;

  // Outputs first, first + apart, ... (R of them) for all rows of x, four at a time: more take the weights from the
  // cache again.
  template <int R>
  void outputs(int64_t first, int64_t apart) const {
    const E* w[R];
    for (int r = 0; r < R; ++r) w[r] = static_cast<const E*>(a.weight.data) + (first + r * apart) * a.weight.stride[0];
    for (int64_t from = 0; from < a.rows; from += 4)
      with_rows(a.rows - from, [&](auto rows) {
        constexpr int M = rows();
        S out[R * M];
        products<R, M>(w, x + from * pitch, a.width, pitch, out);
        for (int r = 0; r < R; ++r) {
          const int64_t o = first + r * apart;
          S bias = 0;
          if (a.bias) load_row(a.bias, o * a.bias.stride[0], 0, 1, &bias);
          for (int m = 0; m < M; ++m) {
            const S y = out[r * M + m] + bias;
            store_row(a.y, (from + m) * a.y.stride[0] + o * a.y.stride[1], 0, 1, &y);
          }
        }
      });
  }

  // Four streams through memory, each a quarter of the item's rows of weights: more requests are under way at a time.
  void item(int64_t begin, int64_t end) const {
    const int64_t quarter = (end - begin) / 4;
    for (int64_t o = begin; o < begin + quarter; ++o) outputs<4>(o, quarter);
    for (int64_t o = begin + 4 * quarter; o < end; ++o) outputs<1>(o, 0);
  }
};

template <class S, class E>
void run(const LinearArgs& a) {
  const int64_t pitch = (a.width + 15) / 16 * 16;
  S* x = static_cast<S*>(std::malloc(a.rows * pitch * sizeof(S)));
  for (int64_t m = 0; m < a.rows; ++m) load_row(a.x, m * a.x.stride[0], a.x.stride[1], a.width, x + m * pitch);
  const Linear<S, E> work{a, x, pitch};
  // A megabyte of weights in a work item.
  const int64_t fitting = (int64_t(1) << 20) / (a.width * int64_t(sizeof(E)) + 1);
  const int64_t block = fitting > 16 ? fitting : 16, items = (a.outputs + block - 1) / block;
  for_each_item(a.parallel, items, a.rows * a.width * a.outputs, [&](int64_t i) {
    work.item(i * block, (i + 1) * block < a.outputs ? (i + 1) * block : a.outputs);
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
