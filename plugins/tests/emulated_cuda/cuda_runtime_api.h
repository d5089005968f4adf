// Stands in for the CUDA runtime when g++ compiles the kernels for the CPU tests: types and error codes.
#pragma once

#include <cstddef>
#include <cstdint>

enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;
