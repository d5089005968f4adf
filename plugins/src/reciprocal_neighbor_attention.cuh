// How ReciprocalNeighborAttention is spread over threads: a warp takes a row. What is computed stands in row_logic.cuh.
#pragma once

#include <cuda_fp16.h>

#include "nformer/device_warp.cuh"
#include "nformer/dispatch.h"
#include "nformer/tasks.h"

namespace nformer {

// Whether four elements of every row of v and y make an aligned word.
NFORMER_HD bool whole_words(AttentionTask const& task) {
  uintptr_t const bytes = task.type == Type::kFloat32 ? 16 : 8;
  return task.size % 4 == 0 && reinterpret_cast<uintptr_t>(task.v) % bytes == 0 &&
         reinterpret_cast<uintptr_t>(task.y) % bytes == 0;
}

struct PlacedTask : AttentionTask {
  bool words;
};

template <int kSlots, class T>
__device__ __forceinline__ void attention_block(PlacedTask const& task, int64_t blocks_a_head) {
  int64_t const block = blockIdx.x, h = block / blocks_a_head;
  int64_t const row = block % blocks_a_head * kWarps + static_cast<int64_t>(threadIdx.x / kLanes);
  if (row >= task.rows) {
    return;  // a whole warp at once
  }
  int64_t const factors = h * task.rows * task.factors, values = h * task.rows * task.size;
  int64_t const lists = task.neighbor_heads == 1 ? 0 : h * task.rows * task.count;
  AttentionHead<T> const head{static_cast<T const*>(task.a) + factors,
                              static_cast<T const*>(task.b) + factors,
                              static_cast<T const*>(task.v) + values,
                              task.neighbors + lists,
                              static_cast<T*>(task.y) + values,
                              task.rows,
                              static_cast<int>(task.factors),
                              static_cast<int>(task.size),
                              static_cast<int>(task.count),
                              task.scale,
                              task.t != nullptr ? task.t + (task.threshold_heads == 1 ? 0 : h * task.rows) : nullptr,
                              task.cameras,
                              task.camera_factor,
                              task.words};
  attend<DeviceWarp, kSlots>(head, row);
}

template <int kSlots, class T>
__global__ void __launch_bounds__(kThreads) attention_kernel(PlacedTask task, int64_t blocks_a_head) {
  attention_block<kSlots, T>(task, blocks_a_head);
}

}  // namespace nformer
