// One launch: as many blocks as rows need, and the error that the launch gave.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace nformer {

// The kernel gets the task and the number of blocks a head. An error left by somebody before us is not ours and stays
// where it is unless it is sticky: only what this launch returns is passed on.
template <class Task>
cudaError_t launch(void (*kernel)(Task, int64_t), Task task, int64_t heads, int64_t rows, int rows_a_block,
                   int threads, cudaStream_t stream) noexcept {
  int64_t blocks_a_head = (rows + rows_a_block - 1) / rows_a_block;
  if (heads > INT32_MAX / blocks_a_head) {
    return cudaErrorInvalidValue;
  }
  void* arguments[] = {&task, &blocks_a_head};
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(heads * blocks_a_head)),
                          dim3(static_cast<unsigned>(threads)), arguments, 0, stream);
}

}  // namespace nformer
