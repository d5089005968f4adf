// The Python module `_native`: raw arrays in, filled arrays out. Checks live in native.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <string>
#include <vector>

#include "row_top_k.h"
#include "table.h"
#include "threads.h"

namespace nb = nanobind;

namespace {

using namespace nformer;
using Floats = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using FloatsOut = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Lists = nb::ndarray<const int32_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using ListsOut = nb::ndarray<int32_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

const Table& table_of(const std::string& isa) {
  const Table* table = find_table(isa.c_str());
  if (!table) throw nb::value_error("no such instruction set here");
  return *table;
}

std::vector<std::string> instruction_sets() {
  const char* names[8];
  const int count = list_tables(names, 8);
  return {names, names + count};
}

// The first row of x [rows, length] with a NaN or infinity, or -1.
int64_t first_bad_row(Floats x, int threads) {
  const nb::gil_scoped_release release;
  const int64_t rows = x.shape(0) * x.shape(1), length = x.shape(2);
  std::atomic<int64_t> first{rows};
  parallel_ranges(threads, rows, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float sum = 0;  // x - x is 0 for a finite x and NaN otherwise
      for (int64_t i = 0; i < length; ++i) sum += x.data()[row * length + i] - x.data()[row * length + i];
      if (sum == 0) continue;
      int64_t seen = first.load();
      while (row < seen && !first.compare_exchange_weak(seen, row)) {
      }
      return;
    }
  });
  return first < rows ? first.load() : -1;
}

// The first row of neighbors [rows, K] with an entry outside -1..count-1, or -1.
int64_t first_bad_list(Lists x, int64_t count, int threads) {
  const nb::gil_scoped_release release;
  const int64_t rows = x.shape(0) * x.shape(1), length = x.shape(2);
  std::atomic<int64_t> first{rows};
  parallel_ranges(threads, rows, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int bad = 0;
      for (int64_t i = 0; i < length; ++i) bad |= x.data()[row * length + i] < -1 || x.data()[row * length + i] >= count;
      if (!bad) continue;
      int64_t seen = first.load();
      while (row < seen && !first.compare_exchange_weak(seen, row)) {
      }
      return;
    }
  });
  return first < rows ? first.load() : -1;
}

void row_top_k(Floats a, Floats b, ListsOut out, int threads, const std::string& isa, bool tree) {
  const Table& table = table_of(isa);
  const nb::gil_scoped_release release;
  const StandardArithmetic scope;
  const int64_t n = a.shape(1), m = b.shape(1), r = a.shape(2), k = out.shape(2);
  for (size_t head = 0; head < a.shape(0); ++head) {
    const RowTopK x{a.data() + head * n * r, b.data() + head * m * r, n, m, r, static_cast<int>(k),
                    out.data() + head * n * k};
    tree ? row_top_k_tree(table, x, threads) : row_top_k_dense(table, x, threads);
  }
}

// Exact scores of the pairs (i, columns[h, i, n]); -infinity where the column is -1.
void pair_scores(Floats a, Floats b, Lists columns, nb::ndarray<double, nb::ndim<3>, nb::c_contig> out, int threads,
                 const std::string& isa) {
  const Table& table = table_of(isa);
  const nb::gil_scoped_release release;
  const int64_t n = a.shape(1), m = b.shape(1), r = a.shape(2), k = columns.shape(2);
  parallel_ranges(threads, a.shape(0) * n, 512, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t s = row * k; s < (row + 1) * k; ++s) {
        const int32_t column = columns.data()[s];
        if (column < 0)
          out.data()[s] = -INFINITY;
        else
          table.score(a.data() + row * r, b.data() + row / n * m * r, r, &column, 1, out.data() + s);
      }
  });
}

struct Memory {
  explicit Memory(int64_t k) : slots(k), weights(k), shares(2 * k) {}
  Scratch scratch() { return {slots.data(), weights.data(), shares.data()}; }
  std::vector<int32_t> slots;
  std::vector<double> weights;
  std::vector<float> shares;
};

constexpr int64_t kAttendRows = 128;

Attention head_of(const Floats& a, const Floats& b, const Floats& v, const Lists& neighbors, double scale, size_t h) {
  const int64_t n = a.shape(1), r = a.shape(2), d = v.shape(2), k = neighbors.shape(2);
  const size_t list = neighbors.shape(0) == 1 ? 0 : h;
  return {a.data() + h * n * r, b.data() + h * n * r, v.data() + h * n * d, neighbors.data() + list * n * k,
          n,                    r,                    d,                    k,
          scale};
}

void attend(Floats a, Floats b, Floats v, Lists neighbors, double scale, FloatsOut y, int threads,
            const std::string& isa) {
  const Table& table = table_of(isa);
  const nb::gil_scoped_release release;
  for (size_t h = 0; h < a.shape(0); ++h) {
    const Attention x = head_of(a, b, v, neighbors, scale, h);
    parallel_ranges(threads, x.n, kAttendRows, [&](int64_t begin, int64_t end) {
      Memory memory(x.k);
      table.attend(x, begin, end, y.data() + h * x.n * x.d, memory.scratch());
    });
  }
}

void attend_backward(Floats gy, Floats a, Floats b, Floats v, Lists neighbors, double scale, FloatsOut ga, FloatsOut gb,
                     FloatsOut gv, int threads, const std::string& isa) {
  const Table& table = table_of(isa);
  const nb::gil_scoped_release release;
  for (size_t h = 0; h < a.shape(0); ++h) {
    const Attention x = head_of(a, b, v, neighbors, scale, h);
    std::vector<float> weight(x.n * x.k), slope(x.n * x.k);
    const AttentionGradient g{gy.data() + h * x.n * x.d, weight.data(),           slope.data(),
                              ga.data() + h * x.n * x.r, gb.data() + h * x.n * x.r, gv.data() + h * x.n * x.d};
    parallel_ranges(threads, x.n, kAttendRows, [&](int64_t begin, int64_t end) {
      Memory memory(x.k);
      table.attend_backward_rows(x, g, begin, end, memory.scratch());
    });
    parallel_ranges(threads, x.n, kAttendRows, [&](int64_t begin, int64_t end) {
      Memory memory(x.k);
      table.attend_backward_columns(x, g, begin, end, memory.scratch());
    });
  }
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("instruction_sets", &instruction_sets);
  m.def("first_bad_row", &first_bad_row);
  m.def("first_bad_list", &first_bad_list);
  m.def("row_top_k", &row_top_k);
  m.def("pair_scores", &pair_scores);
  m.def("attend", &attend);
  m.def("attend_backward", &attend_backward);
  m.attr("MAX_TREE_RANK") = kMaxTreeRank;
}
