// What the forward and the backward pass of SSD share: how the work is cut, and what one chunk of tokens and one head
// bring along. Dao & Gu 2024, arXiv:2405.21060, section 6; hybrid_lm/ops/ssd_torch.py has the same formulas in PyTorch.
//
// Inside a chunk (i, j its tokens, S the state before it, s_i the logarithm of the decay from the start to token i):
//     y_i = sum over j <= i of (C_i . B_j) exp(s_i - s_j) dt_j x_j  +  exp(s_i) S C_i  +  D x_i
//     S' = exp(s_last) S + sum over j of exp(s_last - s_j) dt_j x_j B_j^T
// A document that starts inside a chunk starts a new segment: no product reaches from one segment into another, so
// that not even a NaN does. States are held as (n p), and pairs of tokens as [j][i]: then the axis of the
// vectors is the contiguous one in all products, and only x, gy, B and C are ever transposed.
#pragma once

#include "cpu/kernels.h"
#include "cpu/kernels/gemm.h"

namespace hybrid_lm {
namespace HYBRID_LM_ISA {

// A work item is some heads of one group in one row of the batch: they share C.B^T.
struct SsdItem {
  int64_t batch, group, head, heads;  // heads: how many from `head` on
};

struct SsdItems {
  int64_t heads_per_group, heads_per_item, items_per_group, groups, count;

  // As many heads as share one C.B^T, but at most 8, whose states stay in the second cache, and few enough for 8
  // items: the shape alone decides, and so the sums over items are the same on any number of threads.
  explicit SsdItems(const SsdArgs& a) : heads_per_group(a.heads / a.groups), groups(a.groups) {
    int64_t size = heads_per_group < 8 ? heads_per_group : 8;
    while (size > 1 && a.batch * groups * pieces(size) < 8) --size;
    items_per_group = pieces(size);
    heads_per_item = (heads_per_group + items_per_group - 1) / items_per_group;
    items_per_group = pieces(heads_per_item);
    count = a.batch * groups * items_per_group;
  }
  int64_t pieces(int64_t size) const { return (heads_per_group + size - 1) / size; }

  SsdItem operator[](int64_t i) const {
    int64_t piece = i % items_per_group, group = i / items_per_group % groups;
    int64_t first = piece * heads_per_item, left = heads_per_group - first;
    return {i / items_per_group / groups, group, group * heads_per_group + first,
            left < heads_per_item ? left : heads_per_item};
  }
};

// The padded sizes of a head's matrices.
template <class S>
struct SsdSizes {
  int64_t tokens, head_dim, states, heads_per_group;

  explicit SsdSizes(const SsdArgs& a)
      : tokens(padded<S>(a.tokens < SSD_CHUNK ? a.tokens : SSD_CHUNK)),
        head_dim(padded<S>(a.head_dim)),
        states(padded<S>(a.states)),
        heads_per_group(a.heads / a.groups) {}
};

// Tokens of one chunk and one document.
struct Segment {
  int64_t start, count;
  bool enters;  // a state stands before it and reaches it
  bool leaves;  // it ends with its chunk: its state goes on
};

inline bool resets(const SsdArgs& a, int64_t batch, int64_t t) {
  return a.reset && static_cast<const uint8_t*>(a.reset.data)[batch * a.reset.stride[0] + t * a.reset.stride[1]];
}

// The segments of chunk k; returns their number.
inline int64_t segments_of(const SsdArgs& a, int64_t batch, int64_t k, Segment* out) {
  const int64_t start = k * SSD_CHUNK, stop = start + SSD_CHUNK < a.tokens ? start + SSD_CHUNK : a.tokens;
  int64_t count = 0;
  for (int64_t t = start; t < stop; ++t) {
    const bool fresh = resets(a, batch, t);
    if (t == start || fresh) out[count++] = {t, 0, !fresh && (t > 0 || a.initial), false};
    ++out[count - 1].count;
  }
  out[count - 1].leaves = true;
  return count;
}

// What a work item reads next: the tokens of another head.
struct Ahead {
  Segment tokens;
  int64_t head;
};

inline int64_t chunks_of(const SsdArgs& a) { return (a.tokens + SSD_CHUNK - 1) / SSD_CHUNK; }

// Calls of at most so many tokens take the recurrence itself.
constexpr int64_t SSD_STEPS = 8;
void ssd_steps(const SsdArgs&);

// An element of a vector.
template <class S>
inline S value(const View& v, int64_t index, S absent) {
  if (v) load_row(v, index * v.stride[0], 1, 1, &absent);
  return absent;
}

template <class S>
inline void store_value(const View& v, int64_t index, S value) {
  if (v) store_row(v, index * v.stride[0], 1, 1, &value);
}

// Tokens of a (b t k m) tensor as rows of a matrix, zeros up to the padded sizes.
template <class S>
inline void load_tokens(const View& v, int64_t batch, const Segment& g, int64_t k, int64_t count, int64_t rows,
                        int64_t columns, Matrix<S> to) {
  for (int64_t t = 0; t < rows; ++t) {
    S* row = to.row(t);
    int64_t filled = v && t < g.count ? count : 0;
    int64_t offset = batch * v.stride[0] + (g.start + t) * v.stride[1] + k * v.stride[2];
    if (filled) load_row(v, offset, v.stride[3], count, row);
    for (int64_t c = filled; c < columns; ++c) row[c] = 0;
  }
}

template <class S>
inline void store_tokens(const View& v, int64_t batch, const Segment& g, int64_t k, int64_t count, Matrix<S> from) {
  for (int64_t t = 0; t < g.count; ++t) {
    int64_t offset = batch * v.stride[0] + (g.start + t) * v.stride[1] + k * v.stride[2];
    store_row(v, offset, v.stride[3], count, from.row(t));
  }
}

inline int64_t bytes_of(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

// Asks for cache lines ahead of time, a part of them at every `next`, which is called `calls` times. Rows lie in
// different pages, where the processor's own prefetching stops; between two tiles a few requests cost little.
template <bool WRITE = false>
class Prefetch {
 public:
  Prefetch(const void* data, int64_t bytes, int64_t calls)
      : at(static_cast<const char*>(data)), width((bytes + 63) / 64), left(width), rows(data ? 1 : 0) {
    set_rate(calls);
  }
  // The tokens of a (b t k m) tensor.
  Prefetch(const View& v, int64_t batch, const Segment& g, int64_t k, int64_t count, int64_t calls) {
    if (!v) return;
    const int64_t size = bytes_of(v.type);
    at = static_cast<const char*>(v.data) + (batch * v.stride[0] + g.start * v.stride[1] + k * v.stride[2]) * size;
    width = left = (count * v.stride[3] * size + 63) / 64;
    row_step = v.stride[1] * size;
    rows = g.count;
    set_rate(calls);
  }

  HYBRID_LM_FN void next() {
    for (int64_t i = 0; i < rate && rows > 0; ++i) {
      __builtin_prefetch(at + (width - left) * 64, WRITE, 2);
      if (--left > 0) continue;
      left = width, at += row_step, --rows;
    }
  }

 private:
  void set_rate(int64_t calls) { rate = width > 0 && calls > 0 ? (width * rows + calls - 1) / calls : 0; }

  const char* at = nullptr;
  int64_t width = 0, left = 0, rows = 0, row_step = 0, rate = 0;  // width: lines of a row; left: of this one
};

template <class S>
inline void fill(Matrix<S> m, int64_t rows, int64_t columns, S with) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) m.row(r)[c] = with;
}

// A head's state (p n) of a (b h p n) tensor, as (n p); `space` holds (p n).
template <class S>
inline void load_state(const View& v, int64_t batch, int64_t head, const SsdArgs& a, Matrix<S> space,
                       Matrix<S> to) {
  const SsdSizes<S> size(a);
  if (!v) return fill(to, size.states, size.head_dim, S(0));
  fill(space, size.head_dim, size.states, S(0));
  int64_t offset = batch * v.stride[0] + head * v.stride[1];
  for (int64_t p = 0; p < a.head_dim; ++p)
    load_row(v, offset + p * v.stride[2], v.stride[3], a.states, space.row(p));
  transpose(space, size.head_dim, size.states, to);
}

template <class S>
inline void store_state(const View& v, int64_t batch, int64_t head, const SsdArgs& a, Matrix<S> space,
                        Matrix<S> from) {
  const SsdSizes<S> size(a);
  if (!v) return;
  transpose(from, size.states, size.head_dim, space);
  int64_t offset = batch * v.stride[0] + head * v.stride[1];
  for (int64_t p = 0; p < a.head_dim; ++p)
    store_row(v, offset + p * v.stride[2], v.stride[3], a.states, space.row(p));
}

// Where `before` keeps the state of a head before chunk k, as (n p) without padding.
template <class S>
inline S* kept_state(const SsdArgs& a, int64_t batch, int64_t head, int64_t k) {
  return static_cast<S*>(a.before.data) + ((k * a.batch + batch) * a.heads + head) * a.states * a.head_dim;
}

// Whether a kept state can be used as a matrix where it lies: it has no padding and whole vectors start its rows.
template <class S>
inline bool keeps_vectors(const SsdArgs& a) {
  const bool unpadded = a.head_dim == padded<S>(a.head_dim) && a.states == padded<S>(a.states);
  return unpadded && reinterpret_cast<uintptr_t>(a.before.data) % VECTOR_BYTES == 0;
}

// The steps of one head in one segment.
template <class S>
struct Steps {
  using L = Lanes<S>;
  using V = typename L::V;

  alignas(64) S dt[SSD_CHUNK];
  alignas(64) S slope[SSD_CHUNK];  // d dt / d raw dt
  // s in powers of two, as the sum of two numbers: the difference of two long sums keeps the precision of the short
  // sum that it stands for.
  alignas(64) S high[SSD_CHUNK], low[SSD_CHUNK];
  alignas(64) S from_start[SSD_CHUNK];  // decay from the state before the segment to each token
  alignas(64) S to_end[SSD_CHUNK];      // decay from each token to the segment's end
  alignas(64) S weight[SSD_CHUNK];      // to_end * dt

  void load_dt(const SsdArgs& a, int64_t batch, int64_t head, const Segment& g, int64_t tokens);
  void load(const SsdArgs& a, int64_t batch, int64_t head, const Segment& g, int64_t tokens);

  // The decay of the whole segment.
  S whole(const Segment& g) const { return from_start[g.count - 1]; }

  // The decays from token j to the tokens from i on; right for those >= j.
  HYBRID_LM_FN V decay(int64_t j, int64_t i) const {
    return L::exp2((L::load(high + i) - high[j]) + (L::load(low + i) - low[j]));
  }
  // The numbers of the tokens from i on, as S, to be compared with others.
  static HYBRID_LM_FN V numbers(int64_t i) {
    V v{};
    for (int l = 0; l < L::COUNT; ++l) v[l] = S(l);
    return v + S(i);
  }
};

template <class S>
inline void Steps<S>::load_dt(const SsdArgs& a, int64_t batch, int64_t head, const Segment& g, int64_t tokens) {
  const int64_t offset = batch * a.dt.stride[0] + g.start * a.dt.stride[1] + head * a.dt.stride[2];
  load_row(a.dt, offset, a.dt.stride[1], g.count, dt);
  for (int64_t i = g.count; i < tokens; ++i) dt[i] = 0;
  const S bias = value(a.dt_bias, head, S(0));
  const V lowest = L::broadcast(S(a.dt_low)), highest = L::broadcast(S(a.dt_high));
  for (int64_t i = 0; i < tokens; i += L::COUNT) {
    V raw = L::load(dt + i) + bias;
    V v = a.dt_softplus ? softplus<L>(raw) : raw;
    V rise = a.dt_softplus ? sigmoid<L>(raw) : L::broadcast(1);
    L::store(slope + i, L::select(v >= lowest, L::select(v <= highest, rise, V{}), V{}));
    // A NaN fails every comparison and stays.
    v = L::select(v < lowest, lowest, v);
    L::store(dt + i, L::select(v > highest, highest, v));
  }
  for (int64_t i = g.count; i < tokens; ++i) dt[i] = 0;
}

template <class S>
inline void Steps<S>::load(const SsdArgs& a, int64_t batch, int64_t head, const Segment& g, int64_t tokens) {
  // 2 to this power is 0 even in float64: nothing is lost, and no long sum drowns the short ones behind it.
  constexpr double least = -4096;
  load_dt(a, batch, head, g, tokens);
  const double rate = value(a.A, head, S(0)) * LOG2E;
  double s = 0;
  for (int64_t i = 0; i < tokens; ++i) {
    double step = dt[i] * rate;
    // Nothing stands before the first token, so its decay has no part in anything. Behind the last one the step is
    // 0, but not its product with an infinite rate.
    if (i < g.count && (i > 0 || g.enters)) s += step < least ? least : step;
    high[i] = S(s);
    low[i] = S(s - high[i]);
  }
  for (int64_t i = 0; i < tokens; i += L::COUNT) {
    V s = L::load(high + i), rest = L::load(low + i);
    L::store(from_start + i, L::exp2(s));
    const V remains = L::exp2((high[g.count - 1] - s) + (low[g.count - 1] - rest));
    L::store(to_end + i, remains);
    L::store(weight + i, remains * L::load(dt + i));
  }
}

// CBt = B Ct where j <= i, tile by tile.
template <class S>
HYBRID_LM_OUTLINE void multiply_causal(Matrix<S> B, Matrix<S> Ct, int64_t tokens, int64_t states, Matrix<S> CBt) {
  for_each_upper_tile<S>(tokens, [&](auto tile) {
    tile.add(B, Ct, 0, states);
    tile.store(CBt);
  });
}

// What all heads of an item share in a segment.
template <class S>
struct SsdShared {
  Matrix<S> B, C;    // [token][n]
  Matrix<S> Ct;      // [n][token]
  Matrix<S> CBt;     // [j][i], j <= i: C_i . B_j

  SsdShared(MatrixArena& m, const SsdSizes<S>& size)
      : B(m.matrix<S>(size.tokens, size.states)),
        C(m.matrix<S>(size.tokens, size.states)),
        Ct(m.matrix<S>(size.states, size.tokens)),
        CBt(m.matrix<S>(size.tokens, size.tokens)) {}

  void load(const SsdArgs& a, int64_t batch, int64_t group, const Segment& g, int64_t tokens) const {
    const int64_t states = padded<S>(a.states);
    load_tokens(a.B, batch, g, group, a.states, tokens, states, B);
    load_tokens(a.C, batch, g, group, a.states, tokens, states, C);
    transpose(C, tokens, states, Ct);
    multiply_causal(B, Ct, tokens, states, CBt);
  }
};

}  // namespace HYBRID_LM_ISA
}  // namespace hybrid_lm
