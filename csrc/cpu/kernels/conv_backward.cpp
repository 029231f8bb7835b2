// causal_conv1d, backward. With g the gradient of the sums before the activation (computed again here):
// gx_s = sum_j weight[:, w-1-j] g_{s+j}, gweight[:, k] = sum_t g_t x_{t-w+1+k}, gbias = sum_t g_t.
#include <cstdlib>

#include "cpu/kernels/conv.h"

namespace hybrid_lm {
namespace HYBRID_LM_ISA {
namespace {

// Turns rows of gy into g, and adds to the tile's sums of gweight (taps rows) and gbias (one more), if given.
template <class S, int TAPS, int BLOCK>
inline void conv_slopes(const ConvInputs<S>& in, const S* const* rows, const S* const* gy, S* const* g, S* sums,
                        ConvAhead<S> x_ahead, ConvAhead<S> gy_ahead) {
  using L = Lanes<S>;
  const int64_t taps = TAPS ? TAPS : in.taps, pitch = in.item.pitch;
  for (int64_t c = 0; c < pitch; c += L::COUNT) {
    typename L::V v[BLOCK], total{};
    x_ahead.template ask<BLOCK, false>(c), gy_ahead.template ask<BLOCK, false>(c);
    for (int i = 0; i < BLOCK; ++i) v[i] = L::load(gy[i] + c);
    if (in.args.silu) {
      typename L::V before[BLOCK];
      conv_sums<S, TAPS, BLOCK>(rows, in.weight, in.bias, taps, pitch, c, before);
      for (int i = 0; i < BLOCK; ++i) v[i] *= silu_slope<L>(before[i], sigmoid<L>(before[i]));
    }
    for (int i = 0; i < BLOCK; ++i) L::store(g[i] + c, v[i]);
    if (!sums) continue;
    for (int i = 0; i < BLOCK; ++i) total += v[i];
    for (int64_t k = 0; k < taps; ++k) {
      S* sum = sums + k * pitch + c;
      auto s = L::load(sum);
      for (int i = 0; i < BLOCK; ++i) s += v[i] * L::load(rows[i + k] + c);
      L::store(sum, s);
    }
    S* sum = sums + taps * pitch + c;
    L::store(sum, L::load(sum) + total);
  }
}

// One item: its g and gx, block by block. They are two loops over the channels: one loop for both was measured to be
// slower, by 10 to 25 percent.
template <class S, int TAPS>
struct ConvBackward {
  const ConvGradArgs& a;
  const ConvItem& item;
  int64_t taps, slots;
  ConvScratch<S> memory;
  ConvInputs<S> in;
  ConvRows<S> gy, gx;
  S* g;         // a ring: token t is in slot t % slots
  S* mirrored;  // the weights, last tap first
  S* extra;     // gx of a token of `initial`
  S* given;     // a row of gstate
  const S** rows;

  ConvBackward(const ConvGradArgs& args, const ConvItem& i)
      : a(args),
        item(i),
        taps(args.taps),
        slots(ConvInputs<S>::slots(taps)),
        memory(ConvInputs<S>::rows(taps) + 2 * CONV_BLOCK + slots + taps + 2, i.pitch, slots),
        in(args, i, memory),
        gy(args.gy, i, in.zeros, memory.rows(CONV_BLOCK), CONV_BLOCK),
        gx(args.gx, i, nullptr, memory.rows(CONV_BLOCK), CONV_BLOCK),
        g(memory.rows(slots)),
        mirrored(memory.rows(taps)),
        extra(memory.rows(1)),
        given(memory.rows(1)),
        rows(memory.pointers()) {
    for (int64_t k = 0; k < taps; ++k)
      for (int64_t c = 0; c < i.pitch; ++c) mirrored[k * i.pitch + c] = in.weight[(taps - 1 - k) * i.pitch + c];
  }

  S* slope(int64_t t) const { return g + t % slots * item.pitch; }

  // From the last token to the first: a token's g is there when the gx of those before it needs it.
  void run(S* sums) {
    const int64_t reach = item.end + taps - 1;
    walk(item.end, reach < a.tokens ? reach : a.tokens, [&](int64_t t, bool block) { slopes(t, block, nullptr); });
    walk(item.begin, item.end, [&](int64_t t, bool block) {
      slopes(t, block, sums);
      inputs(t, block);
      gx.write(t, block ? t + CONV_BLOCK : t + 1);
    });
    if (item.begin > 0 || !a.ginitial) return;
    for (int64_t k = 0; k < taps - 1; ++k) {
      inputs(k - taps + 1, false);
      write_conv_row(a.ginitial, item, k, extra);
    }
  }

  // Tokens begin ... end - 1 in blocks of one document, and single tokens where there is none.
  template <class F>
  void walk(int64_t begin, int64_t end, const F& step) {
    while (end > begin) {
      const bool block = end - CONV_BLOCK >= begin && in.resets.block(end - CONV_BLOCK);
      end -= block ? CONV_BLOCK : 1;
      step(end, block);
    }
  }

  void slopes(int64_t t, bool block, S* sums) {
    const S* from[CONV_BLOCK];
    S* to[CONV_BLOCK];
    const int64_t count = block ? CONV_BLOCK : 1, before = t - CONV_BLOCK;
    in.window(t - taps + 1, t + count - 1, rows);
    gy.read(t, t + count);
    for (int64_t i = 0; i < count; ++i) from[i] = gy.row(t + i), to[i] = slope(t + i);
    if (block)
      conv_slopes<S, TAPS, CONV_BLOCK>(in, rows, from, to, sums, in.x.ahead(before - taps + 1, a.tokens),
                                       gy.ahead(before, a.tokens));
    else
      conv_slopes<S, TAPS, 1>(in, rows, from, to, sums, {}, {});
  }

  // gx of token t (or the block there); of a token of `initial`, into `extra`.
  void inputs(int64_t t, bool block) {
    S* to[CONV_BLOCK];
    const int64_t count = block ? CONV_BLOCK : 1, last = t + count + taps - 2;
    const int64_t next = in.resets.next(t + count, last + 1);
    for (int64_t u = t; u <= last; ++u) rows[u - t] = u >= 0 && u < next ? slope(u) : in.zeros;
    for (int64_t i = 0; i < count; ++i) to[i] = t < 0 ? extra : gx.row(t + i);
    if (block)
      convolve<S, TAPS, CONV_BLOCK>(rows, mirrored, in.zeros, taps, item.pitch, false, to, {},
                                    gx.ahead(t - CONV_BLOCK, a.tokens));
    else
      convolve<S, TAPS, 1>(rows, mirrored, in.zeros, taps, item.pitch, false, to, {}, {});
    if (a.gstate && last >= a.tokens)
      for (int64_t i = 0; i < count; ++i) add_state(t + i, to[i]);
  }

  // The state is a copy of the last inputs, of the last document.
  void add_state(int64_t t, S* to) {
    const int64_t k = t - a.tokens + taps - 1;
    if (k < 0 || in.resets.next(t + 1, a.tokens) < a.tokens) return;
    read_conv_row(a.gstate, item, k, given);
    for (int64_t c = 0; c < item.pitch; ++c) to[c] += given[c];
  }
};

// gweight and gbias: the items' sums, added in the order of sequences and stretches.
template <class S>
void conv_add_sums(const ConvGradArgs& a, const ConvGrid& grid, S* sums, int64_t apart) {
  for_each_item(a.parallel, grid.tiles, grid.items() * apart, [&](int64_t tile) {
    const ConvItem item(grid, tile, Lanes<S>::COUNT);
    S* total = sums + tile * apart;
    for (int64_t i = tile + grid.tiles; i < grid.items(); i += grid.tiles)
      for (int64_t c = 0; c < (a.taps + 1) * item.pitch; ++c) total[c] += sums[i * apart + c];
    for (int64_t k = 0; k < a.taps; ++k) write_conv_row(rows_of_weight(a.gweight), item, k, total + k * item.pitch);
    if (a.gbias) write_conv_row(rows_of_bias(a.gbias), item, 0, total + a.taps * item.pitch);
  });
}

template <class S, int TAPS>
void conv_backward_items(const ConvGradArgs& a) {
  const ConvGrid grid(a);
  const int64_t lanes = Lanes<S>::COUNT, widest = a.width < CONV_TILE ? a.width : CONV_TILE;
  const int64_t apart = (a.taps + 1) * ((widest + lanes - 1) / lanes * lanes);
  // Whole cache lines; without any sequence, one item's sums per tile: zeros.
  const size_t bytes = ((a.batch ? grid.items() : grid.tiles) * apart * sizeof(S) + 63) / 64 * 64;
  S* sums = static_cast<S*>(std::aligned_alloc(64, bytes));
  std::memset(sums, 0, bytes);
  for_each_item(a.parallel, grid.items(), 4 * a.batch * a.tokens * a.width * a.taps, [&](int64_t i) {
    const ConvItem item(grid, i, Lanes<S>::COUNT);
    ConvBackward<S, TAPS>(a, item).run(sums + i * apart);
  });
  conv_add_sums(a, grid, sums, apart);
  std::free(sums);
}

template <class S>
void conv_backward_as(const ConvGradArgs& a) {
  switch (a.taps) {
    case 2: return conv_backward_items<S, 2>(a);
    case 3: return conv_backward_items<S, 3>(a);
    case 4: return conv_backward_items<S, 4>(a);
    default: return conv_backward_items<S, 0>(a);
  }
}

}  // namespace

void conv_backward(const ConvGradArgs& a) {
  a.x.type == Type::f64 ? conv_backward_as<double>(a) : conv_backward_as<float>(a);
}

}  // namespace HYBRID_LM_ISA
}  // namespace hybrid_lm
