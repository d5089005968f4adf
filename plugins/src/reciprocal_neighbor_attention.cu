// ReciprocalNeighborAttention launched: what is refused, and which instantiation serves a task.
#include <cuda_fp16.h>

#include <cstdint>

#include "launch.cuh"
#include "nformer/dispatch.h"
#include "nformer/kernels.h"
#include "reciprocal_neighbor_attention.cuh"

namespace nformer {
namespace {

bool sound(AttentionTask const& task) {
  constexpr int64_t kMost = INT32_MAX - 4 * kLanes;
  bool const numbers = task.heads >= 0 && task.rows >= 0 && task.rows <= kMost && task.factors >= 1 &&
                       task.factors <= kMost && task.size >= 1 && task.size <= kMost && task.count >= 1 &&
                       task.count <= kMaxNeighbors && (task.neighbor_heads == 1 || task.neighbor_heads == task.heads);
  bool const gate = (task.threshold_heads == 1 || task.threshold_heads == task.heads) &&
                    (task.cameras == nullptr || task.t != nullptr) && task.camera_factor - task.camera_factor == 0.0F;
  return numbers && gate && task.scale - task.scale == 0.0F &&
         (task.type == Type::kFloat32 || task.type == Type::kFloat16);
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
