#include "nformer/kernels.h"

extern "C" int32_t nformer_row_top_k(void const* a, void const* b, int32_t* neighbors, int64_t heads, int64_t rows,
                                     int64_t columns, int64_t factors, int64_t k, int32_t type, void* stream) {
  nformer::RowTopKTask const task{a,       b,       neighbors, heads, rows,
                                  columns, factors, k,         static_cast<nformer::Type>(type)};
  return static_cast<int32_t>(nformer::row_top_k(task, static_cast<cudaStream_t>(stream)));
}

extern "C" int32_t nformer_reciprocal_neighbor_attention(void const* a, void const* b, void const* v,
                                                         int32_t const* neighbors, float const* t,
                                                         int32_t const* cameras, void* y, int64_t heads,
                                                         int64_t rows, int64_t factors, int64_t size,
                                                         int64_t neighbor_heads, int64_t threshold_heads,
                                                         int64_t count, float scale, float camera_factor,
                                                         int32_t type, void* stream) {
  nformer::AttentionTask const task{a,    b,       v,    neighbors,      y,     heads,
                                    rows, factors, size, neighbor_heads, count, scale,
                                    static_cast<nformer::Type>(type),
                                    t,    cameras, threshold_heads,      camera_factor};
  return static_cast<int32_t>(nformer::reciprocal_neighbor_attention(task, static_cast<cudaStream_t>(stream)));
}
