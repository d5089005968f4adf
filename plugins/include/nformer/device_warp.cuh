// A warp of 32 threads, as row_logic.cuh wants it: a value of a lane is a value of a thread.
#pragma once

#include <cuda_fp16.h>

#include "nformer/row_logic.cuh"

namespace nformer {

inline constexpr int kWarps = 8;  // of a block, in every kernel
inline constexpr int kThreads = kWarps * kLanes;

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

  // Elements at .. at + 3 of a row of `size`; what lies beyond it is left as it is. `words`: one aligned word.
  static __device__ __forceinline__ void load_four(float const* from, int32_t at, int32_t size, bool words,
                                                   float (&x)[4]) {
    if (!words) {
      load_singly(from, at, size, x);
    } else if (at < size) {
      float4 const word = __ldg(reinterpret_cast<float4 const*>(from + at));
      x[0] = word.x, x[1] = word.y, x[2] = word.z, x[3] = word.w;
    }
  }
  static __device__ __forceinline__ void load_four(__half const* from, int32_t at, int32_t size, bool words,
                                                   float (&x)[4]) {
    if (!words) {
      load_singly(from, at, size, x);
    } else if (at < size) {
      uint2 const word = __ldg(reinterpret_cast<uint2 const*>(from + at));
      float2 const low = __half22float2(reinterpret_cast<__half2 const&>(word.x));
      float2 const high = __half22float2(reinterpret_cast<__half2 const&>(word.y));
      x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
    }
  }
  static __device__ __forceinline__ void store_four(float* to, int32_t at, int32_t size, bool words, float (&x)[4]) {
    if (!words) {
      store_singly(to, at, size, x);
    } else if (at < size) {
      *reinterpret_cast<float4*>(to + at) = make_float4(x[0], x[1], x[2], x[3]);
    }
  }
  static __device__ __forceinline__ void store_four(__half* to, int32_t at, int32_t size, bool words, float (&x)[4]) {
    if (!words) {
      store_singly(to, at, size, x);
    } else if (at < size) {
      __half2 const low = __floats2half2_rn(x[0], x[1]);
      __half2 const high = __floats2half2_rn(x[2], x[3]);
      *reinterpret_cast<uint2*>(to + at) =
          make_uint2(reinterpret_cast<unsigned const&>(low), reinterpret_cast<unsigned const&>(high));
    }
  }

 private:
  static __device__ __forceinline__ void put(float* to, float x) { *to = x; }
  static __device__ __forceinline__ void put(__half* to, float x) { *to = __float2half_rn(x); }

  template <class T>
  static __device__ __forceinline__ void load_singly(T const* from, int32_t at, int32_t size, float (&x)[4]) {
    NFORMER_UNROLL
    for (int e = 0; e < 4; ++e) {
      if (at + e < size) {
        x[e] = static_cast<float>(__ldg(from + at + e));
      }
    }
  }
  template <class T>
  static __device__ __forceinline__ void store_singly(T* to, int32_t at, int32_t size, float const (&x)[4]) {
    NFORMER_UNROLL
    for (int e = 0; e < 4; ++e) {
      if (at + e < size) {
        put(to + at + e, x[e]);
      }
    }
  }
};

}  // namespace nformer
