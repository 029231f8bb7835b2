// What a kernel asks of CUDA, on the host and for tests: a block's threads are fibers that give way to each other
// at barriers and in shuffles, and only there. The blocks run one after the other.
//
// What it finds, besides wrong results: shared memory starts as NaN and may not be overrun; a barrier or a shuffle
// that not all threads come to is an error, with its place; and threads and blocks can run in the opposite order
// (`backwards`), which changes the results where a barrier is missing. What it cannot find: two threads that touch
// the same number at the same time between two barriers, in a way that neither order shows.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace hybrid_lm {

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace emulation {

constexpr unsigned WARP = 32;
constexpr size_t STACK = 256 * 1024, GUARD = 1024, ROOM = 227 * 1024;

// Where a thread waits: in nothing, at a barrier of its block, or among the lanes of a mask.
enum class Wait : int8_t { NONE, BLOCK, WARP, DONE };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[STACK]};
  ucontext_t start;
  jmp_buf point;
  bool begun;
  unsigned index;
  Wait wait;
  const char* where;  // the name of what it waits in
  unsigned mask;
  uint64_t posted[2];  // by turns: a lane that is ahead must not overwrite what others have yet to read
  int turn;
};

struct State {
  bool backwards = false;
  std::vector<Fiber> fibers;
  std::vector<unsigned char> shared;
  size_t shared_bytes = 0;
  unsigned threads = 0;
  dim3 block, grid;
  Fiber* here = nullptr;
  jmp_buf scheduler;
  const std::function<void()>* kernel = nullptr;
  const char* problem = nullptr;  // what a thread found; the scheduler says it
};

inline State state;

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error("emulated kernel, block " + std::to_string(state.block.x) + ": " + what);
}

// Lets others run, until the scheduler finds that what this thread waits for has come.
inline void give_way() {
  if (!_setjmp(state.here->point)) _longjmp(state.scheduler, 1);
}

inline void enter() {
  (*state.kernel)();
  state.here->wait = Wait::DONE;
  _longjmp(state.scheduler, 1);
}

// Runs one thread until it waits or is done.
inline void resume(Fiber& fiber) {
  state.here = &fiber;
  if (_setjmp(state.scheduler)) {
    if (state.problem) fail(std::string(fiber.where) + ": " + state.problem);
    return;
  }
  if (fiber.begun) _longjmp(fiber.point, 1);
  fiber.begun = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = STACK;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

// Lets go those lanes of a warp whose mask is complete. Says whether there were any.
inline bool release_warp(unsigned first) {
  bool any = false;
  const unsigned last = first + WARP < state.threads ? first + WARP : state.threads;
  for (unsigned k = first; k < last; ++k) {
    Fiber& fiber = state.fibers[k];
    if (fiber.wait != Wait::WARP) continue;
    bool complete = true;
    for (unsigned lane = 0; lane < WARP; ++lane) {
      if (!(fiber.mask >> lane & 1)) continue;
      if (first + lane >= last) fail(std::string(fiber.where) + ": its mask names a lane that the block has not");
      const Fiber& other = state.fibers[first + lane];
      if (other.wait == Wait::DONE) fail(std::string(fiber.where) + ": a lane of its mask has left the kernel");
      if (other.wait == Wait::WARP && (other.mask != fiber.mask || std::strcmp(other.where, fiber.where)))
        fail(std::string(fiber.where) + " and " + other.where + ": lanes of one warp meet in different calls");
      complete = complete && other.wait == Wait::WARP;
    }
    if (!complete) continue;
    any = true;
    const unsigned mask = fiber.mask;
    for (unsigned lane = 0; lane < WARP; ++lane)
      if (mask >> lane & 1) state.fibers[first + lane].wait = Wait::NONE;
  }
  return any;
}

inline bool release_block() {
  unsigned waiting = 0, done = 0;
  for (unsigned k = 0; k < state.threads; ++k) {
    waiting += state.fibers[k].wait == Wait::BLOCK;
    done += state.fibers[k].wait == Wait::DONE;
  }
  if (waiting && done) fail("__syncthreads: some threads have left the kernel");
  if (waiting != state.threads) return false;
  for (unsigned k = 0; k < state.threads; ++k) state.fibers[k].wait = Wait::NONE;
  return true;
}

inline void run_block() {
  // All bits set: NaN in every type.
  std::memset(state.shared.data(), 0xff, state.shared.size());
  for (unsigned k = 0; k < state.threads; ++k) {
    Fiber& fiber = state.fibers[k];
    fiber.begun = false, fiber.index = k, fiber.wait = Wait::NONE, fiber.turn = 0;
  }
  for (bool moved = true; moved;) {
    moved = false;
    for (unsigned warp = 0; warp < state.threads; warp += WARP) {
      const unsigned first = state.backwards ? (state.threads - 1) / WARP * WARP - warp : warp;
      const unsigned count = state.threads - first < WARP ? state.threads - first : WARP;
      // A warp goes as far as it can by itself: the others are then as far behind as they can be.
      do {
        for (unsigned k = 0; k < count; ++k) {
          Fiber& fiber = state.fibers[first + (state.backwards ? count - 1 - k : k)];
          if (fiber.wait != Wait::NONE) continue;
          resume(fiber);
          moved = true;
        }
      } while (release_warp(first));
    }
    moved = release_block() || moved;
  }
  for (unsigned k = 0; k < state.threads; ++k)
    if (state.fibers[k].wait != Wait::DONE)
      fail(std::string(state.fibers[k].where) + ": thread " + std::to_string(k) + " waits for threads that wait elsewhere");
  for (size_t i = state.shared_bytes; i < state.shared.size(); ++i)
    if (state.shared[i] != 0xff) fail("shared memory was written beyond its end");
}

template <class F>
inline void run(dim3 grid, int threads, size_t shared_bytes, const F& body) {
  const std::function<void()> kernel = body;
  if (threads < 1 || threads > 1024 || !grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    fail("a grid or a block of these sizes cannot be launched");
  if (shared_bytes > ROOM) fail("more shared memory than a block can have");
  state.kernel = &kernel, state.problem = nullptr;
  state.threads = unsigned(threads), state.grid = grid, state.shared_bytes = shared_bytes;
  state.shared.assign(shared_bytes + GUARD, 0xff);
  while (state.fibers.size() < state.threads) state.fibers.emplace_back();
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t at = state.backwards ? blocks - 1 - k : k;
    state.block = {unsigned(at % grid.x), unsigned(at / grid.x % grid.y), unsigned(at / grid.x / grid.y)};
    run_block();
  }
}

inline void wait(Wait kind, const char* where, unsigned mask = 0) {
  Fiber& me = *state.here;
  me.wait = kind, me.where = where, me.mask = mask;
  give_way();
}

inline dim3 thread_index() { return {state.here->index, 0, 0}; }

// What the thread `lane` of this warp passed to the same call.
template <class T>
__attribute__((noinline)) T exchange(const char* where, unsigned mask, T value, unsigned lane) {
  static_assert(sizeof(T) <= 8);
  Fiber& me = *state.here;
  const unsigned mine = me.index % WARP, first = me.index - mine;
  // A fiber has nobody above it to catch an exception.
  if (!(mask >> mine & 1)) state.problem = "a lane that its own mask leaves out";
  const int turn = me.turn;
  me.turn = !turn;
  std::memcpy(&me.posted[turn], &value, sizeof(T));
  wait(Wait::WARP, where, mask);
  if (lane >= WARP || !(mask >> lane & 1)) lane = mine;
  std::memcpy(&value, &state.fibers[first + lane].posted[turn], sizeof(T));
  return value;
}

}  // namespace emulation

#define threadIdx (::hybrid_lm::emulation::thread_index())
#define blockIdx (::hybrid_lm::emulation::state.block)
#define gridDim (::hybrid_lm::emulation::state.grid)
#define blockDim (::hybrid_lm::dim3{::hybrid_lm::emulation::state.threads, 1, 1})

inline void __syncthreads() { emulation::wait(emulation::Wait::BLOCK, "__syncthreads"); }

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::wait(emulation::Wait::WARP, "__syncwarp", mask); }

template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const unsigned mine = threadIdx.x % 32;
  return emulation::exchange("__shfl_sync", mask, value, (mine & ~(unsigned(width) - 1)) + unsigned(lane) % unsigned(width));
}

template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulation::exchange("__shfl_xor_sync", mask, value, (threadIdx.x % 32) ^ unsigned(bits));
}

template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  return emulation::exchange("__shfl_down_sync", mask, value, threadIdx.x % 32 + by);
}

template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  return emulation::exchange("__shfl_up_sync", mask, value, threadIdx.x % 32 - by);
}

// The block's shared memory, as many bytes as it was launched with.
inline char* shared_memory() { return reinterpret_cast<char*>(emulation::state.shared.data()); }

inline size_t shared_room() { return emulation::ROOM; }

// Runs a kernel and says what went wrong, or null.
template <class... P, class... Args>
inline const char* launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes, void*, Args... args) {
  static std::string said;
  try {
    emulation::run(grid, threads, shared_bytes, [&] { kernel(args...); });
  } catch (const std::runtime_error& error) {
    said = error.what();
    return said.c_str();
  }
  return nullptr;
}

}  // namespace hybrid_lm
