// A warp of 32 threads, as row_logic.cuh wants it: a value of a lane is a value of a thread.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "nformer/row_logic.cuh"

namespace nformer {

struct DeviceWarp {
  using Float = float;
  using Int = int32_t;
  using Flag = bool;

  static constexpr unsigned kAll = 0xffffffffU;

  template <class X>
  static __device__ __forceinline__ X splat(X x) {
    return x;
  }
  static __device__ __forceinline__ int32_t lane() { return static_cast<int32_t>(threadIdx.x) & (kLanes - 1); }
  static __device__ __forceinline__ bool none() { return false; }
  static __device__ __forceinline__ bool any(bool p) { return __any_sync(kAll, p) != 0; }
  static __device__ __forceinline__ uint32_t ballot(bool p) { return __ballot_sync(kAll, p); }
  static __device__ __forceinline__ bool has_bit(uint32_t bits) { return ((bits >> lane()) & 1U) != 0; }
  static __device__ __forceinline__ int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }

  template <class X>
  static __device__ __forceinline__ X select(bool p, X yes, X no) {
    return p ? yes : no;
  }
  template <class X>
  static __device__ __forceinline__ X broadcast(X x, int from) {
    return __shfl_sync(kAll, x, from);
  }
  template <class X>
  static __device__ __forceinline__ X shift_up(X x, X first) {
    X const up = __shfl_up_sync(kAll, x, 1);
    return lane() == 0 ? first : up;
  }

  static __device__ __forceinline__ float fma(float x, float y, float z) { return __fmaf_rn(x, y, z); }
  static __device__ __forceinline__ float exp(float x) { return expf(x); }
  static __device__ __forceinline__ float absolute(float x) { return fabsf(x); }
  static __device__ __forceinline__ float larger(float x, float y) { return fmaxf(x, y); }  // NaN gives way

  static __device__ __forceinline__ float max(float x) {
    NFORMER_UNROLL
    for (int apart = kLanes / 2; apart > 0; apart /= 2) {
      x = fmaxf(x, __shfl_xor_sync(kAll, x, apart));
    }
    return x;
  }
  static __device__ __forceinline__ float min(float x) {
    NFORMER_UNROLL
    for (int apart = kLanes / 2; apart > 0; apart /= 2) {
      x = fminf(x, __shfl_xor_sync(kAll, x, apart));
    }
    return x;
  }
  // A butterfly: addition commutes, so all lanes end with the same bits.
  static __device__ __forceinline__ float sum(float x) {
    NFORMER_UNROLL
    for (int apart = kLanes / 2; apart > 0; apart /= 2) {
      x += __shfl_xor_sync(kAll, x, apart);
    }
    return x;
  }

  static __device__ __forceinline__ float load(float const* from, int32_t at) { return from[at]; }
  static __device__ __forceinline__ int32_t load(int32_t const* from, int32_t at, bool mine, int32_t otherwise) {
    return mine ? __ldg(from + at) : otherwise;
  }
  static __device__ __forceinline__ void store(int32_t* to, int32_t at, int32_t x, bool mine) {
    if (mine) {
      to[at] = x;
    }
  }
  template <class T>
  static __device__ __forceinline__ float gather(T const* from, int32_t row, int stride, bool mine) {
    return mine ? static_cast<float>(__ldg(from + int64_t{row} * stride)) : 0.0F;
  }

  // kWidth elements from `at` on. kWidth 4 wants them aligned as one word of 16 (8) bytes and all or none inside.
  template <int kWidth>
  static __device__ __forceinline__ void load_side_by_side(float const* from, int32_t at, bool mine,
                                                           float (&x)[kWidth]) {
    static_assert(kWidth == 1 || kWidth == 4, "one element or one word");
    if (mine) {
      if constexpr (kWidth == 4) {
        float4 const word = __ldg(reinterpret_cast<float4 const*>(from + at));
        x[0] = word.x, x[1] = word.y, x[2] = word.z, x[3] = word.w;
      } else {
        x[0] = __ldg(from + at);
      }
    }
  }
  template <int kWidth>
  static __device__ __forceinline__ void load_side_by_side(__half const* from, int32_t at, bool mine,
                                                           float (&x)[kWidth]) {
    static_assert(kWidth == 1 || kWidth == 4, "one element or one word");
    if (mine) {
      if constexpr (kWidth == 4) {
        uint2 const word = __ldg(reinterpret_cast<uint2 const*>(from + at));
        float2 const low = __half22float2(reinterpret_cast<__half2 const&>(word.x));
        float2 const high = __half22float2(reinterpret_cast<__half2 const&>(word.y));
        x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
      } else {
        x[0] = __half2float(__ldg(from + at));
      }
    }
  }
  template <int kWidth>
  static __device__ __forceinline__ void store_side_by_side(float* to, int32_t at, bool mine, float (&x)[kWidth]) {
    if (mine) {
      if constexpr (kWidth == 4) {
        *reinterpret_cast<float4*>(to + at) = make_float4(x[0], x[1], x[2], x[3]);
      } else {
        to[at] = x[0];
      }
    }
  }
  template <int kWidth>
  static __device__ __forceinline__ void store_side_by_side(__half* to, int32_t at, bool mine, float (&x)[kWidth]) {
    if (mine) {
      if constexpr (kWidth == 4) {
        __half2 const low = __floats2half2_rn(x[0], x[1]);
        __half2 const high = __floats2half2_rn(x[2], x[3]);
        *reinterpret_cast<uint2*>(to + at) = make_uint2(reinterpret_cast<unsigned const&>(low),
                                                        reinterpret_cast<unsigned const&>(high));
      } else {
        to[at] = __float2half_rn(x[0]);
      }
    }
  }
};

}  // namespace nformer
