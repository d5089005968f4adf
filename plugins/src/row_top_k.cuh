// How RowTopK is spread over threads. What is computed stands in row_logic.cuh.
#pragma once

#include <cuda_fp16.h>

#include "nformer/device_warp.cuh"
#include "nformer/dispatch.h"
#include "nformer/tasks.h"

namespace nformer {

// One head's part of a task. `first_row` is the block's.
struct Place {
  int64_t head, first_row;
};

__device__ __forceinline__ Place place_of(int64_t blocks_a_head, int rows_a_block) {
  int64_t const block = blockIdx.x;
  return {block / blocks_a_head, block % blocks_a_head * rows_a_block};
}

// The type is a flag and not a template argument: the reads are few beside the arithmetic, and it halves the code.
struct Source {
  void const* data;
  Type type;

  __device__ __forceinline__ float at(int64_t i) const {
    return type == Type::kFloat32 ? __ldg(static_cast<float const*>(data) + i)
                                  : __half2float(__ldg(static_cast<__half const*>(data) + i));
  }
  __device__ __forceinline__ Source from(int64_t i) const {
    int const bytes = type == Type::kFloat32 ? 4 : 2;
    return {static_cast<char const*>(data) + i * bytes, type};
  }
};

template <int kFactors>
__device__ __forceinline__ void stage_tile(float* tile, Source const& b, int64_t first, int64_t columns, int factors) {
  for (int place = static_cast<int>(threadIdx.x); place < kTileColumns; place += kThreads) {
    stage_column<kFactors>(tile, place, b, first + place, columns, factors);
  }
}

// Two passes over the columns when they are many: every eighth tile for a threshold that few columns exceed, then all.
// A block stages a tile in shared memory once for all its warps; a warp keeps its rows and their lists in registers.
template <int kFactors, int kSlots>
__device__ __forceinline__ void short_rows(RowTopKTask const& task, int64_t blocks_a_head) {
  __shared__ float tile[kFactors * kTileColumns];
  using Rows = RowBlock<DeviceWarp, kFactors, kSlots>;
  Place const at = place_of(blocks_a_head, kWarps * Rows::kRows);
  int const factors = static_cast<int>(task.factors), k = static_cast<int>(task.k);
  Source const a = Source{task.a, task.type}.from(at.head * task.rows * factors);
  Source const b = Source{task.b, task.type}.from(at.head * task.columns * factors);
  int64_t const first_row = at.first_row + int64_t{threadIdx.x / kLanes} * Rows::kRows;

  Rows rows;
  rows.load(a, first_row, task.rows, factors);
  if (task.columns >= kSampleFrom) {
    typename Rows::Sample sample;
    sample.clear();
    for (int64_t first = 0; first < task.columns; first += int64_t{kSampleStride} * kTileColumns) {
      stage_tile<kFactors>(tile, b, first, task.columns, factors);
      __syncthreads();
      rows.look(tile, sample);
      __syncthreads();
    }
    rows.learn(sample, k);
  }
  rows.clear();
  for (int64_t first = 0; first < task.columns; first += kTileColumns) {
    stage_tile<kFactors>(tile, b, first, task.columns, factors);
    __syncthreads();
    rows.scan(tile, first, k);
    __syncthreads();
  }
  rows.write(task.neighbors + at.head * task.rows * k, first_row, task.rows, k);
}

// ---- long factors: a 64 x 128 tile of scores, each thread 4 x 8 of them ----

inline constexpr int kDepth = 16;                       // factors staged at once
inline constexpr int kRowPitch = kScoreRows + 4;        // keeps the transposed writes off each other's banks
inline constexpr int kColumnPitch = kScoreColumns + 4;  // and every row of the tile on a 16-byte boundary
static_assert(kScoreRows == kWarps * kLongRowsPerWarp, "every row has its warp");
static_assert(kThreads == (kScoreRows / 4) * (kScoreColumns / 8), "every score has its thread");

struct LongShared {
  float a[kDepth][kRowPitch];
  float b[kDepth][kColumnPitch];
  float scores[kScoreRows][kScoreColumns];
};
static_assert(sizeof(LongShared) <= 48 * 1024, "static shared memory");

// A thread's share of the next kDepth factors, on its way from global memory.
template <int kCount>
struct Chunk {
  float value[kCount];

  // Element e of the chunk belongs to line (thread + e * kThreads) / kDepth: neighboring threads read side by side.
  // `from` is where the first line's chunk begins; `lines` and `left` say how many lines and factors there are.
  __device__ __forceinline__ void fetch(Source const& from, int lines, int left, int factors) {
    NFORMER_UNROLL
    for (int e = 0; e < kCount; ++e) {
      int const element = static_cast<int>(threadIdx.x) + e * kThreads;
      int const line = element / kDepth, factor = element % kDepth;
      value[e] = line < lines && factor < left ? from.at(line * factors + factor) : 0.0F;
    }
  }

  template <int kPitch>
  __device__ __forceinline__ void store(float (&to)[kDepth][kPitch]) const {
    NFORMER_UNROLL
    for (int e = 0; e < kCount; ++e) {
      int const element = static_cast<int>(threadIdx.x) + e * kThreads;
      to[element % kDepth][element / kDepth] = value[e];
    }
  }
};

__device__ __forceinline__ void four(float4 const& word, float* x) {
  x[0] = word.x, x[1] = word.y, x[2] = word.z, x[3] = word.w;
}

// Columns 4 * across + 0..3 and 64 + 4 * across + 0..3 of rows 4 * down + 0..3: both reads are free of conflicts.
__device__ __forceinline__ void multiply(LongShared const& shared, int down, int across, float (&sum)[4][8]) {
  NFORMER_UNROLL
  for (int r = 0; r < kDepth; ++r) {
    float left[4], right[8];
    four(*reinterpret_cast<float4 const*>(&shared.a[r][4 * down]), left);
    four(*reinterpret_cast<float4 const*>(&shared.b[r][4 * across]), right);
    four(*reinterpret_cast<float4 const*>(&shared.b[r][kScoreColumns / 2 + 4 * across]), right + 4);
    NFORMER_UNROLL
    for (int i = 0; i < 4; ++i) {
      NFORMER_UNROLL
      for (int j = 0; j < 8; ++j) {
        sum[i][j] = __fmaf_rn(left[i], right[j], sum[i][j]);
      }
    }
  }
}

// Fills shared.scores from lines that begin at `a` and `b`; `rows` and `columns` of them are there.
__device__ __forceinline__ void score_tile(Source const& a, Source const& b, int rows, int columns, int factors,
                                           LongShared& shared) {
  int const down = static_cast<int>(threadIdx.x) / 16, across = static_cast<int>(threadIdx.x) % 16;
  float sum[4][8] = {};
  Chunk<kScoreRows * kDepth / kThreads> left;
  Chunk<kScoreColumns * kDepth / kThreads> right;
  left.fetch(a, rows, factors, factors);
  right.fetch(b, columns, factors, factors);
  NFORMER_NO_UNROLL
  for (int depth = 0; depth < factors; depth += kDepth) {
    __syncthreads();  // nobody reads the chunk before any more
    left.store(shared.a);
    right.store(shared.b);
    __syncthreads();
    left.fetch(a.from(depth + kDepth), rows, factors - depth - kDepth, factors);
    right.fetch(b.from(depth + kDepth), columns, factors - depth - kDepth, factors);
    multiply(shared, down, across, sum);
  }
  NFORMER_UNROLL
  for (int i = 0; i < 4; ++i) {
    bool const row_there = 4 * down + i < rows;
    NFORMER_UNROLL
    for (int j = 0; j < 8; ++j) {
      int const column = j / 4 * (kScoreColumns / 2) + 4 * across + j % 4;
      shared.scores[4 * down + i][column] = row_there && column < columns ? sum[i][j] : kNaN;
    }
  }
  __syncthreads();
}

__device__ __forceinline__ int at_most(int64_t count, int most) {
  return count < most ? static_cast<int>(count) : most;
}

template <int kSlots>
__device__ __forceinline__ void long_rows(RowTopKTask const& task, int64_t blocks_a_head) {
  __shared__ __align__(16) LongShared shared;
  Place const at = place_of(blocks_a_head, kScoreRows);
  int const k = static_cast<int>(task.k), factors = static_cast<int>(task.factors);
  int const warp_row = static_cast<int>(threadIdx.x) / kLanes * kLongRowsPerWarp;
  Source const a = Source{task.a, task.type}.from((at.head * task.rows + at.first_row) * factors);
  Source const b = Source{task.b, task.type}.from(at.head * task.columns * factors);
  LongRowBlock<DeviceWarp, kSlots> rows;
  rows.clear();
  for (int64_t first = 0; first < task.columns; first += kScoreColumns) {
    score_tile(a, b.from(first * factors), at_most(task.rows - at.first_row, kScoreRows),
               at_most(task.columns - first, kScoreColumns), factors, shared);
    rows.take(shared.scores[warp_row], first, k);
  }
  rows.write(task.neighbors + at.head * task.rows * k, at.first_row + warp_row, task.rows, k);
}

// ---- the kernel: one of the two, by its factors ----

// How many rows a block takes, and how many blocks are to fit on a multiprocessor.
template <int kFactors, int kSlots>
inline constexpr int kRowsPerBlock = kWarps * RowBlock<DeviceWarp, kFactors, kSlots>::kRows;
template <int kSlots>
inline constexpr int kRowsPerBlock<kLongFactors, kSlots> = kScoreRows;
template <int kFactors, int kSlots>
inline constexpr int kBlocksTogether = kFactors == kLongFactors && kSlots == 4 ? 1 : 2;

template <int kFactors, int kSlots>
__device__ __forceinline__ void row_top_k_block(RowTopKTask const& task, int64_t blocks_a_head) {
  if constexpr (kFactors == kLongFactors) {
    long_rows<kSlots>(task, blocks_a_head);
  } else {
    short_rows<kFactors, kSlots>(task, blocks_a_head);
  }
}

template <int kFactors, int kSlots>
__global__ void __launch_bounds__(kThreads, (kBlocksTogether<kFactors, kSlots>))
    row_top_k_kernel(RowTopKTask task, int64_t blocks_a_head) {
  row_top_k_block<kFactors, kSlots>(task, blocks_a_head);
}

}  // namespace nformer
