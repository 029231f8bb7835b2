// Products of small matrices that lie in scratch memory, tile by tile: TILE_ROWS rows and one or two vectors of
// columns, whose sums stay in registers from the first step to whatever the caller does with them.
#pragma once

#include "cpu/arena.h"
#include "cpu/rows.h"

namespace hybrid_lm {
namespace HYBRID_LM_ISA {

// A function with a product in it is compiled alone, or the registers that its tiles need go to what is around it.
#define HYBRID_LM_OUTLINE __attribute__((noinline))

// With two vectors of columns a tile fills half of the registers, 32 of AVX-512 or 16, and there are as many
// independent sums as two units of latency four need.
constexpr int TILE_ROWS = VECTOR_BYTES == 64 ? 8 : 4;

// Sizes are padded to whole vectors and whole tiles, by zeros, so that no product has a tail.
template <class S>
constexpr int64_t PADDING = Lanes<S>::COUNT > TILE_ROWS ? Lanes<S>::COUNT : TILE_ROWS;

template <class S>
constexpr int64_t padded(int64_t count) {
  return (count + PADDING<S> - 1) / PADDING<S> * PADDING<S>;
}

// A matrix in scratch memory. Its rows are an odd number of cache lines apart: a panel of columns then spreads over
// all sets of the first cache, where a power of two would crowd it into a few.
template <class S>
struct Matrix {
  S* data;
  int64_t pitch;

  HYBRID_LM_FN S* row(int64_t i) const { return data + i * pitch; }
  static int64_t pitch_of(int64_t columns) {
    constexpr int64_t line = 64 / sizeof(S);
    return ((columns + line - 1) / line | 1) * line;
  }
};

// An arena for matrices as well.
struct MatrixArena : Arena {
  template <class S>
  Matrix<S> matrix(int64_t rows, int64_t columns) {
    int64_t pitch = Matrix<S>::pitch_of(columns);
    return {take<S>(rows * pitch), pitch};
  }
};

// Stores a vector past the caches, for what is not read again soon; `end_stream` lets other threads see it.
#if defined(__AVX512F__)
HYBRID_LM_FN void stream(float* to, Vec<float> v) { _mm512_stream_ps(to, v); }
HYBRID_LM_FN void stream(double* to, Vec<double> v) { _mm512_stream_pd(to, v); }
HYBRID_LM_FN void end_stream() { _mm_sfence(); }
#else
template <class S>
HYBRID_LM_FN void stream(S* to, Vec<S> v) {
  Lanes<S>::store(to, v);
}
HYBRID_LM_FN void end_stream() {}
#endif

template <class S, int VECS>
struct Tile {
  using L = Lanes<S>;
  using V = typename L::V;
  static constexpr int COLUMNS = VECS * L::COUNT;

  int64_t row, column;
  V sum[TILE_ROWS][VECS];

  HYBRID_LM_FN Tile(int64_t row, int64_t column) : row(row), column(column) {
    for (int r = 0; r < TILE_ROWS; ++r)
      for (int v = 0; v < VECS; ++v) sum[r][v] = V{};
  }

  // sum(r, c) += sum over k of left(row + r, k) right(k, column + c), k from `first` to before `last`; element (r, k)
  // of the left matrix is left[r * row_step + k * k_step], so that either of its axes may be the contiguous one.
  HYBRID_LM_FN void add(const S* left, int64_t row_step, int64_t k_step, Matrix<S> right, int64_t first,
                        int64_t last) {
    const S *l = left + row * row_step + first * k_step, *b = right.row(first) + column;
    for (int64_t k = first; k < last; ++k, l += k_step, b += right.pitch) {
      V columns[VECS];
      for (int v = 0; v < VECS; ++v) columns[v] = L::load(b + v * L::COUNT);
      for (int r = 0; r < TILE_ROWS; ++r) {
        V one = L::broadcast(l[r * row_step]);
        for (int v = 0; v < VECS; ++v) sum[r][v] += one * columns[v];
      }
    }
    // The compiler forgets what it knows of `row`: it would keep the addresses of all rows that are used before and
    // after the sums, in registers that these need.
    asm("" : "+r"(row));
  }
  HYBRID_LM_FN void add(Matrix<S> left, Matrix<S> right, int64_t first, int64_t last) {
    add(left.data, left.pitch, 1, right, first, last);
  }
  HYBRID_LM_FN void add_transposed(Matrix<S> left, Matrix<S> right, int64_t first, int64_t last) {
    add(left.data, 1, left.pitch, right, first, last);
  }
  // The steps from `row` to before row + TILE_ROWS of a triangular left matrix, its other half left out: what stands
  // on the right of a zero may be a NaN.
  template <bool LOWER>
  HYBRID_LM_FN void add_diagonal(const S* left, int64_t row_step, int64_t k_step, Matrix<S> right) {
    const S* l = left + row * (row_step + k_step);
#pragma GCC unroll 8
    for (int k = 0; k < TILE_ROWS; ++k)
#pragma GCC unroll 8
      for (int r = LOWER ? k : 0; r < (LOWER ? TILE_ROWS : k + 1); ++r) {
        V one = L::broadcast(l[r * row_step + k * k_step]);
        for (int v = 0; v < VECS; ++v) sum[r][v] += one * L::load(right.row(row + k) + column + v * L::COUNT);
      }
  }

  // f(sum, r, c) for every vector: r and c count from the matrix's first row and column.
  template <class F>
  HYBRID_LM_FN void for_each(const F& f) {
    for (int r = 0; r < TILE_ROWS; ++r)
      for (int v = 0; v < VECS; ++v) f(sum[r][v], row + r, column + v * L::COUNT);
  }
  HYBRID_LM_FN void scale_rows(const S* factors) {
    for_each([&](V& s, int64_t r, int64_t) { s *= factors[r]; });
  }
  HYBRID_LM_FN void store(Matrix<S> to) {
    for_each([&](V& s, int64_t r, int64_t c) { L::store(to.row(r) + c, s); });
  }
  HYBRID_LM_FN void stream(Matrix<S> to) {
    for_each([&](V& s, int64_t r, int64_t c) { hybrid_lm::HYBRID_LM_ISA::stream(to.row(r) + c, s); });
  }
};

// How many tiles for_each_tile goes through.
template <class S>
constexpr int64_t tiles_of(int64_t rows, int64_t columns) {
  constexpr int64_t width = 2 * Lanes<S>::COUNT;
  return (rows / TILE_ROWS) * ((columns + width - 1) / width);
}

// f(tile) for all tiles of a matrix, a panel of columns after the other: the right factor's panel stays in the first
// cache while the rows pass by. Rows and columns are padded sizes.
template <class S, class F>
HYBRID_LM_FN void for_each_tile(int64_t rows, int64_t columns, const F& f) {
  constexpr int64_t one = Lanes<S>::COUNT;
  for (int64_t c = 0; c < columns; c += 2 * one)
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
      if (c + one < columns)
        f(Tile<S, 2>(r, c));
      else
        f(Tile<S, 1>(r, c));
    }
}

// f(tile) for the tiles of a square matrix that hold anything on or right of the diagonal.
template <class S, class F>
HYBRID_LM_FN void for_each_upper_tile(int64_t size, const F& f) {
  constexpr int64_t one = Lanes<S>::COUNT;
  for (int64_t c = 0; c < size; c += 2 * one)
    for (int64_t r = 0; r < size && r < c + 2 * one; r += TILE_ROWS) {
      if (c + one >= size)
        f(Tile<S, 1>(r, c));
      else if (r >= c + one)
        f(Tile<S, 1>(r, c + one));
      else
        f(Tile<S, 2>(r, c));
    }
}

// Row by row `from`, times a factor each.
template <class S>
inline void scale_rows(Matrix<S> from, const S* factors, int64_t rows, int64_t columns, Matrix<S> to) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += Lanes<S>::COUNT)
      Lanes<S>::store(to.row(r) + c, Lanes<S>::load(from.row(r) + c) * factors[r]);
}

// Lanes of two vectors, of which the first has the indices 0 to COUNT - 1.
template <class V, class I>
HYBRID_LM_FN V shuffled(V a, V b, I index) {
#if defined(__clang__)
  // Unrolled, the compiler sees one shuffle in it.
  constexpr int count = sizeof(I) / sizeof(index[0]);
  V out{};
#pragma clang loop unroll(full)
  for (int l = 0; l < count; ++l) out[l] = index[l] < count ? a[index[l]] : b[index[l] - count];
  return out;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// COUNT rows of a vector each become columns. Halves change places: first between rows COUNT / 2 apart, then between
// rows half as far apart, down to neighbours.
template <class S>
HYBRID_LM_FN void transpose(Vec<S> (&rows)[Lanes<S>::COUNT]) {
  constexpr int count = Lanes<S>::COUNT;
  using Index = Vec<std::conditional_t<sizeof(S) == 4, int32_t, int64_t>>;
#pragma GCC unroll 5
  for (int apart = count / 2; apart > 0; apart /= 2) {
    Index upper{}, lower{};
#pragma GCC unroll 16
    for (int l = 0; l < count; ++l) {
      upper[l] = l & apart ? count + l - apart : l;
      lower[l] = l & apart ? count + l : l + apart;
    }
#pragma GCC unroll 16
    for (int r = 0; r < count; ++r)
      if (!(r & apart)) {
        Vec<S> a = rows[r], b = rows[r + apart];
        rows[r] = shuffled(a, b, upper);
        rows[r + apart] = shuffled(a, b, lower);
      }
  }
}

// The sum over the lanes of each of COUNT vectors.
template <class S>
HYBRID_LM_FN Vec<S> lane_sums(const S* from) {
  constexpr int count = Lanes<S>::COUNT;
  Vec<S> rows[count];
  for (int r = 0; r < count; ++r) rows[r] = Lanes<S>::load(from + r * count);
  transpose<S>(rows);
  for (int half = count / 2; half > 0; half /= 2)
    for (int r = 0; r < half; ++r) rows[r] += rows[r + half];
  return rows[0];
}

// The transpose of a matrix of padded sizes.
template <class S>
inline void transpose(Matrix<S> from, int64_t rows, int64_t columns, Matrix<S> to) {
  using L = Lanes<S>;
  for (int64_t r = 0; r < rows; r += L::COUNT)
    for (int64_t c = 0; c < columns; c += L::COUNT) {
      Vec<S> block[L::COUNT];
      for (int i = 0; i < L::COUNT; ++i) block[i] = L::load(from.row(r + i) + c);
      transpose<S>(block);
      for (int i = 0; i < L::COUNT; ++i) L::store(to.row(c + i) + r, block[i]);
    }
}

}  // namespace HYBRID_LM_ISA
}  // namespace hybrid_lm
