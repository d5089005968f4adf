// The library `_kernels.so`: C functions on row-major arrays, so that one file serves every Python. `ops/library.py` calls
// them; checks live in native.py. Each returns -2 after an exception, whose words `nformer_error` has, and -3 without
// memory; an instruction set is "" for the fastest.
#include <algorithm>
#include <cmath>
#include <exception>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "k_reciprocal.h"
#include "operators.h"
#include "table.h"
#include "threads.h"

#define NFORMER_API extern "C" __attribute__((visibility("default")))

namespace {

using namespace nformer;

thread_local std::string error;

// C has no exceptions: one that left here would end the process.
template <typename Work>
int64_t guarded(const char* isa, Work work) {
  try {
    const Table* table = find_table(isa);
    if (!table) throw std::runtime_error(std::string("no instruction set here named ") + isa);
    return work(*table);
  } catch (const std::bad_alloc&) {
    return -3;
  } catch (const std::exception& e) {
    error = e.what();
    return -2;
  }
}

}  // namespace

// a, b, v, neighbors and the gate's t [thresholds, N] and cameras [N], which may be null: `AttentionTensors`.
struct NFormerAttention {
  const float *a, *b, *v;
  const int32_t* neighbors;
  int64_t heads, lists, n, r, d, k;
  double scale;
  const float* t;
  int64_t thresholds;
  const int32_t* cameras;
  double camera_factor;
  const int32_t* rows;
  int64_t row_count;
};

namespace {

AttentionTensors tensors_of(const NFormerAttention& x) {
  return {x.a, x.b,     x.v, x.neighbors,  x.heads,   x.lists,         x.n,    x.r,        x.d,
          x.k, x.scale, x.t, x.thresholds, x.cameras, x.camera_factor, x.rows, x.row_count};
}

}  // namespace

NFORMER_API const char* nformer_error() { return error.c_str(); }

NFORMER_API int nformer_instruction_sets(const char** names, int capacity) { return list_tables(names, capacity); }

NFORMER_API int nformer_max_tree_rank() { return kMaxTreeRank; }

NFORMER_API int64_t nformer_first_bad_row(const float* x, int64_t rows, int64_t length, int threads) {
  return guarded("", [&](const Table&) { return first_bad_row(x, rows, length, threads); });
}

NFORMER_API int64_t nformer_first_bad_list(const int32_t* x, int64_t rows, int64_t length, int64_t count, int threads) {
  return guarded("", [&](const Table&) { return first_bad_list(x, rows, length, count, threads); });
}

NFORMER_API int64_t nformer_row_top_k(const float* a, const float* b, int64_t heads, int64_t n, int64_t m, int64_t r,
                                      int k, int32_t* neighbors, int tree, int symmetric, int threads,
                                      const char* isa) {
  return guarded(isa, [&](const Table& table) {
    const TopKTensors x{a, b, heads, n, m, r, k, neighbors, symmetric != 0};
    return row_top_k(table, x, threads, tree != 0);
  });
}

// Exact scores of the pairs (i, columns[h, p, s]), -infinity where the column is -1; i is p, or rows[p] if there are rows.
NFORMER_API int64_t nformer_pair_scores(const float* a, const float* b, const int32_t* columns, const int32_t* rows,
                                        int64_t heads, int64_t n, int64_t m, int64_t r, int64_t k, int64_t count,
                                        double* scores, int threads, const char* isa) {
  return guarded(isa, [&](const Table& table) {
    parallel_ranges(threads, heads * count, 1 + 4096 / (1 + k), [&](int64_t begin, int64_t end) {
      std::vector<int32_t> named(k);
      std::vector<double> found(k);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t h = row / count, p = row % count;
        const int32_t* own = columns + row * k;
        const auto last = std::copy_if(own, own + k, named.begin(), [](int32_t column) { return column >= 0; });
        table.score(a + (h * n + (rows ? rows[p] : p)) * r, b + h * m * r, r, named.data(), last - named.begin(), found.data());
        for (int64_t s = 0, next = 0; s < k; ++s) scores[row * k + s] = own[s] < 0 ? -INFINITY : found[next++];
      }
    });
    return 0;
  });
}

// Exact scores of x [D] with all rows [N, D], as float32.
NFORMER_API int64_t nformer_row_scores(const float* rows, const float* x, int64_t n, int64_t d, float* scores,
                                       int threads, const char* isa) {
  return guarded(isa, [&](const Table& table) {
    constexpr int64_t kRows = 2048;
    std::vector<int32_t> each(kRows);
    std::iota(each.begin(), each.end(), 0);
    parallel_ranges(threads, n, kRows, [&](int64_t begin, int64_t end) {
      std::vector<double> found(end - begin);
      table.score(x, rows + begin * d, d, each.data(), end - begin, found.data());
      std::copy(found.begin(), found.end(), scores + begin);
    });
    return 0;
  });
}

NFORMER_API int64_t nformer_k_reciprocal(const float* unit, const int32_t* lists, const int32_t* same,
                                         const double* farthest, int64_t n, int64_t d, int64_t k, int64_t half,
                                         int64_t expand, int64_t queries, double share, float* distances, int threads,
                                         const char* isa) {
  return guarded(isa, [&](const Table& table) {
    const KReciprocal x{unit, lists, same, farthest, n, d, k, half, expand, queries};
    k_reciprocal(table, x, static_cast<float>(share), distances, threads);
    return 0;
  });
}

NFORMER_API int64_t nformer_attend(const NFormerAttention* x, float* y, int threads, const char* isa) {
  return guarded(isa, [&](const Table& table) {
    attend(table, tensors_of(*x), y, threads);
    return 0;
  });
}

NFORMER_API int64_t nformer_gated_layer(const float* x, const int32_t* lists, const float* t, const int32_t* rows,
                                        const float* own, int64_t n, int64_t d, int64_t width, int64_t k, int64_t count,
                                        double scale, double strength, double own_share, float* y, int threads,
                                        const char* isa) {
  return guarded(isa, [&](const Table& table) {
    const GatedLayer layer{x,     lists, t,   rows, n, d, width, k, count, scale, static_cast<float>(strength),
                           own, static_cast<float>(own_share)};
    return gated_layer(table, layer, y, threads);
  });
}

NFORMER_API int64_t nformer_swap_rows(float* array, const int32_t* rows, float* values, int64_t d, int64_t count,
                                      double still, uint8_t* moved, int threads) {
  return guarded("", [&](const Table&) {
    swap_rows(array, rows, values, d, count, static_cast<float>(still), moved, threads);
    return 0;
  });
}

NFORMER_API int64_t nformer_reached(const uint8_t* flags, const int32_t* lists, const int32_t* places, int64_t n,
                                    int64_t width, int64_t count, uint8_t* out, int threads) {
  return guarded("", [&](const Table&) { return reached(flags, lists, n, width, places, count, out, threads); });
}

NFORMER_API int64_t nformer_attend_backward(const NFormerAttention* x, const float* gy, float* ga, float* gb, float* gv,
                                            float* gt, int threads, const char* isa) {
  return guarded(isa, [&](const Table& table) {
    attend_backward(table, tensors_of(*x), gy, ga, gb, gv, gt, threads);
    return 0;
  });
}
