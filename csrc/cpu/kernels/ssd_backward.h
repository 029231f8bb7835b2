// SSD, backward: one head in one chunk, computed again from the state before it.
//
// gy, gS: gradients of y and of the state after the chunk. With x_j instead of dt_j x_j on the right of all products,
//     gX_j  = sum over i >= j of M_ij gy_i + exp(s_last - s_j) gS B_j               gx_j = dt_j gX_j + D gy_j
//     gM_ij = gy_i . x_j                                                  M_ij = (C_i . B_j) exp(s_i - s_j)
//     gC_i  = sum over j of gM_ij L_ij dt_j B_j + exp(s_i) S^T gy_i                 L_ij = exp(s_i - s_j)
//     gB_j  = sum over i of gM_ij L_ij dt_j C_i + exp(s_last - s_j) dt_j gS^T x_j
//     gS'   = exp(s_last) gS + sum over i of exp(s_i) gy_i C_i^T
// s_i enters y_i with plus and what later tokens take from token i with minus. The products with the states that gB
// and gC need give these parts as well: y_i's is C_i . (S^T gy_i).
#pragma once

#include "cpu/kernels/ssd.h"

namespace hybrid_lm {
namespace HYBRID_LM_ISA {

// What the heads of a group ask of B and C in one chunk.
template <class S>
struct GroupSums {
  Matrix<S> gBt, gCt;  // [n][token]: through the states
  Matrix<S> gCBt;      // [j][i]: gradient of C_i . B_j, 0 for j > i

  GroupSums(MatrixArena& m, const SsdSizes<S>& size)
      : gBt(m.matrix<S>(size.states, size.tokens)),
        gCt(m.matrix<S>(size.states, size.tokens)),
        gCBt(m.matrix<S>(size.tokens, size.tokens)) {}

  void clear(int64_t states, int64_t tokens) const {
    fill(gBt, states, tokens, S(0));
    fill(gCt, states, tokens, S(0));
    fill(gCBt, tokens, tokens, S(0));
  }
  // Between a segment, which starts at column 0, and its chunk: f(of the chunk, of the segment, columns) for all rows.
  template <class F>
  void match(const GroupSums& segment, int64_t states, int64_t at, int64_t count, const F& f) const {
    for (int64_t n = 0; n < states; ++n) {
      f(gBt.row(n) + at, segment.gBt.row(n), count);
      f(gCt.row(n) + at, segment.gCt.row(n), count);
    }
    for (int64_t j = 0; j < count; ++j) f(gCBt.row(at + j) + at, segment.gCBt.row(j), count);
  }
};

// Sums over all tokens of one row of the batch and one head.
struct HeadSums {
  double A, D, dt_bias;
};

template <class S>
struct GradWorkspace {
  SsdShared<S> shared;
  Matrix<S> Bt;                   // [n][token]
  Matrix<S> x, gy, gy_start, gx;  // [token][p]; gy_start_i = exp(s_i) gy_i
  Matrix<S> xt, gyt;              // [p][token]
  Matrix<S> Lt, Mt;               // [j][i]
  Matrix<S> state;                // [n][p]
  Matrix<S> flat;                 // [p][n], a state on its way in or out
  GroupSums<S> sums;

  GradWorkspace(MatrixArena& m, const SsdSizes<S>& size)
      : shared(m, size),
        Bt(m.matrix<S>(size.states, size.tokens)),
        x(m.matrix<S>(size.tokens, size.head_dim)),
        gy(m.matrix<S>(size.tokens, size.head_dim)),
        gy_start(m.matrix<S>(size.tokens, size.head_dim)),
        gx(m.matrix<S>(size.tokens, size.head_dim)),
        xt(m.matrix<S>(size.head_dim, size.tokens)),
        gyt(m.matrix<S>(size.head_dim, size.tokens)),
        Lt(m.matrix<S>(size.tokens, size.tokens)),
        Mt(m.matrix<S>(size.tokens, size.tokens)),
        state(m.matrix<S>(size.states, size.head_dim)),
        flat(m.matrix<S>(size.head_dim, size.states)),
        sums(m, size) {}

  // On this thread's scratch memory.
  static GradWorkspace here(const SsdSizes<S>& size) {
    MatrixArena count;
    GradWorkspace(count, size);
    MatrixArena arena{static_cast<char*>(scratch(count.bytes))};
    return GradWorkspace(arena, size);
  }
};

// One head in one segment.
template <class S>
struct HeadGrad {
  using L = Lanes<S>;
  using V = typename L::V;

  const SsdGradArgs& a;
  const GradWorkspace<S>& w;
  const GroupSums<S>& sums;
  const SsdSizes<S> size;
  const int64_t batch, head, chunk;
  const Segment g;
  const bool asked;  // gS is there
  const Ahead next;
  const bool last_head;  // of the item: before the next one comes another B and C
  const int64_t tokens;
  const Matrix<S> gS;
  Matrix<S> state{nullptr, 0};  // the one before the segment, if there is one
  Steps<S> steps;
  alignas(64) S gs[SSD_CHUNK] = {};    // gradient of s_i
  alignas(64) S gdt[SSD_CHUNK] = {};   // gradient of dt_j, without what passes through s
  alignas(64) S by_C[SSD_CHUNK] = {};  // C_i . (S^T gy_i)
  alignas(64) S by_B[SSD_CHUNK] = {};  // B_j . (gS^T x_j)
  S gD = 0, kept = 0;                  // kept: sum of S gS

  HeadGrad(const SsdGradArgs& a, const GradWorkspace<S>& w, const GroupSums<S>& sums, int64_t batch, int64_t head,
           int64_t chunk, const Segment& g, bool asked, const Ahead& next, Matrix<S> gS)
      : a(a), w(w), sums(sums), size(a), batch(batch), head(head), chunk(chunk), g(g), asked(asked), next(next),
        last_head(next.head <= head), tokens(padded<S>(g.count)), gS(gS) {}

  static HYBRID_LM_FN void add_to(S* to, V v) { L::store(to, L::load(to) + v); }

  void load();
  void mix();
  void find_gx();
  void find_pairs();
  void find_state_parts();
  void find_gS();
  void find_gdt(HeadSums& total);
  void run(HeadSums& total);
};

template <class S>
void HeadGrad<S>::load() {
  steps.load(a, batch, head, g, tokens);
  load_tokens(a.x, batch, g, head, a.head_dim, tokens, size.head_dim, w.x);
  load_tokens(a.gy, batch, g, head, a.head_dim, tokens, size.head_dim, w.gy);
  transpose(w.x, tokens, size.head_dim, w.xt);
  transpose(w.gy, tokens, size.head_dim, w.gyt);
  if (!g.enters) return;
  S* kept_here = kept_state<S>(a, batch, head, chunk);
  state = keeps_vectors<S>(a) ? Matrix<S>{kept_here, a.head_dim} : w.state;
  if (state.data == kept_here) return;
  fill(state, size.states, size.head_dim, S(0));
  for (int64_t n = 0; n < a.states; ++n)
    std::memcpy(state.row(n), kept_here + n * a.head_dim, a.head_dim * sizeof(S));
}

// L and M for j <= i.
template <class S>
void HeadGrad<S>::mix() {
  for (int64_t j = 0; j < tokens; ++j)
    for (int64_t i = j / PADDING<S> * PADDING<S>; i < tokens; i += L::COUNT) {
      const V decay = steps.decay(j, i);
      L::store(w.Lt.row(j) + i, decay);
      L::store(w.Mt.row(j) + i, L::load(w.shared.CBt.row(j) + i) * decay);
    }
}

template <class S>
HYBRID_LM_OUTLINE void HeadGrad<S>::find_gx() {
  const S D = value(a.D, head, S(0));
  const int64_t calls = tiles_of<S>(tokens, size.head_dim);
  const int64_t group = head / size.heads_per_group, shared_calls = last_head ? calls : 0;
  Prefetch<> B(a.B, batch, next.tokens, group, a.states, shared_calls);
  Prefetch<> C(a.C, batch, next.tokens, group, a.states, shared_calls);
  Prefetch<> read(state.data, a.states * state.pitch * sizeof(S), calls);
  for_each_tile<S>(tokens, size.head_dim, [&](auto tile) {
    read.next(), B.next(), C.next();
    if (asked) {
      tile.add(w.shared.B, gS, 0, size.states);
      tile.scale_rows(steps.to_end);
    }
    tile.template add_diagonal<false>(w.Mt.data, w.Mt.pitch, 1, w.gy);
    tile.add(w.Mt, w.gy, tile.row + TILE_ROWS, tokens);
    tile.for_each([&](V& s, int64_t j, int64_t p) { s = s * steps.dt[j] + L::load(w.gy.row(j) + p) * D; });
    tile.store(w.gx);
  });
}

// gM, and what it says of C.B^T, the decays, dt and D.
template <class S>
HYBRID_LM_OUTLINE void HeadGrad<S>::find_pairs() {
  // Over i: all that is right of the diagonal, for every lane; and what stands on it, of gM and of gM M.
  alignas(64) S right[SSD_CHUNK * L::COUNT] = {}, on_diagonal[SSD_CHUNK] = {}, mixed_on_diagonal[SSD_CHUNK] = {};
  for_each_upper_tile<S>(tokens, [&](auto tile) {
    tile.add_transposed(w.xt, w.gyt, 0, size.head_dim);
    for (int v = 0; v * L::COUNT < tile.COLUMNS; ++v) {
      const int64_t i = tile.column + v * L::COUNT;
      const bool crosses = i < tile.row + TILE_ROWS;
      V above{}, diagonal{}, mixed_diagonal{};
      for (int r = 0; r < TILE_ROWS; ++r) {
        const int64_t j = tile.row + r;
        const V gM = tile.sum[r][v];
        V gL = gM * L::load(w.Lt.row(j) + i), mixed = gM * L::load(w.Mt.row(j) + i);
        if (crosses) {
          const V number = Steps<S>::numbers(i);
          diagonal += L::select(number == S(j), gM, V{});
          mixed_diagonal += L::select(number == S(j), mixed, V{});
          gL = L::select(number >= S(j), gL, V{});
          mixed = L::select(number > S(j), mixed, V{});
        }
        add_to(sums.gCBt.row(j) + i, gL * steps.dt[j]);
        add_to(right + j * L::COUNT, mixed);
        above += mixed * steps.dt[j];
      }
      add_to(gs + i, above);
      if (crosses) {
        add_to(on_diagonal + i, diagonal);
        add_to(mixed_on_diagonal + i, mixed_diagonal);
      }
    }
  });
  // The diagonal's two parts cancel in gs: they are left out rather than left to rounding.
  V total{};
  for (int64_t j = 0; j < tokens; j += L::COUNT) {
    const V row = lane_sums<S>(right + j * L::COUNT);
    add_to(gs + j, -row * L::load(steps.dt + j));
    L::store(gdt + j, row + L::load(mixed_on_diagonal + j));
    // gM_jj = gy_j . x_j is also what D asks for.
    total += L::load(on_diagonal + j);
  }
  gD = L::sum(total);
}

// T = state^T v_t for every token, [n][token]: adds T scale_t to `sum` and T . with_t to `dot`. What `ahead` asks for
// comes meanwhile: each product brings one matrix, for so many requests at once would hold it up.
template <class S, class P>
HYBRID_LM_OUTLINE void product_with_state(Matrix<S> state, Matrix<S> vt, Matrix<S> with, const S* scale,
                                          const SsdSizes<S>& size, int64_t tokens, Matrix<S> sum, S* dot, P ahead) {
  using L = Lanes<S>;
  for_each_tile<S>(size.states, tokens, [&](auto tile) {
    ahead.next();
    tile.add(state, vt, 0, size.head_dim);
    typename L::V along[2] = {};
    for (int r = 0; r < TILE_ROWS; ++r)
      for (int v = 0; v * L::COUNT < tile.COLUMNS; ++v) {
        const int64_t t = tile.column + v * L::COUNT;
        const auto product = tile.sum[r][v];
        S* to = sum.row(tile.row + r) + t;
        L::store(to, L::load(to) + product * L::load(scale + t));
        along[v] += product * L::load(with.row(tile.row + r) + t);
      }
    for (int v = 0; v * L::COUNT < tile.COLUMNS; ++v) {
      S* to = dot + tile.column + v * L::COUNT;
      L::store(to, L::load(to) + along[v]);
    }
  });
}

// What C and B are asked through the states before and after the segment.
template <class S>
void HeadGrad<S>::find_state_parts() {
  const int64_t calls = tiles_of<S>(size.states, tokens);
  const Prefetch<true> gx(a.gx, batch, g, head, a.head_dim, calls);
  const Prefetch<> gy(a.gy, batch, next.tokens, next.head, a.head_dim, calls);
  if (g.enters)
    product_with_state(state, w.gyt, w.shared.Ct, steps.from_start, size, tokens, sums.gCt, by_C, gx);
  if (asked) product_with_state(gS, w.xt, w.Bt, steps.weight, size, tokens, sums.gBt, by_B, gy);
}

// What earlier tokens are asked through the state before the segment.
template <class S>
HYBRID_LM_OUTLINE void HeadGrad<S>::find_gS() {
  scale_rows(w.gy, steps.from_start, tokens, size.head_dim, w.gy_start);
  const S whole = steps.whole(g);
  V sum{};
  const int64_t calls = tiles_of<S>(size.states, size.head_dim);
  Prefetch<> x(a.x, batch, next.tokens, next.head, a.head_dim, calls);
  for_each_tile<S>(size.states, size.head_dim, [&](auto tile) {
    x.next();
    if (asked)
      tile.for_each([&](V& s, int64_t n, int64_t p) {
        const V after = L::load(gS.row(n) + p);
        sum += after * L::load(state.row(n) + p);
        s = after * whole;
      });
    tile.add_transposed(w.shared.C, w.gy_start, 0, tokens);
    tile.store(gS);
  });
  kept = L::sum(sum);
}

template <class S>
void HeadGrad<S>::find_gdt(HeadSums& total) {
  const int64_t last = g.count - 1;
  for (int64_t i = 0; i < g.count; ++i) {
    const S written = by_B[i] * steps.to_end[i];
    gs[i] += by_C[i] * steps.from_start[i];
    gdt[i] += written;
    // s_last enters the last token's own part with plus and with minus: left out.
    if (i < last) {
      gs[i] -= written * steps.dt[i];
      gs[last] += written * steps.dt[i];
    }
  }
  gs[last] += kept * (g.enters ? steps.whole(g) : S(0));
  const S rate = value(a.A, head, S(0));
  double later = 0;
  for (int64_t i = last; i >= 0; --i) {
    later += gs[i];
    // No state, no decay: see Steps::load.
    const S gdecay = i > 0 || g.enters ? S(later) : S(0);
    gdt[i] = (gdt[i] + gdecay * rate) * steps.slope[i];
    total.A += double(gdecay) * steps.dt[i];
    total.dt_bias += gdt[i];
  }
  total.D += gD;
  const View& to = a.gdt;
  store_row(to, batch * to.stride[0] + g.start * to.stride[1] + head * to.stride[2], to.stride[1], g.count, gdt);
}

template <class S>
void HeadGrad<S>::run(HeadSums& total) {
  load();
  mix();
  find_gx();
  find_pairs();
  find_state_parts();
  if (g.enters) find_gS();
  find_gdt(total);
  store_tokens(a.gx, batch, g, head, a.head_dim, w.gx);
}

}  // namespace HYBRID_LM_ISA
}  // namespace hybrid_lm
