// SSD, backward: chunk by chunk from the end, each computed again from the state before it.
//
// gy, gS: gradients of y and of the state after the chunk. With x_j instead of dt_j x_j on the right of all products,
//     gX_j  = sum over i >= j of M_ij gy_i + exp(s_last - s_j) gS B_j               gx_j = dt_j gX_j + D gy_j
//     gM_ij = gy_i . x_j                                                  M_ij = (C_i . B_j) exp(s_i - s_j)
//     gC_i  = sum over j of gM_ij L_ij dt_j B_j + exp(s_i) S^T gy_i                 L_ij = exp(s_i - s_j)
//     gB_j  = sum over i of gM_ij L_ij dt_j C_i + exp(s_last - s_j) dt_j gS^T x_j
//     gS'   = exp(s_last) gS + sum over i of exp(s_i) gy_i C_i^T
// s_i enters y_i with plus and what later tokens take from token i with minus. The products with the states that gB
// and gC need give these parts as well: y_i's is C_i . (S^T gy_i).
// Work items add gB and gC over their own heads; a second pass adds the items, always in the same order.
#include <cstdlib>

#include "cpu/kernels/ssd.h"

namespace hybrid_lm {
namespace HYBRID_LM_ISA {
namespace {

// What the items of one round may leave for the sums over them.
constexpr int64_t ROUND_BYTES = 4 << 20;

// What the heads of a group ask of B and C in one chunk.
template <class S>
struct GroupSums {
  Matrix<S> gBt, gCt;  // [n][token]: through the states
  Matrix<S> gCBt;      // [j][i]: gradient of C_i . B_j, 0 for j > i

  GroupSums(Arena& m, const SsdSizes<S>& size)
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
struct Workspace {
  SsdShared<S> shared;
  Matrix<S> Bt;                   // [n][token]
  Matrix<S> x, gy, gy_start, gx;  // [token][p]; gy_start_i = exp(s_i) gy_i
  Matrix<S> xt, gyt;              // [p][token]
  Matrix<S> Lt, Mt;               // [j][i]
  Matrix<S> state;                // [n][p]
  Matrix<S> flat;                 // [p][n], a state on its way in or out
  GroupSums<S> sums;

  Workspace(Arena& m, const SsdSizes<S>& size)
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
  static Workspace here(const SsdSizes<S>& size) {
    Arena count;
    Workspace(count, size);
    Arena arena{static_cast<char*>(scratch(count.bytes))};
    return Workspace(arena, size);
  }
};

// One head in one segment.
template <class S>
struct Head {
  using L = Lanes<S>;
  using V = typename L::V;

  const SsdGradArgs& a;
  const Workspace<S>& w;
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
  alignas(64) S gs[SSD_CHUNK] = {};      // gradient of s_i
  alignas(64) S gdt[SSD_CHUNK] = {};     // gradient of dt_j, without what passes through s
  alignas(64) S by_C[SSD_CHUNK] = {};    // C_i . (S^T gy_i)
  alignas(64) S by_B[SSD_CHUNK] = {};    // B_j . (gS^T x_j)
  S gD = 0, kept = 0;                    // kept: sum of S gS

  Head(const SsdGradArgs& a, const Workspace<S>& w, const GroupSums<S>& sums, int64_t batch, int64_t head, int64_t chunk,
       const Segment& g, bool asked, const Ahead& next, Matrix<S> gS)
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
void Head<S>::load() {
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
void Head<S>::mix() {
  for (int64_t j = 0; j < tokens; ++j)
    for (int64_t i = j / PADDING<S> * PADDING<S>; i < tokens; i += L::COUNT) {
      const V decay = steps.decay(j, i);
      L::store(w.Lt.row(j) + i, decay);
      L::store(w.Mt.row(j) + i, L::load(w.shared.CBt.row(j) + i) * decay);
    }
}

template <class S>
HYBRID_LM_OUTLINE void Head<S>::find_gx() {
  const S D = value(a.D, head, S(0));
  const int64_t calls = tiles_of<S>(tokens, size.head_dim);
  const int64_t group = head / size.heads_per_group, shared_calls = last_head ? calls : 0;
  Prefetch<> B(a.B, batch, next.tokens, group, a.states, shared_calls);
  Prefetch<> C(a.C, batch, next.tokens, group, a.states, shared_calls);
  Prefetch<> read(state.data, a.states * state.pitch * sizeof(S), calls);
  Prefetch<true> written(a.gx, batch, g, head, a.head_dim, calls);
  for_each_tile<S>(tokens, size.head_dim, [&](auto tile) {
    read.next(), written.next(), B.next(), C.next();
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
HYBRID_LM_OUTLINE void Head<S>::find_pairs() {
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

// T = state^T v_t for every token, [n][token]: adds T scale_t to `sum` and T . with_t to `dot`.
template <class S>
HYBRID_LM_OUTLINE void product_with_state(Matrix<S> state, Matrix<S> vt, Matrix<S> with, const S* scale,
                                          const SsdSizes<S>& size, int64_t tokens, Matrix<S> sum, S* dot) {
  using L = Lanes<S>;
  for_each_tile<S>(size.states, tokens, [&](auto tile) {
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
void Head<S>::find_state_parts() {
  if (g.enters)
    product_with_state(state, w.gyt, w.shared.Ct, steps.from_start, size, tokens, sums.gCt, by_C);
  if (asked)
    product_with_state(gS, w.xt, w.Bt, steps.weight, size, tokens, sums.gBt, by_B);
}

// What earlier tokens are asked through the state before the segment.
template <class S>
HYBRID_LM_OUTLINE void Head<S>::find_gS() {
  scale_rows(w.gy, steps.from_start, tokens, size.head_dim, w.gy_start);
  const S whole = steps.whole(g);
  V sum{};
  const int64_t calls = tiles_of<S>(size.states, size.head_dim);
  Prefetch<> x(a.x, batch, next.tokens, next.head, a.head_dim, calls);
  Prefetch<> gy(a.gy, batch, next.tokens, next.head, a.head_dim, calls);
  for_each_tile<S>(size.states, size.head_dim, [&](auto tile) {
    x.next(), gy.next();
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
void Head<S>::find_gdt(HeadSums& total) {
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
void Head<S>::run(HeadSums& total) {
  load();
  mix();
  find_gx();
  find_pairs();
  find_state_parts();
  if (g.enters) find_gS();
  find_gdt(total);
  store_tokens(a.gx, batch, g, head, a.head_dim, w.gx);
}

// After a head comes the next head, after the last one the first head of the chunk before.
inline Ahead ahead(const SsdItem& item, int64_t head, const Segment& g) {
  if (head + 1 < item.head + item.heads) return {g, head + 1};
  const int64_t start = g.start > SSD_CHUNK ? g.start - SSD_CHUNK : 0;
  return {{start, g.start - start, true, true}, item.head};
}

// The whole backward pass: its memory, and the two kinds of work items.
template <class S>
struct Backward {
  const SsdGradArgs& a;
  const SsdItems items;
  const SsdSizes<S> size;
  HeadSums* head_sums;  // [batch][head]
  Matrix<S> gS;         // [batch][head][n][p]
  char* partial;        // GroupSums [chunk of the round][item]
  size_t partial_bytes;

  Backward(const SsdGradArgs& a) : a(a), items(a), size(a) {
    Arena one;
    GroupSums<S>(one, size);
    partial_bytes = one.bytes;
  }
  // Cuts the memory of a pass that goes through so many chunks before it adds up.
  void place(Arena& m, int64_t chunks) {
    head_sums = m.take<HeadSums>(a.batch * a.heads);
    gS = m.matrix<S>(a.batch * a.heads * size.states, size.head_dim);
    partial = m.take<char>(chunks * items.count * partial_bytes);
  }
  Matrix<S> head_gS(int64_t batch, int64_t head) const {
    return {gS.row((batch * a.heads + head) * size.states), gS.pitch};
  }
  GroupSums<S> partial_of(int64_t chunk, int64_t item) const {
    Arena m{partial + (chunk * items.count + item) * partial_bytes};
    return GroupSums<S>(m, size);
  }

  void run_chunk(const SsdItem& item, int64_t chunk, const GroupSums<S>& sums, const Workspace<S>& w) const;
  void add_items(int64_t batch, int64_t group, int64_t chunk, int64_t in_round) const;
  void run_round(int64_t first, int64_t last) const;
  void load_gstate() const;
  void store_ginitial() const;
  void store_head_sums() const;
};

template <class S>
void Backward<S>::run_chunk(const SsdItem& item, int64_t chunk, const GroupSums<S>& sums, const Workspace<S>& w) const {
  Segment segments[SSD_CHUNK];
  const int64_t count = segments_of(a, item.batch, chunk, segments);
  // Nothing is asked of a state that nobody reads: the last one without gradient, or one before a document.
  const int64_t next = (chunk + 1) * SSD_CHUNK;
  const bool asked = next < a.tokens ? !resets(a, item.batch, next) : bool(a.gstate);
  for (int64_t s = count - 1; s >= 0; --s) {
    const Segment& g = segments[s];
    const int64_t tokens = padded<S>(g.count);
    w.shared.load(a, item.batch, item.group, g, tokens);
    transpose(w.shared.B, tokens, size.states, w.Bt);
    const GroupSums<S>& here = count == 1 ? sums : w.sums;
    here.clear(size.states, tokens);
    for (int64_t h = item.head; h < item.head + item.heads; ++h)
      Head<S>(a, w, here, item.batch, h, chunk, g, asked && g.leaves, ahead(item, h, g), head_gS(item.batch, h))
          .run(head_sums[item.batch * a.heads + h]);
    if (count > 1)
      sums.match(w.sums, a.states, g.start - chunk * SSD_CHUNK, g.count,
                 [](S* whole, const S* part, int64_t n) { std::memcpy(whole, part, n * sizeof(S)); });
  }
}

// gB and gC of a group in one chunk, from the sums of its items.
template <class S>
void Backward<S>::add_items(int64_t batch, int64_t group, int64_t chunk, int64_t in_round) const {
  const auto w = Workspace<S>::here(size);
  const Matrix<S> gCB = w.Mt;
  Segment segments[SSD_CHUNK];
  for (int64_t s = segments_of(a, batch, chunk, segments) - 1; s >= 0; --s) {
    const Segment& g = segments[s];
    const int64_t tokens = padded<S>(g.count);
    w.sums.clear(size.states, tokens);
    for (int64_t i = 0; i < items.items_per_group; ++i) {
      const int64_t item = (batch * a.groups + group) * items.items_per_group + i;
      partial_of(in_round, item)
          .match(w.sums, a.states, g.start - chunk * SSD_CHUNK, g.count, [](const S* part, S* sum, int64_t n) {
            for (int64_t t = 0; t < n; ++t) sum[t] += part[t];
          });
    }
    load_tokens(a.B, batch, g, group, a.states, tokens, size.states, w.shared.B);
    load_tokens(a.C, batch, g, group, a.states, tokens, size.states, w.shared.C);
    transpose(w.sums.gCBt, tokens, tokens, gCB);
    auto add_product = [&](Matrix<S> sum, Matrix<S> left, Matrix<S> right, bool earlier) {
      for_each_tile<S>(size.states, tokens, [&](auto tile) {
        tile.for_each([&](auto& v, int64_t n, int64_t t) { v = Lanes<S>::load(sum.row(n) + t); });
        const int64_t stop = tile.column + tile.COLUMNS < tokens ? tile.column + tile.COLUMNS : tokens;
        tile.add_transposed(left, right, earlier ? 0 : tile.column, earlier ? stop : tokens);
        tile.store(sum);
      });
    };
    add_product(w.sums.gCt, w.shared.B, w.sums.gCBt, true);
    add_product(w.sums.gBt, w.shared.C, gCB, false);
    // B and C have done their part: their place takes the rows of the gradients.
    transpose(w.sums.gCt, size.states, tokens, w.shared.C);
    transpose(w.sums.gBt, size.states, tokens, w.shared.B);
    store_tokens(a.gC, batch, g, group, a.states, w.shared.C);
    store_tokens(a.gB, batch, g, group, a.states, w.shared.B);
  }
}

// Chunks from the last to the first of a round, then the sums over their items.
template <class S>
void Backward<S>::run_round(int64_t first, int64_t last) const {
  const int64_t chunks = last - first;
  const int64_t operations = 8 * a.batch * chunks * SSD_CHUNK * a.heads * size.head_dim * size.states;
  for_each_item(a.parallel, items.count, operations, [&](int64_t i) {
    const auto w = Workspace<S>::here(size);
    for (int64_t k = last - 1; k >= first; --k) run_chunk(items[i], k, partial_of(k - first, i), w);
  });
  for_each_item(a.parallel, a.batch * a.groups * chunks, operations / a.heads, [&](int64_t i) {
    add_items(i / chunks / a.groups, i / chunks % a.groups, first + i % chunks, i % chunks);
  });
}

// The gradient of the state on its way in, or out to that of the given one.
template <class S>
void Backward<S>::load_gstate() const {
  if (!a.gstate) return;
  for_each_item(a.parallel, a.batch * a.heads, a.batch * a.heads * a.states * a.head_dim, [&](int64_t i) {
    load_state(a.gstate, i / a.heads, i % a.heads, a, Workspace<S>::here(size).flat, head_gS(i / a.heads, i % a.heads));
  });
}

template <class S>
void Backward<S>::store_ginitial() const {
  if (!a.ginitial) return;
  for_each_item(a.parallel, a.batch * a.heads, a.batch * a.heads * a.states * a.head_dim, [&](int64_t i) {
    const int64_t batch = i / a.heads, head = i % a.heads;
    const Matrix<S> gS = head_gS(batch, head);
    const bool asked = a.tokens > 0 ? !resets(a, batch, 0) : bool(a.gstate);
    if (!asked) fill(gS, size.states, size.head_dim, S(0));
    store_state(a.ginitial, batch, head, a, Workspace<S>::here(size).flat, gS);
  });
}

// The gradients of the numbers that a head has.
template <class S>
void Backward<S>::store_head_sums() const {
  for (int64_t h = 0; h < a.heads; ++h) {
    HeadSums sum{0, 0, 0};
    for (int64_t b = 0; b < a.batch; ++b) {
      const HeadSums& one = head_sums[b * a.heads + h];
      sum = {sum.A + one.A, sum.D + one.D, sum.dt_bias + one.dt_bias};
    }
    store_value(a.gA, h, S(sum.A));
    store_value(a.gD, h, S(sum.D));
    store_value(a.gdt_bias, h, S(sum.dt_bias));
  }
}

template <class S>
void run(const SsdGradArgs& a) {
  Backward<S> pass(a);
  const int64_t chunks = chunks_of(a);
  // Rounds of few chunks keep what the items wait with small, whatever the length.
  const int64_t chunk_bytes = pass.items.count * pass.partial_bytes;  // 0 without a sequence
  const int64_t most = chunk_bytes ? ROUND_BYTES / chunk_bytes + 1 : 1;
  const int64_t rounds = (chunks + most - 1) / most, size = rounds ? (chunks + rounds - 1) / rounds : 0;
  Arena memory;
  pass.place(memory, size);
  void* const block = std::malloc(memory.bytes + 64);
  memory = {static_cast<char*>(block) + (-reinterpret_cast<uintptr_t>(block) & 63)};
  pass.place(memory, size);
  for (int64_t i = 0; i < a.batch * a.heads; ++i) pass.head_sums[i] = {0, 0, 0};
  pass.load_gstate();
  for (int64_t last = chunks; last > 0; last -= size) pass.run_round(last > size ? last - size : 0, last);
  pass.store_ginitial();
  pass.store_head_sums();
  std::free(block);
}

}  // namespace

void ssd_backward(const SsdGradArgs& a) { a.x.type == Type::f64 ? run<double>(a) : run<float>(a); }

}  // namespace HYBRID_LM_ISA
}  // namespace hybrid_lm
