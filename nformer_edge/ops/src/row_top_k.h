// RowTopK on one head; docs/operators.md is the contract.
#pragma once

#include "table.h"

namespace nformer {

// a [N, R], b [M, R], finite, row-major. neighbors [N, k] is written. `symmetric` says that a = b or a = -b, which halves
// the dense work.
struct RowTopK {
  const float* a;
  const float* b;
  int64_t n, m, r;
  int k;
  int32_t* neighbors;
  bool symmetric;
};

// Powers of two that bring the largest factor under 1, so that the filter neither overflows nor underflows.
struct Scaling {
  double a = 1, b = 1;
};

Scaling find_scaling(const RowTopK& x, int threads);
// Every pair through a blocked matrix product: any R. Returns how many pairs integer products left to exact scores.
int64_t row_top_k_dense(const Table& table, const RowTopK& x, int threads);
// Blocks of near columns with a box around each; those that cannot hold a neighbor are skipped: R <= kMaxTreeRank.
void row_top_k_tree(const Table& table, const RowTopK& x, int threads);

}  // namespace nformer
