// What the forward and the backward pass of the causal convolution share. Both walk a tile of channels down a stretch
// of tokens, a few tokens at a time, on rows: the values of one token for the tile's channels. A row that float32 (or
// float64) tensors hold contiguously is used where it lies, any other is packed in scratch memory; a row that lies
// before the document or the sequence is a row of zeros. So the loops over channels know nothing of types and resets.
#pragma once

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace hybrid_lm {
namespace HYBRID_LM_ISA {

// Channels of one tile. Many, for memory likes to be read in long runs: tiles of 256 take 1.5 times as long.
constexpr int64_t CONV_TILE = 2048;
// Tokens whose sums are in registers at the same time, so that an input is loaded once for several taps. AVX-512 has
// twice the registers.
constexpr int CONV_BLOCK = VECTOR_BYTES == 64 ? 8 : 4;

// The work items, (sequence, stretch of tokens, tile of channels): of the shapes only, so that sums over items come
// out the same on any number of threads.
struct ConvGrid {
  int64_t batch, tokens, width, length = 256, stretches, tiles;

  explicit ConvGrid(const ConvArgs& a)
      : batch(a.batch), tokens(a.tokens), width(a.width), tiles((a.width + CONV_TILE - 1) / CONV_TILE) {
    // Of many taps, few stretches: each has its own sums of the gradients of the weights.
    while (length < 8 * a.taps) length *= 2;
    stretches = stretches_of(length);
    // Not shorter than the taps: only the first stretch may reach `initial`.
    while (length > 32 && length / 2 >= a.taps && a.batch * stretches * tiles < 16)
      stretches = stretches_of(length /= 2);
  }

  int64_t items() const { return stretches * tiles * batch; }
  int64_t stretches_of(int64_t tokens_each) const {
    return tokens > tokens_each ? (tokens + tokens_each - 1) / tokens_each : 1;
  }
};

struct ConvItem {
  int64_t batch, begin, end;         // tokens begin ... end - 1
  int64_t channel, channels, pitch;  // the first channel, their number, and that filled up to whole vectors

  ConvItem(const ConvGrid& grid, int64_t item, int64_t lanes) {
    channel = item % grid.tiles * CONV_TILE;
    batch = item / grid.tiles / grid.stretches;
    begin = item / grid.tiles % grid.stretches * grid.length;
    end = begin + grid.length < grid.tokens ? begin + grid.length : grid.tokens;
    channels = grid.width - channel < CONV_TILE ? grid.width - channel : CONV_TILE;
    pitch = (channels + lanes - 1) / lanes * lanes;
  }
};

// Rows of scratch memory, handed out one after the other, and an array of pointers to rows.
template <class S>
struct ConvScratch {
  S* next;
  int64_t pitch;

  ConvScratch(int64_t rows, int64_t pitch, int64_t pointers)
      : next(static_cast<S*>(scratch(rows * pitch * sizeof(S) + pointers * sizeof(S*)))), pitch(pitch) {}

  S* rows(int64_t count) {
    S* first = next;
    next += count * pitch;
    return first;
  }
  S* zero_row() {
    std::memset(next, 0, pitch * sizeof(S));
    return rows(1);
  }
  // To be called when all rows have been taken.
  const S** pointers() { return reinterpret_cast<const S**>(next); }
};

// Row t of an item's part of a tensor (b t d), as S, zeros behind its last channel.
template <class S>
void read_conv_row(const View& v, const ConvItem& i, int64_t t, S* to) {
  load_row(v, i.batch * v.stride[0] + t * v.stride[1] + i.channel * v.stride[2], v.stride[2], i.channels, to);
  for (int64_t c = i.channels; c < i.pitch; ++c) to[c] = 0;
}

template <class S>
void write_conv_row(const View& v, const ConvItem& i, int64_t t, const S* from) {
  store_row(v, i.batch * v.stride[0] + t * v.stride[1] + i.channel * v.stride[2], v.stride[2], i.channels, from);
}

// (d w) and (d) as (b t d), the same for every b: a tap is a token.
inline View rows_of_weight(const View& v) { return {v.data, v.type, {0, v.stride[1], v.stride[0]}}; }
inline View rows_of_bias(const View& v) { return {v.data, v.type, {0, 0, v.stride[0]}}; }

// Rows that the next block will need, asked for while this one is worked on.
template <class S>
struct ConvAhead {
  const S* row;  // null: none
  int64_t apart;

  // Inlined by force: GCC takes a function that only prefetches for one without effect, and drops the call.
  template <int BLOCK, bool WRITE>
  HYBRID_LM_FN void ask(int64_t c) const {
    if (row)
      for (int i = 0; i < BLOCK; ++i) __builtin_prefetch(row + i * apart + c, WRITE, 2);
  }
};

// One item's part of a tensor (b t d), row by row.
template <class S>
struct ConvRows {
  const View& view;
  const ConvItem& item;
  S* direct;                    // row 0 in the tensor itself, rows `apart`; null if rows have to be packed
  int64_t apart;
  S* ring;                      // the packed rows: token t is in slot t % slots
  int64_t slots;
  int64_t first = 0, last = 0;  // tokens first ... last - 1 have been read

  // `zeros`: a row of them, which is what an absent tensor holds.
  ConvRows(const View& v, const ConvItem& i, S* zeros, S* ring, int64_t slots)
      : view(v), item(i), ring(ring), slots(slots) {
    const bool same = v.type == (sizeof(S) == sizeof(double) ? Type::f64 : Type::f32);
    const bool whole = v.stride[2] == 1 && i.channels == i.pitch;
    direct = same && whole ? static_cast<S*>(v.data) + i.batch * v.stride[0] + i.channel : nullptr;
    apart = v.stride[1];
    if (!v) direct = zeros, apart = 0;
  }

  S* row(int64_t t) const { return direct ? direct + t * apart : ring + t % slots * item.pitch; }

  // The rows from token t on, if they are read and written where they lie and there is a block of them.
  ConvAhead<S> ahead(int64_t t, int64_t tokens) const {
    return {direct && t >= 0 && t + CONV_BLOCK <= tokens ? row(t) : nullptr, apart};
  }

  // Makes tokens from ... to - 1 readable, `slots` at most.
  void read(int64_t from, int64_t to) {
    if (direct) return;
    for (int64_t t = from; t < to; ++t)
      if (t < first || t >= last) read_conv_row(view, item, t, row(t));
    first = from;
    last = to;
  }

  void write(int64_t from, int64_t to) const {
    if (direct) return;
    for (int64_t t = from; t < to; ++t) write_conv_row(view, item, t, row(t));
  }
};

// The documents of one sequence.
struct ConvResets {
  const uint8_t* at;
  int64_t stride, tokens;

  ConvResets(const ConvArgs& a, int64_t batch)
      : at(static_cast<const uint8_t*>(a.reset.data)), stride(a.reset.stride[1]), tokens(a.tokens) {
    if (at) at += batch * a.reset.stride[0];
  }

  // The last reset of tokens from ... t, or -infinity where there is none.
  int64_t last(int64_t from, int64_t t) const {
    for (int64_t u = t; at && u >= from && u >= 0; --u)
      if (at[u * stride]) return u;
    return INT64_MIN;
  }
  // The first reset of tokens t ... to - 1, or the end of the sequence.
  int64_t next(int64_t t, int64_t to) const {
    for (int64_t u = t > 0 ? t : 0; at && u < to && u < tokens; ++u)
      if (at[u * stride]) return u;
    return tokens;
  }
  // True if the block of tokens that begins at t is of one document.
  bool block(int64_t t) const { return next(t + 1, t + CONV_BLOCK) == tokens; }
};

// What the sums of one item are made of: the rows of [initial; x], the weights and the bias.
template <class S>
struct ConvInputs {
  const ConvArgs& args;
  const ConvItem& item;
  int64_t taps;
  S *zeros, *weight, *bias, *initial;
  ConvRows<S> x;
  ConvResets resets;

  static int64_t slots(int64_t taps) { return CONV_BLOCK + taps - 1; }
  // Rows of scratch memory that the constructor takes.
  static int64_t rows(int64_t taps) { return 1 + taps + 1 + taps - 1 + slots(taps); }

  ConvInputs(const ConvArgs& a, const ConvItem& i, ConvScratch<S>& memory)
      : args(a),
        item(i),
        taps(a.taps),
        zeros(memory.zero_row()),
        weight(memory.rows(taps)),
        bias(memory.rows(1)),
        initial(memory.rows(taps - 1)),
        x(a.x, i, zeros, memory.rows(slots(taps)), slots(taps)),
        resets(a, i.batch) {
    for (int64_t k = 0; k < taps; ++k) read_conv_row(rows_of_weight(a.weight), i, k, weight + k * i.pitch);
    if (a.bias)
      read_conv_row(rows_of_bias(a.bias), i, 0, bias);
    else
      bias = zeros;
    // Only the first stretch reaches that far back. It is copied: the state may be written over it.
    if (a.initial && i.begin == 0)
      for (int64_t k = 0; k < taps - 1; ++k) read_conv_row(a.initial, i, k, initial + k * i.pitch);
  }

  // Points at the inputs from token `first` on that the tokens up to `last`, all of one document, may see.
  void window(int64_t first, int64_t last, const S** rows) {
    const int64_t start = resets.last(first, last);
    x.read(first > 0 ? first : 0, last + 1);
    for (int64_t t = first; t <= last; ++t) *rows++ = t < start ? zeros : t < 0 ? before(t) : x.row(t);
  }

  const S* before(int64_t t) const { return args.initial ? initial + (t + taps - 1) * item.pitch : zeros; }
};

// The sums of BLOCK tokens at channels c ...: sums[i] = bias + sum_k weight[k] rows[i + k]. TAPS is 0 where their
// number is known at run time only.
template <class S, int TAPS, int BLOCK>
HYBRID_LM_FN void conv_sums(const S* const* rows, const S* weight, const S* bias, int64_t taps, int64_t pitch,
                            int64_t c, typename Lanes<S>::V* sums) {
  using L = Lanes<S>;
  for (int i = 0; i < BLOCK; ++i) sums[i] = L::load(bias + c);
  for (int64_t k = 0; k < (TAPS ? TAPS : taps); ++k) {
    const auto w = L::load(weight + k * pitch + c);
    for (int i = 0; i < BLOCK; ++i) sums[i] += w * L::load(rows[i + k] + c);
  }
}

// Those sums for all channels of a tile.
template <class S, int TAPS, int BLOCK>
inline void convolve(const S* const* rows, const S* weight, const S* bias, int64_t taps, int64_t pitch,
                     bool activate, S* const* out, ConvAhead<S> read, ConvAhead<S> write) {
  using L = Lanes<S>;
  for (int64_t c = 0; c < pitch; c += L::COUNT) {
    typename L::V sums[BLOCK];
    read.template ask<BLOCK, false>(c), write.template ask<BLOCK, true>(c);
    conv_sums<S, TAPS, BLOCK>(rows, weight, bias, taps, pitch, c, sums);
    if (activate)
      for (int i = 0; i < BLOCK; ++i) sums[i] = silu<L>(sums[i]);
    for (int i = 0; i < BLOCK; ++i) L::store(out[i] + c, sums[i]);
  }
}

}  // namespace HYBRID_LM_ISA
}  // namespace hybrid_lm
