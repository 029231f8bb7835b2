// SSD, a few tokens (decoding): the recurrence as it stands. The time goes into reading and writing the state once,
// which stays as the caller has it, (p n).
#include "cpu/kernels/ssd.h"

namespace hybrid_lm {
namespace HYBRID_LM_ISA {
namespace {

// What the rows of one head's state share.
template <class S>
struct Head {
  Matrix<S> B, C;  // [token][n]
  Matrix<S> x, y;  // [token][p]
  Matrix<S> row;   // one row of a state that cannot be used where it lies
  Steps<S> steps;
  S decay[SSD_CHUNK];
  bool fresh[SSD_CHUNK];  // nothing that stands before the token reaches it

  Head(MatrixArena& m, const SsdSizes<S>& size)
      : B(m.matrix<S>(size.tokens, size.states)),
        C(m.matrix<S>(size.tokens, size.states)),
        x(m.matrix<S>(size.tokens, size.head_dim)),
        y(m.matrix<S>(size.tokens, size.head_dim)),
        row(m.matrix<S>(1, size.states)) {}

  void load(const SsdArgs& a, int64_t batch, int64_t head) {
    const SsdSizes<S> size(a);
    const Segment all{0, a.tokens, false, true};
    const int64_t group = head / (a.heads / a.groups);
    load_tokens(a.B, batch, all, group, a.states, a.tokens, size.states, B);
    load_tokens(a.C, batch, all, group, a.states, a.tokens, size.states, C);
    load_tokens(a.x, batch, all, head, a.head_dim, a.tokens, size.head_dim, x);
    steps.load_dt(a, batch, head, all, size.tokens);
    const S rate = value(a.A, head, S(0)) * S(LOG2E);
    for (int64_t t = 0; t < size.tokens; t += Lanes<S>::COUNT)
      Lanes<S>::store(decay + t, Lanes<S>::exp2(Lanes<S>::load(steps.dt + t) * rate));
    for (int64_t t = 0; t < a.tokens; ++t) fresh[t] = resets(a, batch, t) || (t == 0 && !a.initial);
  }
};

// One row p of the state: S = a S + dt x_p B, y_p = S . C, token by token.
template <class S>
HYBRID_LM_FN void run_row(const Head<S>& h, int64_t tokens, int64_t states, S D, int64_t p, const S* from, S* to) {
  using L = Lanes<S>;
  for (int64_t t = 0; t < tokens; ++t, from = to) {
    const S decay = h.decay[t], x = h.x.row(t)[p], write = h.steps.dt[t] * x;
    const S *B = h.B.row(t), *C = h.C.row(t);
    typename L::V sum{};
    for (int64_t n = 0; n < states; n += L::COUNT) {
      typename L::V s = write * L::load(B + n);
      if (!h.fresh[t]) s += decay * L::load(from + n);
      L::store(to + n, s);
      sum += s * L::load(C + n);
    }
    h.y.row(t)[p] = L::sum(sum) + D * x;
  }
}

// A row of a state (b h p n) where it lies, or null if its elements are not whole vectors of type S.
template <class S>
S* in_place(const View& v, int64_t offset, int64_t states) {
  bool fits = v && v.type == (sizeof(S) == 4 ? Type::f32 : Type::f64) && v.stride[3] == 1;
  return fits && states % Lanes<S>::COUNT == 0 ? static_cast<S*>(v.data) + offset : nullptr;
}

template <class S>
void run_head(const SsdArgs& a, int64_t batch, int64_t head, Head<S>& h) {
  const int64_t states = padded<S>(a.states);
  const S D = value(a.D, head, S(0));
  h.load(a, batch, head);
  for (int64_t p = 0; p < a.head_dim; ++p) {
    auto offset = [&](const View& v) { return batch * v.stride[0] + head * v.stride[1] + p * v.stride[2]; };
    const S* from = in_place<S>(a.initial, offset(a.initial), a.states);
    S* to = in_place<S>(a.state, offset(a.state), a.states);
    if (!from) {
      from = h.row.data;
      if (a.initial) load_row(a.initial, offset(a.initial), a.initial.stride[3], a.states, h.row.data);
      for (int64_t n = a.states; n < states; ++n) h.row.data[n] = 0;
    }
    run_row(h, a.tokens, states, D, p, from, to ? to : h.row.data);
    if (!to && a.state) store_row(a.state, offset(a.state), a.state.stride[3], a.states, h.row.data);
  }
  store_tokens(a.y, batch, {0, a.tokens, false, true}, head, a.head_dim, h.y);
}

template <class S>
void run(const SsdArgs& a) {
  const SsdSizes<S> size(a);
  const int64_t operations = 4 * a.batch * a.tokens * a.heads * a.head_dim * a.states;
  for_each_item(a.parallel, a.batch * a.heads, operations, [&](int64_t i) {
    MatrixArena count;
    Head<S>(count, size);
    MatrixArena arena{static_cast<char*>(scratch(count.bytes))};
    Head<S> h(arena, size);
    run_head(a, i / a.heads, i % a.heads, h);
  });
}

}  // namespace

void ssd_steps(const SsdArgs& a) { a.x.type == Type::f64 ? run<double>(a) : run<float>(a); }

}  // namespace HYBRID_LM_ISA
}  // namespace hybrid_lm
