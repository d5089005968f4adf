// Every instantiation that dispatch.h can choose, for compilers that have no host: NVRTC of CUDA 12 still knows sm_72.
#include "reciprocal_neighbor_attention.cuh"
#include "row_top_k.cuh"

namespace nformer {

#define NFORMER_FOR_LISTS(slots)                                                \
  template __global__ void row_top_k_kernel<4, slots>(RowTopKTask, int64_t);    \
  template __global__ void row_top_k_kernel<5, slots>(RowTopKTask, int64_t);    \
  template __global__ void row_top_k_kernel<8, slots>(RowTopKTask, int64_t);    \
  template __global__ void row_top_k_kernel<16, slots>(RowTopKTask, int64_t);   \
  template __global__ void row_top_k_kernel<0, slots>(RowTopKTask, int64_t);    \
  template __global__ void attention_kernel<slots, float>(PlacedTask, int64_t); \
  template __global__ void attention_kernel<slots, __half>(PlacedTask, int64_t);

NFORMER_FOR_LISTS(1)
NFORMER_FOR_LISTS(4)

}  // namespace nformer
