// SSD, backward: chunk by chunk from the end. Work items add gB and gC over their own heads; a second pass adds the
// items, always in the same order.
#include <cstdlib>

#include "cpu/kernels/ssd_backward.h"

namespace hybrid_lm {
namespace HYBRID_LM_ISA {
namespace {

// What the items of one round may leave for the sums over them.
constexpr int64_t ROUND_BYTES = 1 << 20;

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
    MatrixArena one;
    GroupSums<S>(one, size);
    partial_bytes = one.bytes;
  }
  // Cuts the memory of a pass that goes through so many chunks before it adds up.
  void place(MatrixArena& m, int64_t chunks) {
    head_sums = m.take<HeadSums>(a.batch * a.heads);
    gS = m.matrix<S>(a.batch * a.heads * size.states, size.head_dim);
    partial = m.take<char>(chunks * items.count * partial_bytes);
  }
  Matrix<S> head_gS(int64_t batch, int64_t head) const {
    return {gS.row((batch * a.heads + head) * size.states), gS.pitch};
  }
  GroupSums<S> partial_of(int64_t chunk, int64_t item) const {
    MatrixArena m{partial + (chunk * items.count + item) * partial_bytes};
    return GroupSums<S>(m, size);
  }

  void run_chunk(const SsdItem& item, int64_t chunk, const GroupSums<S>& sums, const GradWorkspace<S>& w) const;
  void add_items(int64_t batch, int64_t group, int64_t chunk, int64_t in_round) const;
  void run_round(int64_t first, int64_t last) const;
  void load_gstate() const;
  void store_ginitial() const;
  void store_head_sums() const;
};

template <class S>
void Backward<S>::run_chunk(const SsdItem& item, int64_t chunk, const GroupSums<S>& sums,
                            const GradWorkspace<S>& w) const {
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
      HeadGrad<S>(a, w, here, item.batch, h, chunk, g, asked && g.leaves, ahead(item, h, g), head_gS(item.batch, h))
          .run(head_sums[item.batch * a.heads + h]);
    if (count > 1)
      sums.match(w.sums, a.states, g.start - chunk * SSD_CHUNK, g.count,
                 [](S* whole, const S* part, int64_t n) { std::memcpy(whole, part, n * sizeof(S)); });
  }
}

// gB and gC of a group in one chunk, from the sums of its items.
template <class S>
void Backward<S>::add_items(int64_t batch, int64_t group, int64_t chunk, int64_t in_round) const {
  const auto w = GradWorkspace<S>::here(size);
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
    const auto w = GradWorkspace<S>::here(size);
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
    const int64_t batch = i / a.heads, head = i % a.heads;
    load_state(a.gstate, batch, head, a, GradWorkspace<S>::here(size).flat, head_gS(batch, head));
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
    store_state(a.ginitial, batch, head, a, GradWorkspace<S>::here(size).flat, gS);
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
  MatrixArena memory;
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
