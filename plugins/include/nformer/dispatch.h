// Which instantiation serves a task. The CPU tests go through the same choice.
#pragma once

#include <cstdint>
#include <type_traits>

#include "nformer/row_logic.cuh"

namespace nformer {

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

inline constexpr int kLongFactors = 0;       // stands for "more factors than registers hold"
inline constexpr int kMaxShortFactors = 16;  // beyond this a matrix product in tiles is better

// Calls `launch(Constant<slots>)` with a list that holds `count` entries; of four slots only those in use cost time.
template <class Launch>
auto with_slots(int64_t count, Launch&& launch) {
  if (count <= 1 * kLanes) {
    return launch(Constant<1>{});
  }
  return launch(Constant<4>{});
}

// Calls `launch(Constant<factors>)` with the least instantiation that holds `factors`, or kLongFactors.
// Five, the published number of landmarks, has its own; the others pay for at most a few zeros.
template <class Launch>
auto with_factors(int64_t factors, Launch&& launch) {
  if (factors <= 4) {
    return launch(Constant<4>{});
  }
  if (factors <= 5) {
    return launch(Constant<5>{});
  }
  if (factors <= 8) {
    return launch(Constant<8>{});
  }
  if (factors <= kMaxShortFactors) {
    return launch(Constant<kMaxShortFactors>{});
  }
  return launch(Constant<kLongFactors>{});
}

}  // namespace nformer
