// SSD, forward: chunk by chunk, every head's state in the second cache.
#include "cpu/kernels/ssd.h"

namespace hybrid_lm {
namespace HYBRID_LM_ISA {
namespace {

template <class S>
struct Workspace {
  SsdShared<S> shared;
  Matrix<S> x, x_end;  // [token][p]; x_end_j = exp(s_last - s_j) dt_j x_j
  Matrix<S> Mt;        // [j][i]: what x_j weighs in y_i
  Matrix<S> y;         // [token][p]
  Matrix<S> flat;      // [p][n], a state on its way in or out
  Matrix<S> states;    // [head][n][p]

  Workspace(MatrixArena& m, const SsdSizes<S>& size, int64_t heads)
      : shared(m, size),
        x(m.matrix<S>(size.tokens, size.head_dim)),
        x_end(m.matrix<S>(size.tokens, size.head_dim)),
        Mt(m.matrix<S>(size.tokens, size.tokens)),
        y(m.matrix<S>(size.tokens, size.head_dim)),
        flat(m.matrix<S>(size.head_dim, size.states)),
        states(m.matrix<S>(heads * size.states, size.head_dim)) {}
};

// After a head comes the next head, after the last one the first head of the next chunk.
inline Ahead ahead(const SsdArgs& a, const SsdItem& item, int64_t head, const Segment& g) {
  if (head + 1 < item.head + item.heads) return {g, head + 1};
  const int64_t start = g.start + g.count, left = a.tokens - start;
  return {{start, left < SSD_CHUNK ? left : SSD_CHUNK, true, true}, item.head};
}

template <class S>
void keep_state(const SsdArgs& a, int64_t batch, int64_t head, int64_t k, Matrix<S> state) {
  S* kept = kept_state<S>(a, batch, head, k);
  for (int64_t n = 0; n < a.states; ++n) std::memcpy(kept + n * a.head_dim, state.row(n), a.head_dim * sizeof(S));
}

// One head in one segment of chunk k.
template <class S>
struct Head {
  using L = Lanes<S>;
  using V = typename L::V;

  const SsdArgs& a;
  const Workspace<S>& w;
  const SsdItem& item;
  const int64_t head, k;
  const Segment g;
  const Matrix<S> state;
  const SsdSizes<S> size;
  const int64_t tokens;
  const Ahead next;
  Steps<S> steps;

  Head(const SsdArgs& a, const Workspace<S>& w, const SsdItem& item, int64_t head, int64_t k, const Segment& g,
       Matrix<S> state)
      : a(a), w(w), item(item), head(head), k(k), g(g), state(state), size(a), tokens(padded<S>(g.count)),
        next(ahead(a, item, head, g)) {}

  void mix();
  void find_y();
  void update_state();
  void run();
};

// M_ij = (C_i . B_j) exp(s_i - s_j) dt_j for j <= i, and D on the diagonal.
template <class S>
void Head<S>::mix() {
  const S D = value(a.D, head, S(0));
  for (int64_t j = 0; j < tokens; ++j) {
    for (int64_t i = j / PADDING<S> * PADDING<S>; i < tokens; i += L::COUNT)
      L::store(w.Mt.row(j) + i, L::load(w.shared.CBt.row(j) + i) * steps.decay(j, i) * steps.dt[j]);
    w.Mt.row(j)[j] += D;
  }
}

template <class S>
HYBRID_LM_OUTLINE void Head<S>::find_y() {
  const int64_t calls = tiles_of<S>(tokens, size.head_dim);
  // With the first head comes another B and C.
  const int64_t shared_calls = next.head == item.head ? calls : 0;
  Prefetch<> B(a.B, item.batch, next.tokens, item.group, a.states, shared_calls);
  Prefetch<> C(a.C, item.batch, next.tokens, item.group, a.states, shared_calls);
  Prefetch<true> y(a.y, item.batch, g, head, a.head_dim, calls);
  for_each_tile<S>(tokens, size.head_dim, [&](auto tile) {
    y.next(), B.next(), C.next();
    if (g.enters) {
      tile.add(w.shared.C, state, 0, size.states);
      tile.scale_rows(steps.from_start);
    }
    tile.add_transposed(w.Mt, w.x, 0, tile.row);
    tile.template add_diagonal<true>(w.Mt.data, 1, w.Mt.pitch, w.x);
    tile.store(w.y);
  });
}

// The state after the segment, also to where the backward pass will look for it.
template <class S>
HYBRID_LM_OUTLINE void Head<S>::update_state() {
  scale_rows(w.x, steps.weight, tokens, size.head_dim, w.x_end);
  const S whole = steps.whole(g);
  const bool keeps = a.before && g.start + g.count < a.tokens, vectors = keeps_vectors<S>(a);
  const Matrix<S> kept{keeps ? kept_state<S>(a, item.batch, head, k + 1) : nullptr, a.head_dim};
  Prefetch<> x(a.x, item.batch, next.tokens, next.head, a.head_dim, tiles_of<S>(size.states, size.head_dim));
  for_each_tile<S>(size.states, size.head_dim, [&](auto tile) {
    x.next();
    if (g.enters) tile.for_each([&](V& s, int64_t n, int64_t p) { s = whole * L::load(state.row(n) + p); });
    tile.add_transposed(w.shared.B, w.x_end, 0, tokens);
    tile.store(state);
    // Between two tiles the way to memory is free; a copy of the whole would wait for it.
    if (keeps && vectors) tile.stream(kept);
  });
  if (keeps && !vectors) keep_state(a, item.batch, head, k + 1, state);
}

template <class S>
void Head<S>::run() {
  steps.load(a, item.batch, head, g, tokens);
  load_tokens(a.x, item.batch, g, head, a.head_dim, tokens, size.head_dim, w.x);
  mix();
  find_y();
  if (g.leaves) update_state();
  store_tokens(a.y, item.batch, g, head, a.head_dim, w.y);
}

template <class S>
void run_item(const SsdArgs& a, const SsdItem& item, const Workspace<S>& w) {
  const SsdSizes<S> size(a);
  auto state = [&](int64_t h) { return Matrix<S>{w.states.row((h - item.head) * size.states), w.states.pitch}; };
  for (int64_t h = item.head; h < item.head + item.heads; ++h) {
    load_state(a.initial, item.batch, h, a, w.flat, state(h));
    if (a.before && a.tokens > 0) keep_state(a, item.batch, h, 0, state(h));
  }
  for (int64_t k = 0; k < chunks_of(a); ++k) {
    Segment segments[SSD_CHUNK];
    const int64_t count = segments_of(a, item.batch, k, segments);
    for (int64_t s = 0; s < count; ++s) {
      w.shared.load(a, item.batch, item.group, segments[s], padded<S>(segments[s].count));
      for (int64_t h = item.head; h < item.head + item.heads; ++h)
        Head<S>(a, w, item, h, k, segments[s], state(h)).run();
    }
  }
  for (int64_t h = item.head; h < item.head + item.heads; ++h) store_state(a.state, item.batch, h, a, w.flat, state(h));
  end_stream();
}

template <class S>
void run(const SsdArgs& a) {
  const SsdItems items(a);
  const SsdSizes<S> size(a);
  MatrixArena count;
  Workspace<S>(count, size, items.heads_per_item);
  const int64_t operations = a.batch * a.tokens * a.heads * size.head_dim * (4 * size.states + size.tokens);
  for_each_item(a.parallel, items.count, operations, [&](int64_t i) {
    MatrixArena arena{static_cast<char*>(scratch(count.bytes))};
    run_item(a, items[i], Workspace<S>(arena, size, items.heads_per_item));
  });
}

}  // namespace

void ssd(const SsdArgs& a) {
  if (a.tokens <= SSD_STEPS && !a.before) return ssd_steps(a);
  if (a.x.type == Type::f64) return run<double>(a);
  run<float>(a);
}

}  // namespace HYBRID_LM_ISA
}  // namespace hybrid_lm
