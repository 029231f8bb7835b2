// What the forward and the backward pass of the selective scan share: how the work is cut, and loading a tile.
//
// A work item is one row of the batch and a group of channels. It walks the tokens chunk by chunk; a chunk's tile
// (tokens x channels) is packed in scratch memory, so that a row of any type and stride becomes whole vectors, and
// is worked on one vector of channels and a few states at a time, whose states stay in registers.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "cpu/arena.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "hybrid_lm/scan.h"

namespace hybrid_lm {
namespace HYBRID_LM_ISA {

// States per pass: what leaves registers for the polynomial, of 32 or of 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int STATES = 8;
#else
constexpr int STATES = 4;
#endif

// Channels of a work item. Few items get fewer channels each: two cores need several. A function of the shape only,
// for it decides in what order gradients are added.
inline int64_t scan_group(const ScanArgs& a) {
  int64_t group = 128;
  while (group > 32 && a.batch * ((a.width + group - 1) / group) < 4) group /= 2;
  return group;
}

// Calls f(size, first) for blocks of states, `size` a compile-time constant.
template <class F>
HYBRID_LM_FN void for_state_blocks(int64_t states, const F& f) {
  int64_t n = 0;
  for (; n + STATES <= states; n += STATES) f(std::integral_constant<int, STATES>(), n);
  if constexpr (STATES == 8)
    if (n + 4 <= states) f(std::integral_constant<int, 4>(), n), n += 4;
  if (n + 2 <= states) f(std::integral_constant<int, 2>(), n), n += 2;
  if (n < states) f(std::integral_constant<int, 1>(), n);
}

template <class S>
inline void fill_zero(S* p, int64_t count) {
  std::memset(p, 0, count * sizeof(S));
}

// One work item: its place, and the tile of the chunk it is at.
template <class S>
struct ScanTile {
  using L = Lanes<S>;
  using V = typename L::V;
  static constexpr Type OWN = std::is_same_v<S, float> ? Type::f32 : Type::f64;

  const ScanArgs& a;
  int64_t row, first, count;  // of the batch; of the channels; channels that are there
  int64_t width;              // channels in scratch, whole vectors: those beyond `count` are zero
  S *rates, *h;               // [state][channel]
  S *dt, *input, *y;          // [token][channel]
  const S *B, *C;             // [token][state], `B_step` and `C_step` apart
  int64_t B_step, C_step;
  S *bias, *D;                // [channel]
  S *line;                    // one row, while it is packed
  S *packed_B, *packed_C;
  uint8_t* reset;             // [token]
  int64_t start = 0;          // the chunk's first token
  int steps = 0;

  // Lays out the arrays and touches none: `open` comes before the first chunk.
  ScanTile(const ScanArgs& args, int64_t item, int64_t group, Arena& memory) : a(args) {
    const int64_t groups = (a.width + group - 1) / group;
    row = item / groups, first = item % groups * group;
    count = a.width - first < group ? a.width - first : group;
    width = (count + L::COUNT - 1) / L::COUNT * L::COUNT;
    rates = memory.take<S>(a.states * group), h = memory.take<S>(a.states * group);
    dt = memory.take<S>(SCAN_CHUNK * group), input = memory.take<S>(SCAN_CHUNK * group);
    y = memory.take<S>(SCAN_CHUNK * group);
    packed_B = memory.take<S>(SCAN_CHUNK * a.states), packed_C = memory.take<S>(SCAN_CHUNK * a.states);
    bias = memory.take<S>(group), D = memory.take<S>(group), line = memory.take<S>(group);
    reset = memory.take<uint8_t>(SCAN_CHUNK);
  }

  // What stays the same from chunk to chunk.
  void open() {
    pack(a.dt_bias, first * a.dt_bias.stride[0], a.dt_bias.stride[0], bias);
    pack(a.D, first * a.D.stride[0], a.D.stride[0], D);
    for (int64_t n = 0; n < a.states; ++n) {
      S* here = rates + n * width;
      pack(a.A, first * a.A.stride[0] + n * a.A.stride[1], a.A.stride[0], here);
      for (int64_t i = 0; i < width; ++i) here[i] *= S(LOG2E);
    }
  }

  // `count` numbers and zeros up to a whole vector; all zeros for an absent tensor.
  void pack(const View& v, int64_t offset, int64_t stride, S* to) const {
    const int64_t there = v ? count : 0;
    if (v) load_row(v, offset, stride, count, to);
    if (there < width) fill_zero(to + there, width - there);
  }

  // A row of tensor (b t d) as whole vectors: in place if it is that already, else packed into `to`.
  const S* channels(const View& v, int64_t t, S* to) const {
    const int64_t offset = row * v.stride[0] + (start + t) * v.stride[1] + first * v.stride[2];
    if (v && v.type == OWN && v.stride[2] == 1 && count == width) return static_cast<const S*>(v.data) + offset;
    pack(v, offset, v.stride[2], to);
    return to;
  }

  void put_channels(const View& v, int64_t t, const S* from) const {
    store_row(v, row * v.stride[0] + (start + t) * v.stride[1] + first * v.stride[2], v.stride[2], count, from);
  }

  // [state][channel] from and to a state (b d n).
  void load_state(const View& v, S* to) const {
    for (int64_t n = 0; n < a.states; ++n)
      pack(v, row * v.stride[0] + first * v.stride[1] + n * v.stride[2], v.stride[1], to + n * width);
  }

  void store_state(const View& v, const S* from) const {
    for (int64_t n = 0; n < a.states; ++n)
      store_row(v, row * v.stride[0] + first * v.stride[1] + n * v.stride[2], v.stride[1], count, from + n * width);
  }

  // [state][channel] from and to the states between chunks, (k b n d).
  S* kept(int64_t n) const {
    return static_cast<S*>(a.before.data) +
           ((start / SCAN_CHUNK * a.batch + row) * a.states + n) * a.width + first;
  }

  // The chunk's rows of B or C (b t n), in place if they can be read there.
  const S* states_of(const View& v, S* to, int64_t& step) const {
    const int64_t offset = row * v.stride[0] + start * v.stride[1];
    step = v.type == OWN && v.stride[2] == 1 ? v.stride[1] : a.states;
    if (v.type == OWN && v.stride[2] == 1) return static_cast<const S*>(v.data) + offset;
    for (int t = 0; t < steps; ++t)
      load_row(v, offset + t * v.stride[1], v.stride[2], a.states, to + t * a.states);
    return to;
  }

  // The chunk that begins at token `at`: dt and dt x after bias and softplus, B, C, and y = D x. `slope`: what
  // softplus multiplies a gradient by, for the backward pass.
  void load_chunk(int64_t at, S* slope = nullptr) {
    start = at, steps = int(a.tokens - at < SCAN_CHUNK ? a.tokens - at : SCAN_CHUNK);
    B = states_of(a.B, packed_B, B_step), C = states_of(a.C, packed_C, C_step);
    for (int t = 0; t < steps; ++t) {
      const auto* r = static_cast<const uint8_t*>(a.reset.data);
      reset[t] = r ? r[row * a.reset.stride[0] + (at + t) * a.reset.stride[1]] : 0;
      S *dt_t = dt + t * width, *input_t = input + t * width, *y_t = y + t * width;
      const S *x = channels(a.x, t, line), *raw = channels(a.dt, t, dt_t);
      for (int64_t i = 0; i < width; i += L::COUNT) {
        V step = L::load(raw + i) + L::load(bias + i), v = L::load(x + i);
        if (slope) L::store(slope + t * width + i, a.dt_softplus ? sigmoid<L>(step) : L::broadcast(1));
        if (a.dt_softplus) step = softplus<L>(step);
        L::store(dt_t + i, step), L::store(input_t + i, step * v), L::store(y_t + i, v * L::load(D + i));
      }
    }
  }

  // Asks for one of the `parts` of a chunk's rows of a tensor (b t d) ahead of time, to be read or to be written. Rows
  // lie in different pages, where the processor's own prefetching stops; between two pieces of arithmetic the
  // requests cost next to nothing. (Inlined by force: GCC takes a function that only prefetches for one without effect
  // and drops the call.)
  template <bool WRITE = false>
  HYBRID_LM_FN void prefetch(const View& v, int64_t at, int64_t part, int64_t parts) const {
    if (!v || at < 0) return;
    const int64_t size = v.type == Type::f64 ? 8 : v.type == Type::f32 ? 4 : 2;
    const int64_t end = at + SCAN_CHUNK < a.tokens ? at + SCAN_CHUNK : a.tokens;
    for (int64_t t = at + part; t < end; t += parts) {
      const char* p = static_cast<const char*>(v.data) +
                      (row * v.stride[0] + t * v.stride[1] + first * v.stride[2]) * size;
      for (int64_t byte = 0; byte < count * v.stride[2] * size; byte += 64) __builtin_prefetch(p + byte, WRITE, 2);
    }
  }

  // The tokens of the chunk for the vector of channels at `i`, states from `n` on.
  ScanTokens<L> tokens(int64_t i, int64_t n) const {
    return {steps, width / L::COUNT, reinterpret_cast<const V*>(dt + i), reinterpret_cast<const V*>(input + i),
            B + n, C + n, B_step, C_step, reset};
  }
  V* lanes(S* p, int64_t i, int64_t n = 0) const { return reinterpret_cast<V*>(p + n * width + i); }
};

// A tile of the item in this thread's scratch memory.
template <class Tile, class Args>
HYBRID_LM_FN Tile tile_of(const Args& a, int64_t item, int64_t group) {
  Arena needed;
  Tile(a, item, group, needed);
  Arena memory{static_cast<char*>(scratch(needed.bytes))};
  return Tile(a, item, group, memory);
}

}  // namespace HYBRID_LM_ISA
}  // namespace hybrid_lm
