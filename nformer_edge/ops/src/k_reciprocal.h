// k-reciprocal encodings and their Jaccard distances (Zhong et al., CVPR 2017, eq. 5 to 10).
#pragma once

#include <cstdint>

#include "table.h"

namespace nformer {

// N images: the queries, then the gallery.
struct KReciprocal {
  const float* unit;       // [N, D], of length 1
  const int32_t* lists;    // [N, K], of different images, from RowTopK
  const int32_t* same;     // [N], the first image whose features equal each one's
  const double* farthest;  // [N], over 0: what the squared distances of each are divided by
  int64_t n, d, k;
  int64_t half;    // <= K, places of a list in which a neighbor's own neighbors must choose each other
  int64_t expand;  // <= K, neighbors whose encodings are averaged
  int64_t queries;
};

// distances [queries, N - queries]: share * Jaccard distance, in half precision's steps as the published code has them.
void k_reciprocal(const Table& table, const KReciprocal& x, float share, float* distances, int threads);

}  // namespace nformer
