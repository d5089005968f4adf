// Threads that live for one call: nothing is left behind at a fork, and importing starts none.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace nformer {

// IEEE arithmetic inside the scope, whatever the caller's thread set: flushed subnormals would change results.
class StandardArithmetic {
 public:
#if defined(__SSE2__)
  StandardArithmetic() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~StandardArithmetic() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  StandardArithmetic() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(uint64_t{0}));
  }
  ~StandardArithmetic() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#else
  StandardArithmetic() {}
  ~StandardArithmetic() {}
#endif

 public:
  StandardArithmetic(const StandardArithmetic&) = delete;
  StandardArithmetic& operator=(const StandardArithmetic&) = delete;
};

// Calls work(next) on up to `threads` threads, where next() hands out 0..tasks-1, each once, and then -1. The calling
// thread is one of them. The first exception ends the hand-out and is thrown again here.
template <class Work>
void parallel(int threads, int64_t tasks, const Work& work) {
  std::atomic<int64_t> taken{0};
  std::exception_ptr error;
  std::mutex guard;
  const auto next = [&]() -> int64_t {
    const int64_t task = taken.fetch_add(1, std::memory_order_relaxed);
    return task < tasks ? task : -1;
  };
  const auto run = [&] {
    StandardArithmetic scope;
    try {
      work(next);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      if (!error) error = std::current_exception();
      taken.store(tasks, std::memory_order_relaxed);
    }
  };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < threads && i < tasks; ++i) others.emplace_back(run);
  } catch (const std::system_error&) {
    // no more threads to be had: those that started do the work
  }
  run();
  for (std::thread& other : others) other.join();
  if (error) std::rethrow_exception(error);
}

// Calls body(begin, end) for pieces of 0..count-1 of at most `grain`.
template <class Body>
void parallel_ranges(int threads, int64_t count, int64_t grain, const Body& body) {
  parallel(threads, (count + grain - 1) / grain, [&](const auto& next) {
    for (int64_t task; (task = next()) >= 0;) {
      const int64_t begin = task * grain;
      body(begin, begin + grain < count ? begin + grain : count);
    }
  });
}

}  // namespace nformer
