// Which instantiation serves a task. The CPU tests go through the same choice.
#pragma once

#include "nformer/row_logic.cuh"

namespace nformer {

inline constexpr int kLongFactors = 0;       // stands for "more factors than registers hold"
inline constexpr int kMaxShortFactors = 16;  // beyond this a matrix product in tiles is better

// Slots of a list that holds `count` entries; of four slots only those in use cost time.
NFORMER_HD constexpr int slots_for(int64_t count) { return count <= 1 * kLanes ? 1 : 4; }

// The least instantiation that holds `factors`, or kLongFactors.
// Five, the published number of landmarks, has its own; the others pay for at most a few zeros.
NFORMER_HD constexpr int factors_for(int64_t factors) {
  return factors <= 4 ? 4 : factors <= 5 ? 5 : factors <= 8 ? 8 : factors <= kMaxShortFactors ? 16 : kLongFactors;
}

#if !defined(__CUDACC_RTC__)  // which has no host

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls `launch(Constant<slots_for(count)>)`.
template <class Launch>
auto with_slots(int64_t count, Launch&& launch) {
  return slots_for(count) == 1 ? launch(Constant<1>{}) : launch(Constant<4>{});
}

// Calls `launch(Constant<factors_for(factors)>)`.
template <class Launch>
auto with_factors(int64_t factors, Launch&& launch) {
  switch (factors_for(factors)) {
    case 4:
      return launch(Constant<4>{});
    case 5:
      return launch(Constant<5>{});
    case 8:
      return launch(Constant<8>{});
    case kMaxShortFactors:
      return launch(Constant<kMaxShortFactors>{});
    default:
      return launch(Constant<kLongFactors>{});
  }
}

#endif

}  // namespace nformer
