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

  Workspace(Arena& m, const SsdSizes<S>& size, int64_t heads)
      : shared(m, size),
        x(m.matrix<S>(size.tokens, size.head_dim)),
        x_end(m.matrix<S>(size.tokens, size.head_dim)),
        Mt(m.matrix<S>(size.tokens, size.tokens)),
        y(m.matrix<S>(size.tokens, size.head_dim)),
        flat(m.matrix<S>(size.head_dim, size.states)),
        states(m.matrix<S>(heads * size.states, size.head_dim)) {}
};

// M_ij = (C_i . B_j) exp(s_i - s_j) dt_j, and D on the diagonal; 0 above it.
template <class S>
void mix(const SsdShared<S>& shared, const Steps<S>& steps, S D, int64_t tokens, Matrix<S> Mt) {
  using L = Lanes<S>;
  for (int64_t j = 0; j < tokens; ++j) {
    for (int64_t i = j / PADDING<S> * PADDING<S>; i < tokens; i += L::COUNT) {
      auto m = L::load(shared.CBt.row(j) + i) * steps.decay(j, i) * steps.dt[j];
      L::store(Mt.row(j) + i, L::select(Steps<S>::numbers(i) >= S(j), m, L::broadcast(0)));
    }
    Mt.row(j)[j] += D;
  }
}

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
void run_head(const SsdArgs& a, const SsdItem& item, int64_t head, int64_t k, const Segment& g, const Workspace<S>& w,
              Matrix<S> state) {
  const SsdSizes<S> size(a);
  const int64_t tokens = padded<S>(g.count);
  Steps<S> steps;
  steps.load(a, item.batch, head, g, tokens);
  load_tokens(a.x, item.batch, g, head, a.head_dim, tokens, size.head_dim, w.x);
  mix(w.shared, steps, value(a.D, head, S(0)), tokens, w.Mt);
  const Ahead next = ahead(a, item, head, g);
  int64_t calls = tiles_of<S>(tokens, size.head_dim);
  Prefetch<true> y(a.y, item.batch, g, head, a.head_dim, calls);
  // With the first head comes another B and C.
  if (next.head != item.head) calls = 0;
  Prefetch<> B(a.B, item.batch, next.tokens, item.group, a.states, calls);
  Prefetch<> C(a.C, item.batch, next.tokens, item.group, a.states, calls);
  for_each_tile<S>(tokens, size.head_dim, [&](auto tile) {
    y.next(), B.next(), C.next();
    if (g.enters) {
      tile.add(w.shared.C, state, 0, size.states);
      tile.scale_rows(steps.from_start);
    }
    tile.add_transposed(w.Mt, w.x, 0, tile.row + TILE_ROWS);
    tile.store(w.y);
  });
  if (g.leaves) {
    for (int64_t j = 0; j < tokens; ++j) {
      const S weight = steps.to_end[j] * steps.dt[j];
      for (int64_t p = 0; p < size.head_dim; ++p) w.x_end.row(j)[p] = weight * w.x.row(j)[p];
    }
    const S whole = steps.whole(g);
    const bool keeps = a.before && g.start + g.count < a.tokens, vectors = keeps_vectors<S>(a);
    const Matrix<S> kept{keeps ? kept_state<S>(a, item.batch, head, k + 1) : nullptr, a.head_dim};
    Prefetch<> x(a.x, item.batch, next.tokens, next.head, a.head_dim, tiles_of<S>(size.states, size.head_dim));
    for_each_tile<S>(size.states, size.head_dim, [&](auto tile) {
      x.next();
      if (g.enters) tile.for_each([&](auto& s, int64_t n, int64_t p) { s = whole * Lanes<S>::load(state.row(n) + p); });
      tile.add_transposed(w.shared.B, w.x_end, 0, tokens);
      tile.store(state);
      // Between two tiles the way to memory is free; a copy of the whole would wait for it.
      if (keeps && vectors) tile.stream(kept);
    });
    if (keeps && !vectors) keep_state(a, item.batch, head, k + 1, state);
  }
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
      for (int64_t h = item.head; h < item.head + item.heads; ++h) run_head(a, item, h, k, segments[s], w, state(h));
    }
  }
  for (int64_t h = item.head; h < item.head + item.heads; ++h) store_state(a.state, item.batch, h, a, w.flat, state(h));
  end_stream();
}

template <class S>
void run(const SsdArgs& a) {
  const SsdItems items(a);
  const SsdSizes<S> size(a);
  Arena count;
  Workspace<S>(count, size, items.heads_per_item);
  const int64_t operations = a.batch * a.tokens * a.heads * size.head_dim * (4 * size.states + size.tokens);
  for_each_item(a.parallel, items.count, operations, [&](int64_t i) {
    Arena arena{static_cast<char*>(scratch(count.bytes))};
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
