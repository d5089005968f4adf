// What the kernels take from the C++ library; by hand where a compiler at run time (NVRTC) has no headers.
#pragma once

#if defined(__CUDACC_RTC__)
using int32_t = int;
using uint32_t = unsigned;
using int64_t = long long;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long long;
#define INT32_MAX 2147483647

namespace nformer {
inline constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000U);
inline constexpr float kNaN = __builtin_bit_cast(float, 0x7fc00000U);
}  // namespace nformer
#else
#include <cmath>
#include <cstdint>
#include <limits>

namespace nformer {
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
}  // namespace nformer
#endif
