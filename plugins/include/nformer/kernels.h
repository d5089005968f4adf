// The two custom operators as CUDA launches: raw pointers and a stream in, an error code out.
//
// The contract is docs/operators.md. Nothing is allocated, nothing is synchronized, no scratch buffer is used.
// Offsets are 64-bit; a column number is an int32.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "nformer/tasks.h"

namespace nformer {

// cudaErrorInvalidValue: a number out of range or a null pointer; otherwise what the launch returned.
cudaError_t row_top_k(RowTopKTask const& task, cudaStream_t stream) noexcept;
cudaError_t reciprocal_neighbor_attention(AttentionTask const& task, cudaStream_t stream) noexcept;

}  // namespace nformer

// The same for callers that speak C (ctypes). `t` and `cameras` may be null. `type` is 0 for float32, 1 for float16; the result is a cudaError_t.
#if defined(__GNUC__)
#define NFORMER_API __attribute__((visibility("default")))
#else
#define NFORMER_API
#endif
extern "C" {
NFORMER_API int32_t nformer_row_top_k(void const* a, void const* b, int32_t* neighbors, int64_t heads, int64_t rows,
                                      int64_t columns, int64_t factors, int64_t k, int32_t type, void* stream);
NFORMER_API int32_t nformer_reciprocal_neighbor_attention(void const* a, void const* b, void const* v,
                                                          int32_t const* neighbors, float const* t,
                                                          int32_t const* cameras, void* y, int64_t heads,
                                                          int64_t rows, int64_t factors, int64_t size,
                                                          int64_t neighbor_heads, int64_t threshold_heads,
                                                          int64_t count, float scale, float camera_factor,
                                                          int32_t type, void* stream);
}
