// The kernels as TensorRT launches those of an ahead-of-time plugin: pointers of the inputs, int32 numbers, pointer of the
// output, and no code of ours on the host. An engine carries one of them for each node, compiled for the node alone:
//
//   -DNFORMER_ROW_TOP_K -DNFORMER_TYPE=float -DNFORMER_FACTORS=5 -DNFORMER_COUNT=20
//   -DNFORMER_ATTENTION -DNFORMER_TYPE=__half -DNFORMER_COUNT=20 -DNFORMER_INPUTS=5
//
// NFORMER_INPUTS is 4, 5 with thresholds, or 6 with cameras as well.
// NFORMER_FACTORS is R (0: not known), NFORMER_COUNT the length of a neighbor list. Whoever launches reads from the PTX
// how many threads a block has and how many rows it takes, and gives heads * ceil(rows / nformer_rows_per_block) blocks.
#include "nformer/tasks.h"

#if defined(NFORMER_ROW_TOP_K)
#include "row_top_k.cuh"
#else
#include "reciprocal_neighbor_attention.cuh"
#endif

namespace nformer {

template <class T>
inline constexpr Type kType = Type::kFloat16;
template <>
inline constexpr Type kType<float> = Type::kFloat32;

inline constexpr int kSlots = slots_for(NFORMER_COUNT);

__device__ __forceinline__ int64_t blocks_a_head(int64_t rows, int rows_per_block) {
  return (rows + rows_per_block - 1) / rows_per_block;
}

}  // namespace nformer

#if defined(NFORMER_ROW_TOP_K)

namespace nformer {
inline constexpr int kFactors = NFORMER_FACTORS > 0 ? factors_for(NFORMER_FACTORS) : kLongFactors;
}

__constant__ int32_t nformer_rows_per_block = nformer::kRowsPerBlock<nformer::kFactors, nformer::kSlots>;

extern "C" __global__ void __launch_bounds__(nformer::kThreads,
                                             (nformer::kBlocksTogether<nformer::kFactors, nformer::kSlots>))
    nformer_row_top_k(NFORMER_TYPE const* a, NFORMER_TYPE const* b, int32_t heads, int32_t rows, int32_t columns,
                      int32_t factors, int32_t k, int32_t* neighbors) {
  using namespace nformer;
  if (heads == 0 || rows == 0) {
    return;  // a launch has at least one block
  }
  RowTopKTask const task{a, b, neighbors, heads, rows, columns, factors, k, kType<NFORMER_TYPE>};
  row_top_k_block<kFactors, kSlots>(task, blocks_a_head(rows, kRowsPerBlock<kFactors, kSlots>));
}

#else

__constant__ int32_t nformer_rows_per_block = nformer::kWarps;

// A launch has integers alone: `scale_high` and `scale_low` are the halves of the float's bits. NaN: 1 / sqrt(size).
__device__ __forceinline__ float float_of(int32_t high, int32_t low) {
  return __int_as_float(static_cast<int32_t>(static_cast<uint32_t>(high) << 16 | low));
}

extern "C" __global__ void __launch_bounds__(nformer::kThreads)
    nformer_reciprocal_neighbor_attention(NFORMER_TYPE const* a, NFORMER_TYPE const* b, NFORMER_TYPE const* v,
                                          int32_t const* neighbors,
#if NFORMER_INPUTS > 4
                                          float const* t,
#endif
#if NFORMER_INPUTS > 5
                                          int32_t const* cameras,
#endif
                                          int32_t heads, int32_t rows, int32_t factors, int32_t size,
                                          int32_t neighbor_heads, int32_t count, int32_t scale_high, int32_t scale_low,
#if NFORMER_INPUTS > 4
                                          int32_t threshold_heads,
#endif
#if NFORMER_INPUTS > 5
                                          int32_t factor_high, int32_t factor_low,
#endif
                                          NFORMER_TYPE* y) {
  using namespace nformer;
  if (heads == 0 || rows == 0) {
    return;
  }
  float const given = float_of(scale_high, scale_low);
  float const scale = given == given ? given : __fdiv_rn(1.0F, __fsqrt_rn(static_cast<float>(size)));
  AttentionTask task{a, b, v, neighbors, y, heads, rows, factors, size, neighbor_heads, count, scale,
                     kType<NFORMER_TYPE>};
#if NFORMER_INPUTS > 4
  task.t = t, task.threshold_heads = threshold_heads;
#endif
#if NFORMER_INPUTS > 5
  task.cameras = cameras, task.camera_factor = float_of(factor_high, factor_low);
#endif
  attention_block<kSlots, NFORMER_TYPE>({task, whole_words(task)}, blocks_a_head(rows, kWarps));
}

#endif
