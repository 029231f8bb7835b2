// What walkers and carriers of the forward scan (scan.cu) share: who has what, and a stage of tokens.
#pragma once

#include "cuda/scan.cuh"

namespace hybrid_lm {

constexpr int WALKERS = 128, SCAN_THREADS = 2 * WALKERS;

// STEPS: tokens of a stage; GROUP: those that a walker goes through in one stretch of code.
template <int LANES_, int STATES_, int PER_, int STEPS_, int GROUP_, int AHEAD_>
struct ScanShape : ScanLanes<LANES_, STATES_, WALKERS, GROUP_> {
  using Lanes = ScanLanes<LANES_, STATES_, WALKERS, GROUP_>;
  static constexpr int PER = PER_, STEPS = STEPS_, AHEAD = AHEAD_;
  static constexpr int CHANNELS = Lanes::SETS * PER;
  static constexpr int NUMBERS = WALKERS * PER * Lanes::STATES;  // states, those that are too many included
  // A carrier has two channels, of every PHASES-th token.
  static constexpr int PHASES = WALKERS / (CHANNELS / 2), CARRIED = STEPS > PHASES ? STEPS / PHASES : 1;
  // On a processor at the same time, which limits registers.
  static constexpr int BLOCKS = Lanes::WIDTH > 64 ? 1 : 2;
  static_assert(GROUP_ % AHEAD == 0 && STEPS % GROUP_ == 0 && SCAN_CHUNK % STEPS == 0 && STEPS % 16 == 0);
};

// A stage: what is given to walkers, and what they say.
template <class Shape>
struct alignas(16) WalkStage {
  float B[Shape::STEPS][Shape::WIDTH];
  float C[Shape::STEPS][Shape::WIDTH];
  float given[Shape::STEPS][Shape::CHANNELS][2];       // the step, and it times x
  float parts[Shape::STEPS][WALKERS][Shape::PER];      // of the outputs
  uint8_t first[Shape::STEPS];                         // of a document
};

// What holds for all rows of a tensor: those of B and C have all states, and begin where an access of four numbers may;
// those of the others have an even number of channels, and begin where an access of two may.
struct ScanPlain {
  bool rows, pairs;
};

// So many tokens in 32 bits; of more than that, as many as never end.
HYBRID_LM_DEVICE int scan_count(int64_t tokens) { return int(tokens < 1 << 30 ? tokens : 1 << 30); }

}  // namespace hybrid_lm
