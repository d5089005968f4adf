// What one launch of an operator is about. Tensors are contiguous, row-major and on the current device.
#pragma once

#include "nformer/standard.h"

namespace nformer {

enum class Type : int32_t { kFloat32 = 0, kFloat16 = 1 };

// The longest neighbor list that a kernel holds in registers.
inline constexpr int64_t kMaxNeighbors = 128;

struct RowTopKTask {
  void const* a;       // [heads, rows, factors]
  void const* b;       // [heads, columns, factors]
  int32_t* neighbors;  // out [heads, rows, k]
  int64_t heads, rows, columns, factors, k;
  Type type;  // of a and b
};

struct AttentionTask {
  void const* a;             // [heads, rows, factors]
  void const* b;             // [heads, rows, factors]
  void const* v;             // [heads, rows, size]
  int32_t const* neighbors;  // [neighbor_heads, rows, count]
  void* y;                   // out [heads, rows, size]
  int64_t heads, rows, factors, size, neighbor_heads, count;
  float scale;
  Type type;  // of a, b, v and y
  float const* t = nullptr;          // [threshold_heads, rows]; null: not gated
  int32_t const* cameras = nullptr;  // [rows] or null, only with t
  int64_t threshold_heads = 1;
  float camera_factor = 1.0F;
};

}  // namespace nformer
