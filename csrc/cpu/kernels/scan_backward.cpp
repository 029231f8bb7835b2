// The selective scan, backward: chunk by chunk from the end, each computed again from the state before it.
#include <cstdlib>

#include "cpu/kernels/scan.h"

namespace hybrid_lm {
namespace HYBRID_LM_ISA {
namespace {

// Sums that several work items have parts of, one part each, added at the end in a fixed order.
template <class S>
struct Parts {
  S *gB, *gC;         // [group][b][t][n]
  S *gA;              // [b][n][d]
  S *gD, *gdt_bias;   // [b][d]
};

template <class S>
struct ScanGradTile : ScanTile<S> {
  using L = Lanes<S>;
  using V = typename L::V;
  const ScanGradArgs& args;
  S *gh, *gA;             // [state][channel]: what later tokens ask of the state; the gradient of A
  S *gout, *ginput, *gdt;  // [token][channel]
  S *dt_slope, *gate;      // [token][channel]: what softplus, and y before the gate, are multiplied by
  S *gD, *gbias;          // [channel]
  void* trace;            // ScanTrace<N>[token]

  ScanGradTile(const ScanGradArgs& a, int64_t item, int64_t group, Arena& memory)
      : ScanTile<S>(a, item, group, memory), args(a) {
    gh = memory.take<S>(a.states * group), gA = memory.take<S>(a.states * group);
    gout = memory.take<S>(SCAN_CHUNK * group), ginput = memory.take<S>(SCAN_CHUNK * group);
    gdt = memory.take<S>(SCAN_CHUNK * group);
    dt_slope = memory.take<S>(SCAN_CHUNK * group), gate = memory.take<S>(SCAN_CHUNK * group);
    gD = memory.take<S>(group), gbias = memory.take<S>(group);
    trace = memory.take<ScanTrace<STATES, V>>(SCAN_CHUNK);
  }

  void open() {
    ScanTile<S>::open();
    fill_zero(gA, this->a.states * this->width), fill_zero(gD, this->width), fill_zero(gbias, this->width);
  }

  // gout = gy silu(z): what the gated output asks of the sum under the gate; and what z gets of that sum.
  void load_gradients() {
    for (int t = 0; t < this->steps; ++t) {
      const int64_t at = t * this->width;
      const S* gy = this->channels(args.gy, t, gout + at);
      const S* z = this->a.z ? this->channels(this->a.z, t, this->line) : nullptr;
      for (int64_t i = 0; i < this->width; i += L::COUNT) {
        V g = L::load(gy + i);
        if (z) {
          const V v = L::load(z + i), s = sigmoid<L>(v);
          L::store(gate + at + i, g * silu_slope<L>(v, s));
          g = g * (v * s);
        }
        L::store(gout + at + i, g);
      }
    }
    fill_zero(ginput, this->steps * this->width), fill_zero(gdt, this->steps * this->width);
  }

  // Asks for one of the `parts` of the states before the chunk that comes next.
  HYBRID_LM_FN void prefetch_state(int64_t part, int64_t parts) const {
    for (int64_t n = part; n < this->a.states; n += parts) {
      const char* p = reinterpret_cast<const char*>(this->kept(n) - this->a.batch * this->a.states * this->a.width);
      for (int64_t byte = 0; byte < this->count * int64_t(sizeof(S)); byte += 64) __builtin_prefetch(p + byte, 0, 2);
    }
  }

  // The chunk's part of the recurrence: y, ginput, gdt, gA, gh, and the items' parts of gB and gC.
  void recur(S* gB, S* gC) {
    const int64_t step = this->width / L::COUNT, before = this->start - SCAN_CHUNK;
    const int64_t pieces = (this->a.states + STATES - 1) / STATES * step;
    int64_t piece = 0;
    for_state_blocks(this->a.states, [&](auto size, int64_t n) {
      constexpr int N = size();
      auto* kept = static_cast<ScanTrace<N, V>*>(trace);
      for (int t = 0; t < this->steps; ++t) fill_zero(kept[t].gB, 2 * N);
      for (int64_t i = 0; i < this->width; i += L::COUNT, ++piece) {
        for (const View* next : {&args.x, &args.dt, &args.z, &args.gy}) this->prefetch(*next, before, piece, pieces);
        for (const View* out : {&args.gx, &args.gdt, &args.gz})
          this->template prefetch<true>(*out, this->start, piece, pieces);
        if (this->start && n == 0) prefetch_state(i / L::COUNT, step);
        const auto tokens = this->tokens(i, n);
        const V *A = this->lanes(this->rates, i, n), *out = this->lanes(gout, i);
        scan_recompute<N>(tokens, A, this->lanes(this->h, i, n), step, out, kept, this->lanes(this->y, i));
        scan_reverse<N>(tokens, A, this->lanes(gh, i, n), this->lanes(gA, i, n), step, out, kept,
                        this->lanes(ginput, i), this->lanes(gdt, i));
      }
      for (int t = 0; t < this->steps; ++t)
        for (int k = 0; k < N; ++k) {
          gB[t * this->a.states + n + k] = L::sum(kept[t].gB[k]);
          gC[t * this->a.states + n + k] = L::sum(kept[t].gC[k]);
        }
    });
  }

  // Through the gate, D x, dt x, and softplus: the gradients of z, x and dt, written out.
  void finish_chunk() {
    const ScanArgs& a = this->a;
    for (int t = 0; t < this->steps; ++t) {
      const int64_t at = t * this->width;
      const S* x = this->channels(a.x, t, this->line);
      for (int64_t i = 0; i < this->width; i += L::COUNT) {
        const V v = L::load(x + i), out = L::load(gout + at + i), gi = L::load(ginput + at + i);
        const V step = L::load(this->dt + at + i);
        const V gstep = (L::load(gdt + at + i) * S(1 / LOG2E) + gi * v) * L::load(dt_slope + at + i);
        L::store(gdt + at + i, gstep);
        L::store(ginput + at + i, gi * step + out * L::load(this->D + i));
        L::store(gD + i, L::load(gD + i) + out * v);
        L::store(gbias + i, L::load(gbias + i) + gstep);
      }
      this->put_channels(args.gdt, t, gdt + at);
      this->put_channels(args.gx, t, ginput + at);
      if (!a.z) continue;
      for (int64_t i = at; i < at + this->width; i += L::COUNT) L::store(gate + i, L::load(gate + i) * L::load(this->y + i));
      this->put_channels(args.gz, t, gate + at);
    }
  }
};

template <class S>
void scan_item(const ScanGradArgs& a, int64_t item, int64_t group, const Parts<S>& parts) {
  auto v = tile_of<ScanGradTile<S>>(a, item, group);
  v.open();
  v.load_state(a.gstate, v.gh);
  const int64_t rows = (v.first / group * a.batch + v.row) * a.tokens;
  for (int64_t at = (a.tokens - 1) / SCAN_CHUNK * SCAN_CHUNK; at >= 0; at -= SCAN_CHUNK) {
    v.load_chunk(at, v.dt_slope);
    for (int64_t n = 0; n < a.states; ++n) {
      std::memcpy(v.h + n * v.width, v.kept(n), v.count * sizeof(S));
      fill_zero(v.h + n * v.width + v.count, v.width - v.count);
    }
    v.load_gradients();
    v.recur(parts.gB + (rows + at) * a.states, parts.gC + (rows + at) * a.states);
    v.finish_chunk();
  }
  v.store_state(a.ginitial, v.gh);
  for (int64_t n = 0; n < a.states; ++n)
    std::memcpy(parts.gA + (v.row * a.states + n) * a.width + v.first, v.gA + n * v.width, v.count * sizeof(S));
  std::memcpy(parts.gD + v.row * a.width + v.first, v.gD, v.count * sizeof(S));
  std::memcpy(parts.gdt_bias + v.row * a.width + v.first, v.gbias, v.count * sizeof(S));
}

// to[i] = sum over k of parts[k * stride + i], in the order of k; in the place of part 0.
template <class S>
S* add_parts(S* parts, int64_t n_parts, int64_t stride, int64_t count) {
  for (int64_t k = 1; k < n_parts; ++k)
    for (int64_t i = 0; i < count; ++i) parts[i] += parts[k * stride + i];
  return parts;
}

template <class S>
void run(const ScanGradArgs& a) {
  const int64_t group = scan_group(a), groups = (a.width + group - 1) / group;
  const int64_t per_token = a.batch * a.tokens * a.states, per_state = a.states * a.width;
  // At least one part of each: without channels or sequences it is the sum, zeros.
  const int64_t token_parts = groups ? groups : 1, state_parts = a.batch ? a.batch : 1;
  const size_t bytes = (2 * token_parts * per_token + state_parts * (per_state + 2 * a.width)) * sizeof(S);
  S* all = static_cast<S*>(std::malloc(bytes));
  if (!groups || !a.batch) std::memset(all, 0, bytes);
  Parts<S> parts;
  parts.gB = all, parts.gC = parts.gB + token_parts * per_token, parts.gA = parts.gC + token_parts * per_token;
  parts.gD = parts.gA + state_parts * per_state, parts.gdt_bias = parts.gD + state_parts * a.width;
  for_each_item(a.parallel, a.batch * groups, 2 * a.batch * a.tokens * a.width * a.states,
                [&](int64_t item) { scan_item<S>(a, item, group, parts); });
  // A stretch of tokens per item.
  const int64_t rows = a.batch * a.tokens, block = 256, blocks = (rows + block - 1) / block;
  for_each_item(a.parallel, blocks, groups * per_token, [&](int64_t item) {
    const int64_t from = item * block, count = rows - from < block ? rows - from : block;
    S* gB = add_parts(parts.gB + from * a.states, groups, per_token, count * a.states);
    S* gC = add_parts(parts.gC + from * a.states, groups, per_token, count * a.states);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = (from + i) / a.tokens, t = (from + i) % a.tokens;
      store_row(a.gB, b * a.gB.stride[0] + t * a.gB.stride[1], a.gB.stride[2], a.states, gB + i * a.states);
      store_row(a.gC, b * a.gC.stride[0] + t * a.gC.stride[1], a.gC.stride[2], a.states, gC + i * a.states);
    }
  });
  add_parts(parts.gA, a.batch, per_state, per_state);
  for (int64_t n = 0; n < a.states; ++n)
    store_row(a.gA, n * a.gA.stride[1], a.gA.stride[0], a.width, parts.gA + n * a.width);
  if (a.gD) store_row(a.gD, 0, a.gD.stride[0], a.width, add_parts(parts.gD, a.batch, a.width, a.width));
  if (a.gdt_bias)
    store_row(a.gdt_bias, 0, a.gdt_bias.stride[0], a.width, add_parts(parts.gdt_bias, a.batch, a.width, a.width));
  std::free(all);
}

}  // namespace

void scan_backward(const ScanGradArgs& a) { a.x.type == Type::f64 ? run<double>(a) : run<float>(a); }

}  // namespace HYBRID_LM_ISA
}  // namespace hybrid_lm
