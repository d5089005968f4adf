// RowTopK launched: what is refused, and which instantiation serves a task.
#include <cstdint>

#include "launch.cuh"
#include "nformer/dispatch.h"
#include "nformer/kernels.h"
#include "row_top_k.cuh"

namespace nformer {
namespace {

constexpr int64_t kMostFactors = 1 << 20;  // offsets inside one tile stay 32-bit

bool sound(RowTopKTask const& task) {
  bool const numbers = task.heads >= 0 && task.rows >= 0 && task.columns >= 0 && task.factors >= 1 && task.k >= 1 &&
                       task.k <= kMaxNeighbors && task.rows <= INT32_MAX - kTileColumns &&
                       task.columns <= INT32_MAX - kTileColumns && task.factors <= kMostFactors;
  return numbers && (task.type == Type::kFloat32 || task.type == Type::kFloat16);
}

}  // namespace

cudaError_t row_top_k(RowTopKTask const& task, cudaStream_t stream) noexcept {
  if (!sound(task)) {
    return cudaErrorInvalidValue;
  }
  if (task.heads == 0 || task.rows == 0) {
    return cudaSuccess;
  }
  if (task.a == nullptr || task.neighbors == nullptr || (task.b == nullptr && task.columns > 0)) {
    return cudaErrorInvalidValue;
  }
  return with_slots(task.k, [&](auto slots) {
    constexpr int kSlots = decltype(slots)::value;
    return with_factors(task.factors, [&](auto factors) {
      constexpr int kFactors = decltype(factors)::value;
      return launch(row_top_k_kernel<kFactors, kSlots>, task, task.heads, task.rows, kRowsPerBlock<kFactors, kSlots>,
                    kThreads, stream);
    });
  });
}

}  // namespace nformer
