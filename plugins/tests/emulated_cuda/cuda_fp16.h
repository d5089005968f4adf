// Half precision for the emulated GPU.
#pragma once

#include <cuda_runtime.h>

#include "host_warp.h"

using __half = nformer::Half;
struct __half2 {
  __half x, y;
};
inline float __half2float(__half x) { return static_cast<float>(x); }
inline __half __float2half_rn(float x) { return __half::from(x); }
inline float2 __half22float2(__half2 x) { return {static_cast<float>(x.x), static_cast<float>(x.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half::from(x), __half::from(y)}; }
