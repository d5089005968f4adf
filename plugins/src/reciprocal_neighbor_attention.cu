// How ReciprocalNeighborAttention is spread over threads: a warp takes a row. What is computed stands in row_logic.cuh.
#include <cuda_fp16.h>

#include <cstdint>

#include "launch.cuh"
#include "nformer/device_warp.cuh"
#include "nformer/dispatch.h"
#include "nformer/kernels.h"

namespace nformer {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;

struct PlacedTask : AttentionTask {
  bool words;
};

template <int kSlots, class T>
__global__ void __launch_bounds__(kThreads) attention_kernel(PlacedTask task, int64_t blocks_a_head) {
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
                              task.words};
  attend<DeviceWarp, kSlots>(head, row);
}

bool sound(AttentionTask const& task) {
  constexpr int64_t kMost = INT32_MAX - 4 * kLanes;
  bool const numbers = task.heads >= 0 && task.rows >= 0 && task.rows <= kMost && task.factors >= 1 &&
                       task.factors <= kMost && task.size >= 1 && task.size <= kMost && task.count >= 1 &&
                       task.count <= kMaxNeighbors && (task.neighbor_heads == 1 || task.neighbor_heads == task.heads);
  return numbers && task.scale - task.scale == 0.0F &&
         (task.type == Type::kFloat32 || task.type == Type::kFloat16);
}

// Whether four elements of every row of v and y make an aligned word.
bool whole_words(AttentionTask const& task) {
  uintptr_t const bytes = task.type == Type::kFloat32 ? 16 : 8;
  return task.size % 4 == 0 && reinterpret_cast<uintptr_t>(task.v) % bytes == 0 &&
         reinterpret_cast<uintptr_t>(task.y) % bytes == 0;
}

template <class T>
cudaError_t launch_for(AttentionTask const& task, cudaStream_t stream) {
  PlacedTask const placed{task, whole_words(task)};
  return with_slots(task.count, [&](auto slots) {
    return launch(attention_kernel<decltype(slots)::value, T>, placed, task.heads, task.rows, kWarps, kThreads, stream);
  });
}

}  // namespace

cudaError_t reciprocal_neighbor_attention(AttentionTask const& task, cudaStream_t stream) noexcept {
  if (!sound(task)) {
    return cudaErrorInvalidValue;
  }
  if (task.heads == 0 || task.rows == 0) {
    return cudaSuccess;
  }
  if (task.a == nullptr || task.b == nullptr || task.v == nullptr || task.neighbors == nullptr || task.y == nullptr) {
    return cudaErrorInvalidValue;
  }
  return task.type == Type::kFloat32 ? launch_for<float>(task, stream) : launch_for<__half>(task, stream);
}

}  // namespace nformer
