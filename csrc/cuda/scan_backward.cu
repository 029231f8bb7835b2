// The selective scan, backward: from the last stretch of SCAN_CHUNK tokens to the first.
//
// Of a stretch the state before it is known. A first pass computes the states before each group of tokens; then, from
// the last group to the first, a group's decays and states are computed once more, into registers, and walked back. So
// each token and state needs two exponentials, and nothing of the size of all states goes to memory.
//
// LANES lanes of a warp have STATES states each of PER neighbouring channels: what the lane has to say of the gradients
// of B and C is summed over these before it is summed over a warp, and over the warps of a block, in shared memory;
// over blocks by a second kernel. No sum is done by atomic additions: a call gives the same bits every time.
//
// What there is once for a token and channel (dt, x, z and the gradients of all of them) is loaded, computed and written
// by one lane, its owner, which gives the others what they need of it through shared memory. All that lanes of a warp
// give each other is in memory that the warp has for itself.
#include "cuda/scan.cuh"

namespace hybrid_lm {
namespace {

// BLOCKS: how many shall run on a processor at the same time, which limits the registers of each.
template <int LANES_, int STATES_, int PER_, int THREADS_, int GROUP_, int BLOCKS_>
struct Shape : ScanLanes<LANES_, STATES_, THREADS_, GROUP_> {
  using Lanes = ScanLanes<LANES_, STATES_, THREADS_, GROUP_>;
  using Lanes::GROUP, Lanes::LANES, Lanes::THREADS;
  static constexpr int PER = PER_, BLOCKS = BLOCKS_;
  static constexpr int CHANNELS = Lanes::SETS * PER;      // of a block
  static constexpr int NEAR = 32 / LANES;                 // sets of lanes in a warp
  static constexpr int WARPS = THREADS / 32;
  static constexpr int GROUPS = int(SCAN_CHUNK) / GROUP;  // of a stretch
  // A group's tokens and a set's channels are owned by these lanes, OWN by each; neighbours have neighbouring channels.
  static constexpr int OWNERS = GROUP * PER < LANES ? GROUP * PER : LANES;
  static constexpr int OWN = GROUP * PER / OWNERS;
  static constexpr int SAME = LANES / OWNERS;   // only the first of so many lanes is an owner
  static constexpr int BATCH = OWNERS / PER;    // tokens of which each owner has one: they are summed together
  // Two numbers for each of one or two channels: what one access takes.
  static constexpr int PIECE = PER > 1 ? 4 : 2, PAIRS = 2 * PER / PIECE;
  static_assert(PER <= OWNERS && OWNERS * OWN == GROUP * PER && BATCH * OWN == GROUP && GROUPS * GROUP == SCAN_CHUNK);
};

// What a lane has to say, so laid out that lanes write and read it side by side: the rows are shifted against each
// other by as many of the 32 banks as the next lanes of the same access take.
template <class Shape>
struct Rows {
  // Of the gradients of B and C: [token][B, C][set][state].
  static constexpr int WIDE = Shape::NEAR * Shape::WIDTH + (Shape::WIDTH < 32 ? Shape::WIDTH : 0);
  float matrices[Shape::BATCH][2][WIDE];
  // Of the gradients of the input and of the step: [token][pair][lane][set]. The sets that one access takes with all
  // their lanes are SIDE banks wide, which an odd number of times lies between two lanes.
  static constexpr int SETS = 32 / Shape::PIECE / Shape::LANES, SIDE = (SETS < 1 ? 1 : SETS) * Shape::PIECE;
  float inputs[Shape::BATCH][Shape::PAIRS][Shape::LANES][(Shape::NEAR * Shape::PIECE / SIDE | 1) * SIDE];
};

// A warp's own.
template <class Shape>
struct alignas(16) WarpShared {
  // What owners give: {step, step * x} of one channel or two; the gradient of what is read out.
  Floats<Shape::PIECE> given[Shape::GROUP][Shape::PAIRS][Shape::NEAR];
  Floats<Shape::PER> out[Shape::GROUP][Shape::NEAR];
  // What an owner keeps until it has need of it: x, dt's slope, the gate's gradient for each unit of y. There are few
  // registers.
  float x[Shape::OWN][32], slope[Shape::OWN][32], gate[Shape::OWN][32];
  // Its channel's; and what it adds up for that.
  float D[32], bias[32], gD[32], gbias[32];
  int most[32];      // tokens of a group that it can have: none of a channel that is not there
  int first[32], channels[32];  // the set's first channel, and how many of them are there
  int64_t kept[32];             // where the set's states are, among those of a row that the forward pass kept
  union {
    Rows<Shape> rows;
    float y[Shape::GROUP][Shape::LANES][Shape::NEAR * Shape::PER];  // each lane's part, before the way back
  };
};

// A stretch's rows, the same for all channels of a block; and the marks of each group, two bits for a token.
template <class Shape>
struct alignas(16) Stretch {
  float B[int(SCAN_CHUNK)][Shape::WIDTH];
  float C[int(SCAN_CHUNK)][Shape::WIDTH];
  unsigned marks[Shape::GROUPS];
};

template <class Shape>
struct Shared {
  Stretch<Shape> stage;
  // The states before each group.
  Floats<Shape::VEC> starts[Shape::GROUPS][Shape::PER * Shape::STATES / Shape::VEC][Shape::THREADS];
  WarpShared<Shape> warps[Shape::WARPS];
  float sums[2][Shape::WARPS][Shape::GROUP][2][Shape::WIDTH];  // of the gradients of B and C, by turns
};

// Where sums over blocks and over the batch are put together; each part as the tensor itself.
struct Parts {
  int64_t blocks;               // of channels, for which gB and gC have a part each
  float *gB, *gC;               // [block](b t n)
  float *gA, *gD, *gdt_bias;    // [row](d n), [row](d), [row](d)
  int64_t tokens, rates, count;  // of one part of gB; of gA; of all
};

inline Parts parts_of(const ScanGradArgs& a, int64_t channels) {
  // Enough blocks to fill a device twice over; a block that has several groups of channels adds them up itself.
  const int64_t groups = (a.width + channels - 1) / channels, rows = a.batch ? a.batch : 1;
  const int64_t wanted = 264 / rows < 1 ? 1 : 264 / rows, rounds = (groups + wanted - 1) / wanted;
  Parts p;
  p.blocks = rounds ? (groups + rounds - 1) / rounds : 0;
  p.tokens = a.batch * a.tokens * a.states, p.rates = a.width * a.states;
  p.gB = a.scratch, p.gC = p.gB + p.blocks * p.tokens;
  p.gA = p.gC + p.blocks * p.tokens;
  p.gD = p.gA + a.batch * p.rates, p.gdt_bias = p.gD + a.batch * a.width;
  p.count = 2 * p.blocks * p.tokens + a.batch * (p.rates + 2 * a.width);
  return p;
}

// Where a lane is, and what it owns.
template <class Shape>
struct Place {
  unsigned lane, set;     // of the channels'; of the warp's
  int64_t row;            // of the batch
  int first, channel;     // of its channels; that it owns tokens of
  int token;              // the first of these in a group; the next are BATCH apart
  bool there, writes;     // the channel exists; and this lane owns it

  HYBRID_LM_DEVICE Place(const ScanArgs& a, int64_t row, int64_t block) : row(row) {
    lane = threadIdx.x % Shape::LANES, set = threadIdx.x % 32 / Shape::LANES;
    first = int(block) * Shape::CHANNELS + int(threadIdx.x / Shape::LANES) * Shape::PER;
    const int owner = int(lane) / Shape::SAME;
    channel = first + owner % Shape::PER, token = owner / Shape::PER;
    there = channel < a.width;
    writes = lane % Shape::SAME == 0;
    if (!there) channel = int(a.width) - 1;
  }

  HYBRID_LM_DEVICE int own() const { return int(lane) / Shape::SAME % Shape::PER; }
};

// What a lane has of the tokens that it owns, of one group, on its way; the place moves from group to group. Between
// groups 64 bits keep it, and inside of one 32 are enough (`in_rows` of bind.h).
template <class T, class Shape>
struct Owned {
  using Bits = typename T::Bits;
  const Bits *x_at, *dt_at, *z_at, *gy_at;
  Bits x[Shape::OWN], dt[Shape::OWN], z[Shape::OWN], gy[Shape::OWN];

  HYBRID_LM_DEVICE Owned(const ScanGradArgs& a, const Place<Shape>& at, int64_t token)
      : x_at(scan_at<T>(a.x, at.row, token, at.channel)), dt_at(scan_at<T>(a.dt, at.row, token, at.channel)),
        z_at(a.z ? scan_at<T>(a.z, at.row, token, at.channel) : nullptr),
        gy_at(a.gy ? scan_at<T>(a.gy, at.row, token, at.channel) : nullptr), x{}, dt{}, z{}, gy{} {}

  static HYBRID_LM_DEVICE void fetch_one(Bits (&to)[Shape::OWN], const Bits* from, int64_t stride, int left) {
    HYBRID_LM_UNROLL
    for (int j = 0; j < Shape::OWN; ++j)
      to[j] = j * Shape::BATCH < left ? from[unsigned(j * Shape::BATCH) * unsigned(stride)] : Bits(0);
  }

  // `left` tokens are there. Two of the four are enough for the states.
  HYBRID_LM_DEVICE void fetch(const ScanGradArgs& a, int left, bool all) {
    fetch_one(x, x_at, a.x.stride[1], left);
    fetch_one(dt, dt_at, a.dt.stride[1], left);
    if (!all) return;
    if (z_at) fetch_one(z, z_at, a.z.stride[1], left);
    if (gy_at) fetch_one(gy, gy_at, a.gy.stride[1], left);
  }

  HYBRID_LM_DEVICE void forward(const ScanGradArgs& a, unsigned tokens) {
    x_at += tokens * unsigned(a.x.stride[1]), dt_at += tokens * unsigned(a.dt.stride[1]);
    if (z_at) z_at += tokens * unsigned(a.z.stride[1]);
    if (gy_at) gy_at += tokens * unsigned(a.gy.stride[1]);
  }

  HYBRID_LM_DEVICE void back(const ScanGradArgs& a, unsigned tokens) {
    x_at -= tokens * unsigned(a.x.stride[1]), dt_at -= tokens * unsigned(a.dt.stride[1]);
    if (z_at) z_at -= tokens * unsigned(a.z.stride[1]);
    if (gy_at) gy_at -= tokens * unsigned(a.gy.stride[1]);
  }
};

// The rows of a stretch, from memory to shared memory; 0 beyond the last token and state.
template <class T, class Shape>
HYBRID_LM_DEVICE void fill(const ScanArgs& a, int64_t row, int64_t start, Stretch<Shape>& stage) {
  using Bits = typename T::Bits;
  const Bits *from_B = scan_at<T>(a.B, row, start, 0), *from_C = scan_at<T>(a.C, row, start, 0);
  HYBRID_LM_UNROLL_BY(2)
  for (int at = int(threadIdx.x); at < int(SCAN_CHUNK) * Shape::WIDTH; at += Shape::THREADS) {
    const int t = at / Shape::WIDTH, n = at % Shape::WIDTH;
    const bool there = start + t < a.tokens && n < a.states;
    (&stage.B[0][0])[at] = there ? T::wide(from_B[t * a.B.stride[1] + n]) : 0.0f;
    (&stage.C[0][0])[at] = there ? T::wide(from_C[t * a.C.stride[1] + n]) : 0.0f;
  }
  for (int g = int(threadIdx.x); g < Shape::GROUPS; g += Shape::THREADS) {
    stage.marks[g] = 0;
    for (int i = 0; i < Shape::GROUP; ++i)
      stage.marks[g] |= unsigned(mark_of(a, row, start + g * Shape::GROUP + i)) << 2 * i;
  }
}

// A lane's states of all its channels.
template <class Shape>
using States = float[Shape::PER][Shape::STATES];

template <class Shape>
HYBRID_LM_DEVICE void put_start(Shared<Shape>& shared, int g, const States<Shape>& h) {
  HYBRID_LM_UNROLL
  for (int i = 0; i < Shape::PER * Shape::STATES; i += Shape::VEC) {
    Floats<Shape::VEC> piece;
    HYBRID_LM_UNROLL
    for (int k = 0; k < Shape::VEC; ++k) piece.at[k] = h[(i + k) / Shape::STATES][(i + k) % Shape::STATES];
    shared.starts[g][i / Shape::VEC][threadIdx.x] = piece;
  }
}

template <class Shape>
HYBRID_LM_DEVICE void take_start(const Shared<Shape>& shared, int g, States<Shape>& h) {
  HYBRID_LM_UNROLL
  for (int i = 0; i < Shape::PER * Shape::STATES; i += Shape::VEC) {
    const auto piece = shared.starts[g][i / Shape::VEC][threadIdx.x];
    HYBRID_LM_UNROLL
    for (int k = 0; k < Shape::VEC; ++k) h[(i + k) / Shape::STATES][(i + k) % Shape::STATES] = piece.at[k];
  }
}

template <class Shape>
HYBRID_LM_DEVICE void forget(States<Shape>& h) {
  HYBRID_LM_UNROLL
  for (int c = 0; c < Shape::PER; ++c) {
    HYBRID_LM_UNROLL
    for (int k = 0; k < Shape::STATES; ++k) h[c][k] = 0.0f;
  }
}

// What owners give of a group's token i, and take in its place.
template <class Shape>
HYBRID_LM_DEVICE void put_given(WarpShared<Shape>& mine, const Place<Shape>& at, int i, float step, float input) {
  float* to = mine.given[i][at.own() * 2 / Shape::PIECE][at.set].at + at.own() * 2 % Shape::PIECE;
  *reinterpret_cast<Floats<2>*>(to) = Floats<2>{step, input};
}

template <class Shape>
HYBRID_LM_DEVICE void take_given(const WarpShared<Shape>& mine, const Place<Shape>& at, int i,
                                 float (&step)[Shape::PER], float (&input)[Shape::PER]) {
  HYBRID_LM_UNROLL
  for (int p = 0; p < Shape::PAIRS; ++p) {
    const auto piece = mine.given[i][p][at.set];
    HYBRID_LM_UNROLL
    for (int k = 0; k < Shape::PIECE; k += 2) {
      const int c = (p * Shape::PIECE + k) / 2;
      step[c] = piece.at[k], input[c] = piece.at[k + 1];
    }
  }
}

// One token forward: the states and the decays into them.
template <class Shape>
HYBRID_LM_DEVICE void forward(States<Shape>& h, States<Shape>& decay, const States<Shape>& A,
                              const WarpShared<Shape>& mine, int i, const float* B_row, const Place<Shape>& at) {
  float B[Shape::STATES], step[Shape::PER], input[Shape::PER];
  take_given<Shape>(mine, at, i, step, input);
  scan_states<Shape>(B_row, at.lane, B);
  HYBRID_LM_UNROLL
  for (int c = 0; c < Shape::PER; ++c) {
    HYBRID_LM_UNROLL
    for (int k = 0; k < Shape::STATES; ++k) {
      decay[c][k] = Thread::exp2(step[c] * A[c][k]);
      h[c][k] = decay[c][k] * h[c][k] + input[c] * B[k];
    }
  }
}

// The mark of a group's token i.
HYBRID_LM_DEVICE unsigned mark_at(unsigned marks, int i) { return marks >> 2 * i & 3; }

// A group's tokens from `t` on, forward. Most groups have no marks: MARKED says whether there are any.
template <bool MARKED, class Shape>
HYBRID_LM_DEVICE void walk(States<Shape>& h, const States<Shape>& A, const WarpShared<Shape>& mine,
                           const Stretch<Shape>& stage, int t, unsigned marks, const Place<Shape>& at) {
  HYBRID_LM_UNROLL
  for (int i = 0; i < Shape::GROUP; ++i) {
    if (MARKED && mark_at(marks, i)) forget<Shape>(h);
    States<Shape> decay;
    forward<Shape>(h, decay, A, mine, i, stage.B[t + i], at);
  }
}

// The same, leaving each token's decays and the states behind it; and, for the gate, each lane's part of what is read
// out.
template <bool MARKED, class Shape>
HYBRID_LM_DEVICE void trace(States<Shape>& h, States<Shape> (&decays)[Shape::GROUP],
                            States<Shape> (&states)[Shape::GROUP], const States<Shape>& A, WarpShared<Shape>& mine,
                            const Stretch<Shape>& stage, int t, unsigned marks, const Place<Shape>& at, bool gated) {
  constexpr int PER = Shape::PER, STATES = Shape::STATES;
  HYBRID_LM_UNROLL
  for (int i = 0; i < Shape::GROUP; ++i) {
    // Beyond the last token nothing is written, and the way back leaves what later tokens ask as it is.
    if (MARKED && mark_at(marks, i) == BEYOND) {
      HYBRID_LM_UNROLL
      for (int c = 0; c < PER; ++c) {
        HYBRID_LM_UNROLL
        for (int k = 0; k < STATES; ++k) decays[i][c][k] = 1.0f, states[i][c][k] = 0.0f;
      }
      continue;
    }
    if (MARKED && mark_at(marks, i)) forget<Shape>(h);
    forward<Shape>(h, decays[i], A, mine, i, stage.B[t + i], at);
    HYBRID_LM_UNROLL
    for (int c = 0; c < PER; ++c) {
      HYBRID_LM_UNROLL
      for (int k = 0; k < STATES; ++k) states[i][c][k] = h[c][k];
    }
    if (!gated) continue;
    float C[STATES];
    scan_states<Shape>(stage.C[t + i], at.lane, C);
    HYBRID_LM_UNROLL
    for (int c = 0; c < PER; ++c) {
      float y = 0.0f;
      HYBRID_LM_UNROLL
      for (int k = 0; k < STATES; ++k) y += h[c][k] * C[k];
      mine.y[i][at.lane][at.set * PER + c] = y;
    }
  }
}

// Back through batch j of group g's tokens: what this lane has to say of their gradients goes to mine.rows.
template <bool MARKED, class Shape>
HYBRID_LM_DEVICE void back(States<Shape>& later, States<Shape>& rate, States<Shape>& h,
                           const States<Shape> (&decays)[Shape::GROUP], const States<Shape> (&states)[Shape::GROUP],
                           const States<Shape>& A, const Shared<Shape>& shared, WarpShared<Shape>& mine, int g, int j,
                           unsigned marks, const Place<Shape>& at) {
  constexpr int PER = Shape::PER, STATES = Shape::STATES, VEC = Shape::VEC;
  HYBRID_LM_UNROLL
  for (int in_batch = Shape::BATCH - 1; in_batch >= 0; --in_batch) {
    const int i = j * Shape::BATCH + in_batch, t = g * Shape::GROUP + i;
    // A document's first token finds a state of zeros, and asks nothing of what stands before it.
    const bool first = MARKED && mark_at(marks, i) == FIRST;
    float step[PER], input[PER];
    take_given<Shape>(mine, at, i, step, input);
    const auto out = mine.out[i][at.set];
    float B[STATES], C[STATES], gB[STATES] = {}, gC[STATES] = {};
    scan_states<Shape>(shared.stage.B[t], at.lane, B);
    scan_states<Shape>(shared.stage.C[t], at.lane, C);
    // The states that the token finds.
    if (i == 0) take_start<Shape>(shared, g, h);
    float said[2 * PER];
    HYBRID_LM_UNROLL
    for (int c = 0; c < PER; ++c) {
      float ginput = 0.0f, gstep = 0.0f;
      HYBRID_LM_UNROLL
      for (int k = 0; k < STATES; ++k) {
        const float gh = out.at[c] * C[k] + later[c][k];
        gB[k] += gh * input[c];
        gC[k] += states[i][c][k] * out.at[c];
        ginput += gh * B[k];
        later[c][k] = first ? 0.0f : gh * decays[i][c][k];
        // decay = exp2(step A), and the state that the token finds enters as decay * state
        const float exponent = first ? 0.0f : later[c][k] * (i > 0 ? states[i > 0 ? i - 1 : 0][c][k] : h[c][k]);
        rate[c][k] += exponent * step[c];
        gstep += exponent * A[c][k];
      }
      said[2 * c] = ginput, said[2 * c + 1] = gstep;
    }
    auto& rows = mine.rows;
    HYBRID_LM_UNROLL
    for (int k = 0; k < STATES; k += VEC) {
      Floats<VEC> of_B, of_C;
      HYBRID_LM_UNROLL
      for (int v = 0; v < VEC; ++v) of_B.at[v] = gB[k + v], of_C.at[v] = gC[k + v];
      const int n = int(at.set) * Shape::WIDTH + Shape::state(k, at.lane);
      *reinterpret_cast<Floats<VEC>*>(&rows.matrices[in_batch][0][n]) = of_B;
      *reinterpret_cast<Floats<VEC>*>(&rows.matrices[in_batch][1][n]) = of_C;
    }
    HYBRID_LM_UNROLL
    for (int p = 0; p < Shape::PAIRS; ++p) {
      Floats<Shape::PIECE> piece;
      HYBRID_LM_UNROLL
      for (int k = 0; k < Shape::PIECE; ++k) piece.at[k] = said[p * Shape::PIECE + k];
      *reinterpret_cast<Floats<Shape::PIECE>*>(&rows.inputs[in_batch][p][at.lane][at.set * Shape::PIECE]) = piece;
    }
  }
}

// Sums over a warp what its lanes have in rows.matrices: each lane adds up some numbers, over all sets.
template <class Shape>
HYBRID_LM_DEVICE void sum_matrices(const Rows<Shape>& rows, float (&to)[Shape::GROUP][2][Shape::WIDTH], int token) {
  constexpr int COUNT = Shape::BATCH * 2 * Shape::WIDTH;
  constexpr int VEC = COUNT / 32 < 4 ? COUNT / 32 : 4, ROW = Shape::WIDTH / VEC;
  HYBRID_LM_UNROLL
  for (int at = 0; at < COUNT / VEC; at += 32) {
    const int piece = at + int(threadIdx.x % 32), n = piece % ROW * VEC, which = piece / ROW % 2, j = piece / ROW / 2;
    const float* from = rows.matrices[j][which] + n;
    Floats<VEC> sum = *reinterpret_cast<const Floats<VEC>*>(from);
    HYBRID_LM_UNROLL
    for (int s = 1; s < Shape::NEAR; ++s) {
      const auto more = *reinterpret_cast<const Floats<VEC>*>(from + s * Shape::WIDTH);
      HYBRID_LM_UNROLL
      for (int k = 0; k < VEC; ++k) sum.at[k] += more.at[k];
    }
    *reinterpret_cast<Floats<VEC>*>(&to[token + j][which][n]) = sum;
  }
}

// v becomes softplus(v), and slope its derivative: one exponential for both.
HYBRID_LM_DEVICE void softplus_and_slope(float& v, float& slope) {
  const bool positive = v > 0.0f;
  const float small = Thread::exp2((positive ? -v : v) * float(LOG2E)), part = Thread::reciprocal(1.0f + small);
  slope = positive ? part : small * part;
  v = (positive ? v : 0.0f) + Thread::log1p(small);
}

// A block's walk back through the tokens of its channels, and what a thread has with it.
template <class T, class Shape>
struct Backward {
  using Bits = typename T::Bits;
  static constexpr int GROUP = Shape::GROUP, OWN = Shape::OWN, STATES = Shape::STATES, LANES = Shape::LANES;
  static constexpr int PER = Shape::PER, BATCH = Shape::BATCH, PIECE = Shape::PIECE;

  const ScanGradArgs& a;
  const Parts& parts;
  const Place<Shape> at;
  const bool first_of_part;
  Shared<Shape>& shared;
  WarpShared<Shape>& mine;
  const unsigned own;  // lane of the warp
  States<Shape> A, h, later, rate;
  Owned<T, Shape> next;
  int64_t start;  // of the stretch

  HYBRID_LM_DEVICE Backward(const ScanGradArgs& a, const Parts& parts, Shared<Shape>& shared, int64_t row, int64_t block,
                            bool first_of_part, int64_t start)
      : a(a), parts(parts), at(a, row, block), first_of_part(first_of_part), shared(shared),
        mine(shared.warps[threadIdx.x / 32]), own(threadIdx.x % 32), next(a, at, start + at.token), start(start) {
    mine.D[own] = a.D ? read(a.D, at.channel * a.D.stride[0]) : 0.0f;
    mine.bias[own] = a.dt_bias ? read(a.dt_bias, at.channel * a.dt_bias.stride[0]) : 0.0f;
    mine.gD[own] = mine.gbias[own] = 0.0f;
    mine.most[own] = at.there ? GROUP : 0;
    mine.first[own] = at.first;
    mine.kept[own] = Shape::state(0, at.lane) * a.width + at.first;
    mine.channels[own] = a.width - at.first < PER ? int(a.width) - at.first : PER;
    HYBRID_LM_UNROLL
    for (int c = 0; c < PER; ++c) {
      const int64_t channel = at.first + c;
      HYBRID_LM_UNROLL
      for (int k = 0; k < STATES; ++k) {
        const int64_t n = Shape::state(k, at.lane);
        const int64_t place = row * a.gstate.stride[0] + channel * a.gstate.stride[1] + n * a.gstate.stride[2];
        const bool there = c < mine.channels[own] && n < a.states;
        A[c][k] = there ? read(a.A, channel * a.A.stride[0] + n * a.A.stride[1]) * float(LOG2E) : 0.0f;
        later[c][k] = a.gstate && there ? read(a.gstate, place) : 0.0f;
        rate[c][k] = 0.0f;
      }
    }
  }

  // How many tokens of a group this lane has, of those that it owns.
  HYBRID_LM_DEVICE int left_of(int g) const {
    const int left = scan_left<Shape>(a.tokens - start - g * GROUP) - at.token;
    return left < mine.most[own] ? left : mine.most[own];
  }

  // From the state before the stretch to those before each group.
  HYBRID_LM_DEVICE void find_starts(int groups) {
    const float* kept = static_cast<const float*>(a.before.data) + (start / SCAN_CHUNK * a.batch + at.row) * parts.rates;
    HYBRID_LM_UNROLL
    for (int k = 0; k < STATES; ++k) {
      const int64_t n = Shape::state(k, at.lane);
      const float* from = kept + mine.kept[own] + Shape::state(k, 0) * a.width;
      HYBRID_LM_UNROLL
      for (int c = 0; c < PER; ++c) h[c][k] = n < a.states && c < mine.channels[own] ? from[c] : 0.0f;
    }
    next.fetch(a, left_of(0), groups == 1);
    for (int g = 0; g + 1 < groups; ++g) {
      put_start<Shape>(shared, g, h);
      float dt[OWN], x[OWN];
      HYBRID_LM_UNROLL
      for (int j = 0; j < OWN; ++j) dt[j] = T::wide(next.dt[j]), x[j] = T::wide(next.x[j]);
      next.forward(a, GROUP);
      next.fetch(a, left_of(g + 1), g + 2 == groups);
      scan_steps(dt, mine.bias[own], a.dt_softplus);
      // All have read what the last group's owners gave.
      __syncwarp();
      HYBRID_LM_UNROLL
      for (int j = 0; j < OWN; ++j)
        if (at.writes) put_given<Shape>(mine, at, at.token + j * BATCH, dt[j], dt[j] * x[j]);
      __syncwarp();
      if (const unsigned marks = shared.stage.marks[g])
        walk<true, Shape>(h, A, mine, shared.stage, g * GROUP, marks, at);
      else
        walk<false, Shape>(h, A, mine, shared.stage, g * GROUP, 0, at);
    }
    put_start<Shape>(shared, groups - 1, h);
  }

  // What there is once for a token and channel of a group, to those who need it; the next group's is on its way.
  HYBRID_LM_DEVICE void give(int g, unsigned marks) {
    const int left = left_of(g);
    float x[OWN], dt[OWN], gout[OWN], gD = 0.0f;
    HYBRID_LM_UNROLL
    for (int j = 0; j < OWN; ++j) {
      x[j] = T::wide(next.x[j]);
      gout[j] = a.gy ? T::wide(next.gy[j]) : 0.0f;
      dt[j] = T::wide(next.dt[j]) + mine.bias[own];
      float slope = 1.0f;
      if (a.dt_softplus) softplus_and_slope(dt[j], slope);
      mine.x[j][own] = x[j], mine.slope[j][own] = slope;
      if (a.z) {
        const float z = T::wide(next.z[j]), s = sigmoid<Thread>(z);
        mine.gate[j][own] = gout[j] * silu_slope<Thread>(z, s);
        gout[j] *= z * s;
      }
      // Beyond the end there is a step of what the bias makes of 0.
      if (marks && j * BATCH >= left) dt[j] = 0.0f;
      gD += gout[j] * x[j];
    }
    mine.gD[own] += gD;
    if (g > 0) {
      next.back(a, GROUP);
      next.fetch(a, mine.most[own], true);
    }
    __syncwarp();
    HYBRID_LM_UNROLL
    for (int j = 0; j < OWN; ++j) {
      if (!at.writes) continue;
      put_given<Shape>(mine, at, at.token + j * BATCH, dt[j], dt[j] * x[j]);
      mine.out[at.token + j * BATCH][at.set].at[at.own()] = gout[j];
    }
    __syncwarp();
  }

  // Through a group's tokens and back.
  template <bool MARKED>
  HYBRID_LM_DEVICE void through(int g, unsigned marks, float (&sums)[GROUP][2][Shape::WIDTH]) {
    States<Shape> decays[GROUP], states[GROUP];
    take_start<Shape>(shared, g, h);
    trace<MARKED, Shape>(h, decays, states, A, mine, shared.stage, g * GROUP, marks, at, bool(a.gz));
    if (a.gz) write_gate(g);
    HYBRID_LM_UNROLL
    for (int j = OWN - 1; j >= 0; --j) {
      back<MARKED, Shape>(later, rate, h, decays, states, A, shared, mine, g, j, marks, at);
      __syncwarp();
      write_own(g, j);
      sum_matrices<Shape>(mine.rows, sums, j * BATCH);
      __syncwarp();
    }
  }

  // Where the gradients of the token of batch j that this lane owns are: in new tensors without gaps.
  HYBRID_LM_DEVICE int64_t place_of(int g, int j) const {
    return (at.row * a.tokens + start + g * GROUP + at.token + j * BATCH) * a.width + at.channel;
  }

  HYBRID_LM_DEVICE void write_gate(int g) {
    const int left = left_of(g);
    auto* gz = static_cast<Bits*>(a.gz.data);
    __syncwarp();
    HYBRID_LM_UNROLL
    for (int j = 0; j < OWN; ++j) {
      float y = mine.D[own] * mine.x[j][own];
      HYBRID_LM_UNROLL
      for (int k = 0; k < LANES; ++k) y += mine.y[at.token + j * BATCH][k][at.set * PER + at.own()];
      if (at.writes && j * BATCH < left) gz[place_of(g, j)] = T::narrow(mine.gate[j][own] * y);
    }
    __syncwarp();
  }

  // The gradients of x and dt, of the token of batch j that this lane owns.
  HYBRID_LM_DEVICE void write_own(int g, int j) {
    const int i = at.token + j * BATCH, pair = at.own() * 2 / PIECE, in_pair = at.own() * 2 % PIECE;
    float ginput = 0.0f, gstep = 0.0f;
    HYBRID_LM_UNROLL
    for (int k = 0; k < LANES; ++k) {
      const auto said =
          *reinterpret_cast<const Floats<2>*>(&mine.rows.inputs[at.token][pair][k][at.set * PIECE + in_pair]);
      ginput += said.at[0], gstep += said.at[1];
    }
    if (!at.writes || j * BATCH >= left_of(g)) return;
    const float step = mine.given[i][pair][at.set].at[in_pair], out = mine.out[i][at.set].at[at.own()];
    const float gdt = (gstep * float(1 / LOG2E) + ginput * mine.x[j][own]) * mine.slope[j][own];
    mine.gbias[own] += gdt;
    const int64_t place = place_of(g, j);
    static_cast<Bits*>(a.gx.data)[place] = T::narrow(ginput * step + out * mine.D[own]);
    static_cast<Bits*>(a.gdt.data)[place] = T::narrow(gdt);
  }

  // The gradients of B and C of a group, over the block: to this block's part.
  HYBRID_LM_DEVICE void sum_over_block(int g, const float (&sums)[Shape::WARPS][GROUP][2][Shape::WIDTH], int64_t part) {
    const int64_t rows_at = part * parts.tokens + (at.row * a.tokens + start + g * GROUP) * a.states;
    const int rows_left = scan_left<Shape>(a.tokens - start - g * GROUP), states_there = int(a.states);
    HYBRID_LM_UNROLL_BY(1)
    for (int value = int(threadIdx.x); value < GROUP * 2 * Shape::WIDTH; value += Shape::THREADS) {
      const int n = value % Shape::WIDTH, which = value / Shape::WIDTH % 2, i = value / (2 * Shape::WIDTH);
      if (i >= rows_left || n >= states_there) continue;
      float sum = 0.0f;
      HYBRID_LM_UNROLL
      for (int w = 0; w < Shape::WARPS; ++w) sum += sums[w][i][which][n];
      float* to = (which ? parts.gC : parts.gB) + rows_at + (i * states_there + n);
      *to = first_of_part ? sum : *to + sum;
    }
  }

  // What there is once for a channel.
  HYBRID_LM_DEVICE void write_once() {
    // Owners of other tokens have parts of it.
    float gD = at.writes ? mine.gD[own] : 0.0f, gbias = at.writes ? mine.gbias[own] : 0.0f;
    HYBRID_LM_UNROLL
    for (int step = LANES / 2; step >= PER * Shape::SAME; step /= 2) {
      gD += __shfl_xor_sync(ALL_LANES, gD, step);
      gbias += __shfl_xor_sync(ALL_LANES, gbias, step);
    }
    if (at.writes && mine.most[own] && at.token == 0) {
      parts.gD[at.row * a.width + at.channel] = gD;
      parts.gdt_bias[at.row * a.width + at.channel] = gbias;
    }
    HYBRID_LM_UNROLL
    for (int c = 0; c < PER; ++c) {
      const int64_t channel = mine.first[own] + c;
      if (c >= mine.channels[own]) continue;
      HYBRID_LM_UNROLL
      for (int k = 0; k < STATES; ++k) {
        const int64_t n = Shape::state(k, at.lane);
        if (n >= a.states) continue;
        parts.gA[at.row * parts.rates + channel * a.states + n] = rate[c][k];
        const View& to = a.ginitial;
        write(to, at.row * to.stride[0] + channel * to.stride[1] + n * to.stride[2], later[c][k]);
      }
    }
  }
};

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::THREADS, Shape::BLOCKS)
    scan_backward_kernel(const ScanGradArgs a, const Parts parts) {
  // A processor of sm_90 has 228 KB, of which each block costs one more than it asks for.
  static_assert(Shape::BLOCKS * (sizeof(Shared<Shape>) + 1024) <= 228 * 1024);
  auto& shared = *reinterpret_cast<Shared<Shape>*>(shared_memory());
  const int64_t row = blockIdx.x, part = blockIdx.y;
  const int64_t blocks = (a.width + Shape::CHANNELS - 1) / Shape::CHANNELS;
  const int64_t last = (a.tokens - 1) / SCAN_CHUNK * SCAN_CHUNK;
  int turn = 0;
  for (int64_t block = part; block < blocks; block += parts.blocks) {
    Backward<T, Shape> walk(a, parts, shared, row, block, block == part, last);
    for (;;) {
      const int64_t left = a.tokens - walk.start;
      const int groups = left < SCAN_CHUNK ? int((left + Shape::GROUP - 1) / Shape::GROUP) : Shape::GROUPS;
      // The stretch before has been read by everybody.
      __syncthreads();
      fill<T, Shape>(a, row, walk.start, shared.stage);
      __syncthreads();
      walk.find_starts(groups);
      for (int g = groups - 1; g >= 0; --g) {
        const unsigned marks = shared.stage.marks[g];
        auto& sums = shared.sums[turn];
        walk.give(g, marks);
        if (marks)
          walk.template through<true>(g, marks, sums[threadIdx.x / 32]);
        else
          walk.template through<false>(g, 0, sums[threadIdx.x / 32]);
        __syncthreads();
        walk.sum_over_block(g, sums, part);
        // The next group writes into the other half, which all have read before this group's barrier.
        turn = !turn;
      }
      if (walk.start == 0) break;
      walk.start -= SCAN_CHUNK;
      walk.next.back(a, unsigned(SCAN_CHUNK));
    }
    walk.write_once();
  }
}

// A tensor that is the sum of parts which lie one after the other, each as the tensor itself without gaps.
struct Sum {
  const float* parts;
  int64_t count, size[3];
  View to;
};

struct Sums {
  Sum of[5];
};

constexpr int SUM_THREADS = 256;

__global__ void __launch_bounds__(SUM_THREADS) sum_kernel(const Sums sums) {
  const Sum& s = sums.of[blockIdx.y];
  if (!s.to) return;
  const int64_t size = s.size[0] * s.size[1] * s.size[2];
  for (int64_t i = int64_t(blockIdx.x) * SUM_THREADS + threadIdx.x; i < size; i += int64_t(gridDim.x) * SUM_THREADS) {
    float sum = 0.0f;
    for (int64_t k = 0; k < s.count; ++k) sum += s.parts[k * size + i];
    const int64_t last = i % s.size[2], middle = i / s.size[2] % s.size[1], first = i / s.size[2] / s.size[1];
    write(s.to, first * s.to.stride[0] + middle * s.to.stride[1] + last * s.to.stride[2], sum);
  }
}

// Fewer axes are the last ones.
inline Sum sum_of(const View& to, const float* parts, int64_t count, int64_t a, int64_t b, int64_t c, int axes) {
  Sum s{parts, count, {a, b, c}, to};
  for (int k = 0; k < 3; ++k) s.to.stride[k] = k < 3 - axes ? 0 : to.stride[k - (3 - axes)];
  return s;
}

// Channels that fill a large device: 132 processors with about 250 threads each. Tests have fewer, and want all shapes.
#if defined(HYBRID_LM_EMULATE)
constexpr int64_t ENOUGH = 48;
#else
constexpr int64_t ENOUGH = 32768;
#endif

// As many lanes as hold the states, few for each, whose traces are in registers too; and as many channels for a lane as
// leave enough lanes to fill a device. Two shapes want 192 and 107 KB of shared memory, of which a block of sm_80 can
// have 163 and one of sm_86 or sm_89 99: what the others want. Many states are rare: they have kernels for float32 alone
// (bind_scan.cpp gives them that), which are a third of what there would be to compile.
template <class F>
auto with_shape(const ScanGradArgs& a, const F& f) {
  if (a.states <= SCAN_TYPED) {
    return with_type(a.x.type, [&](auto type) {
      using Few = Shape<8, 2, 1, 256, 8, 2>;
      using Many = Shape<4, 4, 4, 256, 4, 1>;
      const int64_t channels = a.batch * a.width;
      const size_t room = shared_room();
      if (channels < ENOUGH / 2 && sizeof(Shared<Few>) <= room) return f(type, Few());
      if (channels >= ENOUGH && sizeof(Shared<Many>) <= room) return f(type, Many());
      return f(type, Shape<4, 4, 2, 128, 4, 3>());
    });
  }
  if (a.states <= 64) return f(Float(), Shape<16, 4, 2, 128, 4, 2>());
  if (a.states <= 128) return f(Float(), Shape<32, 4, 1, 64, 4, 3>());
  return f(Float(), Shape<32, 8, 1, 32, 4, 2>());
}

}  // namespace

int64_t scan_backward_scratch(const ScanGradArgs& a) {
  return with_shape(a, [&](auto, auto shape) { return parts_of(a, decltype(shape)::CHANNELS).count; });
}

const char* scan_backward(const ScanGradArgs& a) {
  Parts parts;
  if (a.batch && a.width) {
    const char* wrong = with_shape(a, [&](auto type, auto shape) {
      using Shape = decltype(shape);
      parts = parts_of(a, Shape::CHANNELS);
      if (a.batch > 0x7fffffff || a.width > 0x7fffffff) return "selective_scan: more than 2^31 rows or channels";
      return launch(scan_backward_kernel<decltype(type), Shape>, dim3{unsigned(a.batch), unsigned(parts.blocks), 1},
                    Shape::THREADS, sizeof(Shared<Shape>), a.stream, a, parts);
    });
    if (wrong) return wrong;
  } else {
    parts = parts_of(a, 1);
    parts.blocks = 0;
  }
  const Sums sums{{sum_of(a.gB, parts.gB, parts.blocks, a.batch, a.tokens, a.states, 3),
                   sum_of(a.gC, parts.gC, parts.blocks, a.batch, a.tokens, a.states, 3),
                   sum_of(a.gA, parts.gA, a.batch, 1, a.width, a.states, 2),
                   sum_of(a.gD, parts.gD, a.batch, 1, 1, a.width, 1),
                   sum_of(a.gdt_bias, parts.gdt_bias, a.batch, 1, 1, a.width, 1)}};
  const int64_t most = parts.tokens > parts.rates ? parts.tokens : parts.rates, wanted = most / SUM_THREADS + 1;
  return launch(sum_kernel, dim3{unsigned(wanted < 4096 ? wanted : 4096), 5, 1}, SUM_THREADS, 0, a.stream, sums);
}

}  // namespace hybrid_lm
