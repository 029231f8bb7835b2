// The selective scan, forward.
#include "cpu/kernels/scan.h"

namespace hybrid_lm {
namespace HYBRID_LM_ISA {
namespace {

// y * silu(z), written out.
template <class S>
void finish_chunk(const ScanTile<S>& v) {
  using L = Lanes<S>;
  for (int t = 0; t < v.steps; ++t) {
    S* y = v.y + t * v.width;
    if (v.a.z) {
      const S* z = v.channels(v.a.z, t, v.line);
      for (int64_t i = 0; i < v.width; i += L::COUNT) L::store(y + i, L::load(y + i) * silu<L>(L::load(z + i)));
    }
    v.put_channels(v.a.y, t, y);
  }
}

template <class S>
void scan_item(const ScanArgs& a, int64_t item, int64_t group) {
  using L = Lanes<S>;
  auto v = tile_of<ScanTile<S>>(a, item, group);
  v.open();
  v.load_state(a.initial, v.h);
  for (int64_t at = 0; at < a.tokens; at += SCAN_CHUNK) {
    v.load_chunk(at);
    if (a.before)
      for (int64_t n = 0; n < a.states; ++n) std::memcpy(v.kept(n), v.h + n * v.width, v.count * sizeof(S));
    const int64_t pieces = (a.states + STATES - 1) / STATES * (v.width / L::COUNT);
    int64_t piece = 0;
    for_state_blocks(a.states, [&](auto size, int64_t n) {
      for (int64_t i = 0; i < v.width; i += L::COUNT, ++piece) {
        for (const View* next : {&a.x, &a.dt, &a.z}) v.prefetch(*next, at + SCAN_CHUNK, piece, pieces);
        v.template prefetch<true>(a.y, at, piece, pieces);
        scan_forward<size()>(v.tokens(i, n), v.lanes(v.rates, i, n), v.lanes(v.h, i, n), v.width / L::COUNT,
                             v.lanes(v.y, i));
      }
    });
    finish_chunk(v);
  }
  v.store_state(a.state, v.h);
}

template <class S>
void run(const ScanArgs& a) {
  const int64_t group = scan_group(a), items = a.batch * ((a.width + group - 1) / group);
  for_each_item(a.parallel, items, a.batch * a.tokens * a.width * a.states,
                [&](int64_t item) { scan_item<S>(a, item, group); });
}

}  // namespace

void scan(const ScanArgs& a) { a.x.type == Type::f64 ? run<double>(a) : run<float>(a); }

}  // namespace HYBRID_LM_ISA
}  // namespace hybrid_lm
