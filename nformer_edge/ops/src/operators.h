// The two operators over whole tensors: heads, threads, and the checks that raw memory needs. Row-major throughout.
#pragma once

#include <cstdint>

#include "table.h"

namespace nformer {

// a [H, N, R], b [H, M, R], both finite -> neighbors [H, N, k], k <= M. `symmetric`: a = b or a = -b.
struct TopKTensors {
  const float* a;
  const float* b;
  int64_t heads, n, m, r;
  int k;
  int32_t* neighbors;
  bool symmetric;
};

// a, b [H, N, R], v [H, N, D], neighbors [lists = H or 1, N, K], each -1..N-1; t [thresholds = H or 1, N] or null;
// cameras [N] or null.
struct AttentionTensors {
  const float* a;
  const float* b;
  const float* v;
  const int32_t* neighbors;
  int64_t heads, lists, n, r, d, k;
  double scale;
  const float* t = nullptr;
  int64_t thresholds = 1;
  const int32_t* cameras = nullptr;
  double camera_factor = 1;
  const int32_t* rows = nullptr;  // [row_count], those to compute, or null: all
  int64_t row_count = 0;
};

// One layer of the gated head, of some rows: each joined by what its neighbors give it, and then by its own [N, D], if
// there is one.
struct GatedLayer {
  const float* x;        // [N, D]
  const int32_t* lists;  // [N, width]; the first k of each count
  const float* t;        // [N]
  const int32_t* rows;   // [count]
  int64_t n, d, width, k, count;
  double scale;
  float strength;
  const float* own;
  float own_share;
};

// The first row of x [rows, length] with a NaN or infinity, or -1.
int64_t first_bad_row(const float* x, int64_t rows, int64_t length, int threads);
// The first row of x [rows, length] with an entry outside -1..count-1, or -1.
int64_t first_bad_list(const int32_t* x, int64_t rows, int64_t length, int64_t count, int threads);

// Returns how many pairs integer products left to exact scores.
int64_t row_top_k(const Table& table, const TopKTensors& x, int threads, bool tree);
// y [H, N, D], or [H, row_count, D].
void attend(const Table& table, const AttentionTensors& x, float* y, int threads);
// y [count, D]. Returns the first row whose list has an entry outside -1..N-1, and then computes nothing; or -1.
int64_t gated_layer(const Table& table, const GatedLayer& x, float* y, int threads);
// Exchanges rows [count] of an array [N, D] with `values` [count, D], those that differ by more than `still`: `moved`.
void swap_rows(float* array, const int32_t* rows, float* values, int64_t d, int64_t count, float still, uint8_t* moved,
               int threads);
// out[i] = the flags [N] of those whom row i of lists [N, width] names at `places` [count], together; -1 has none.
// Returns the first row with an entry outside -1..N-1 there, or -1.
int64_t reached(const uint8_t* flags, const int32_t* lists, int64_t n, int64_t width, const int32_t* places,
                int64_t count, uint8_t* out, int threads);
// From gy [H, N, D]; ga, gb, gv, gt are shaped as a, b, v, t, and gt is zero before the call.
void attend_backward(const Table& table, const AttentionTensors& x, const float* gy, float* ga, float* gb, float* gv,
                     float* gt, int threads);

}  // namespace nformer
