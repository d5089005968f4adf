// A GPU played by the CPU: g++ compiles the .cu files against this and runs them thread by thread, for tests only.
//
// A block's threads are coroutines on one CPU thread. A warp or block operation parks its thread until all that take
// part have come; that they came for the same operation is checked, so divergence that a GPU would not forgive aborts.
// Between two such operations threads run in a drawn order, so that results that hang on it come out differently.
// What this cannot show: races inside a warp's lock step, speed, and whatever the real compiler does.
#pragma once

#include <cuda_runtime_api.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __constant__
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

inline dim3 threadIdx, blockIdx;

namespace emulated {

// Those who wait for each other: a warp, or a block.
struct Meeting {
  int expected = 0, arrived = 0;
  unsigned round = 0;
  char const* what = nullptr;
};

// Entered once by setcontext, then left and entered by _longjmp: swapcontext would cost two system calls a switch.
struct Thread {
  jmp_buf place;
  bool entered = false;
  Meeting* waiting = nullptr;
  unsigned round = 0;
  bool done = false;
};

struct Block {
  static constexpr int kWarp = 32;
  static constexpr size_t kStack = 1 << 17;

  std::vector<Thread> threads;
  std::vector<Meeting> warps;
  Meeting all;
  std::vector<uint64_t> values[2];  // what each thread brought to its warp's operation, in turn
  jmp_buf scheduler;
  size_t running = 0;
  std::function<void()> entry;
};
inline Block* block = nullptr;

[[noreturn]] inline void die(char const* why, char const* what) {
  std::fprintf(stderr, "emulated GPU: %s at %s, thread %u of block %u\n", why, what, threadIdx.x, blockIdx.x);
  std::abort();
}

inline void park(Meeting& meeting, char const* what) {
  Thread& me = block->threads[block->running];
  if (meeting.arrived == 0) {
    meeting.what = what;
  } else if (std::strcmp(meeting.what, what) != 0) {
    die("threads came for different operations", what);
  }
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.round;
    return;
  }
  me.waiting = &meeting;
  me.round = meeting.round;
  if (_setjmp(me.place) == 0) {
    _longjmp(block->scheduler, 1);
  }
}

// Everybody of a warp brings a value and leaves with what `take` makes of all 32. Two rooms are used in turn: when a
// room is used again all have come to the operation between, so nobody still reads in it.
template <class X, class Take>
auto exchange(X mine, char const* what, Take take) {
  static_assert(sizeof(X) <= sizeof(uint64_t), "one word");
  size_t const me = block->running, first = me / Block::kWarp * Block::kWarp;
  Meeting& warp = block->warps[me / Block::kWarp];
  auto& room = block->values[warp.round & 1U];
  std::memcpy(&room[me], &mine, sizeof(X));
  park(warp, what);
  auto const of = [&room, first](int lane) {
    X x;
    std::memcpy(&x, &room[first + static_cast<size_t>(lane)], sizeof(X));
    return x;
  };
  return take(of, static_cast<int>(me - first));
}

inline void run_thread() {
  block->entry();
  block->threads[block->running].done = true;
  _longjmp(block->scheduler, 1);
}

// Goes on with a thread until it parks or ends.
inline void enter(Thread& thread) {
  static std::vector<std::unique_ptr<char[]>> stacks;  // kept from block to block
  if (_setjmp(block->scheduler) != 0) {
    return;
  }
  if (thread.entered) {
    _longjmp(thread.place, 1);
  }
  thread.entered = true;
  while (stacks.size() <= block->running) {
    stacks.emplace_back(new char[Block::kStack]);
  }
  ucontext_t start{};
  getcontext(&start);
  start.uc_stack.ss_sp = stacks[block->running].get();
  start.uc_stack.ss_size = Block::kStack;
  makecontext(&start, run_thread, 0);
  setcontext(&start);
}

inline void run_block(unsigned number, unsigned count, std::function<void()> entry) {
  Block here;
  here.threads.resize(count);
  here.values[0].resize(count);
  here.values[1].resize(count);
  here.warps.resize(count / Block::kWarp);
  for (auto& warp : here.warps) {
    warp.expected = Block::kWarp;
  }
  here.all.expected = static_cast<int>(count);
  here.entry = std::move(entry);
  block = &here;
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t{0});
  std::shuffle(order.begin(), order.end(), std::minstd_rand(number + 1));
  for (bool left = true; left;) {
    left = false;
    bool moved = false;
    for (size_t const i : order) {
      Thread& thread = here.threads[i];
      bool const parked = thread.waiting != nullptr && thread.waiting->round == thread.round;
      left = left || !thread.done;
      if (thread.done || parked) {
        continue;
      }
      thread.waiting = nullptr;
      here.running = i;
      threadIdx.x = static_cast<unsigned>(i);
      blockIdx.x = number;
      enter(thread);
      moved = true;
    }
    if (left && !moved) {
      die("threads wait for others that never come", "the end of the block");
    }
  }
}

}  // namespace emulated

// Every kernel here takes two arguments.
template <class First, class Second>
cudaError_t cudaLaunchKernel(void (*kernel)(First, Second), dim3 blocks, dim3 threads, void** arguments, size_t,
                             cudaStream_t) {
  for (unsigned number = 0; number < blocks.x; ++number) {
    emulated::run_block(number, threads.x, [kernel, arguments] {
      kernel(*static_cast<First*>(arguments[0]), *static_cast<Second*>(arguments[1]));
    });
  }
  return cudaSuccess;
}

inline void __syncthreads() { emulated::park(emulated::block->all, "__syncthreads"); }

template <class X>
X __shfl_sync(unsigned, X x, int from) {
  return emulated::exchange(x, "__shfl_sync", [from](auto of, int) { return of(from & 31); });
}
template <class X>
X __shfl_up_sync(unsigned, X x, unsigned by) {
  return emulated::exchange(x, "__shfl_up_sync", [by](auto of, int lane) {
    return of(lane >= static_cast<int>(by) ? lane - static_cast<int>(by) : lane);
  });
}
template <class X>
X __shfl_xor_sync(unsigned, X x, int with) {
  return emulated::exchange(x, "__shfl_xor_sync", [with](auto of, int lane) { return of(lane ^ with); });
}
inline unsigned __ballot_sync(unsigned, bool p) {
  return emulated::exchange(p, "__ballot_sync", [](auto of, int) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) {
      bits |= static_cast<unsigned>(of(lane)) << lane;
    }
    return bits;
  });
}
inline int __any_sync(unsigned, bool p) {
  return emulated::exchange(p, "__any_sync", [](auto of, int) {
    bool any = false;
    for (int lane = 0; lane < 32; ++lane) {
      any = any || of(lane);
    }
    return static_cast<int>(any);
  });
}

template <class X>
X __ldg(X const* from) {
  if (reinterpret_cast<uintptr_t>(from) % alignof(X) != 0 || reinterpret_cast<uintptr_t>(from) % sizeof(X) != 0) {
    emulated::die("a word is not aligned", "__ldg");
  }
  return *from;
}
inline float __fmaf_rn(float x, float y, float z) { return std::fmaf(x, y, z); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
