// The Python module `_native`: raw arrays in, filled arrays out. Checks live in native.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "k_reciprocal.h"
#include "operators.h"
#include "table.h"
#include "threads.h"

namespace nb = nanobind;

namespace {

using namespace nformer;
using Floats = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using FloatsOut = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Thresholds = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ThresholdsOut = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Cameras = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = Cameras;
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

int64_t bad_row(Floats x, int threads) {
  const nb::gil_scoped_release release;
  return first_bad_row(x.data(), x.shape(0) * x.shape(1), x.shape(2), threads);
}

int64_t bad_list(Lists x, int64_t count, int threads) {
  const nb::gil_scoped_release release;
  return first_bad_list(x.data(), x.shape(0) * x.shape(1), x.shape(2), count, threads);
}

int64_t top_k(Floats a, Floats b, ListsOut out, int threads, const std::string& isa, bool tree, bool symmetric) {
  const Table& table = table_of(isa);
  const nb::gil_scoped_release release;
  const TopKTensors x{a.data(),   b.data(),   static_cast<int64_t>(a.shape(0)), static_cast<int64_t>(a.shape(1)),
                      static_cast<int64_t>(b.shape(1)), static_cast<int64_t>(a.shape(2)),
                      static_cast<int>(out.shape(2)),   out.data(), symmetric};
  return row_top_k(table, x, threads, tree);
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

struct Gate {
  std::optional<Thresholds> t;
  std::optional<Cameras> cameras;
  double camera_factor;
};

AttentionTensors tensors_of(const Floats& a, const Floats& b, const Floats& v, const Lists& neighbors, double scale,
                            const Gate& gate) {
  const auto size = [](size_t n) { return static_cast<int64_t>(n); };
  AttentionTensors x{a.data(),         b.data(),         v.data(),         neighbors.data(),         size(a.shape(0)), size(neighbors.shape(0)),
                     size(a.shape(1)), size(a.shape(2)), size(v.shape(2)), size(neighbors.shape(2)), scale};
  if (gate.t) x.t = gate.t->data(), x.thresholds = size(gate.t->shape(0));
  if (gate.cameras) x.cameras = gate.cameras->data(), x.camera_factor = gate.camera_factor;
  return x;
}

void attention(Floats a, Floats b, Floats v, Lists neighbors, double scale, std::optional<Thresholds> t,
               std::optional<Cameras> cameras, double camera_factor, std::optional<Rows> rows, FloatsOut y, int threads,
               const std::string& isa) {
  const Table& table = table_of(isa);
  AttentionTensors x = tensors_of(a, b, v, neighbors, scale, {t, cameras, camera_factor});
  if (rows) x.rows = rows->data(), x.row_count = static_cast<int64_t>(rows->shape(0));
  const nb::gil_scoped_release release;
  attend(table, x, y.data(), threads);
}

void attention_backward(Floats gy, Floats a, Floats b, Floats v, Lists neighbors, double scale,
                        std::optional<Thresholds> t, std::optional<Cameras> cameras, double camera_factor, FloatsOut ga,
                        FloatsOut gb, FloatsOut gv, std::optional<ThresholdsOut> gt, int threads,
                        const std::string& isa) {
  const Table& table = table_of(isa);
  const AttentionTensors x = tensors_of(a, b, v, neighbors, scale, {t, cameras, camera_factor});
  const nb::gil_scoped_release release;
  attend_backward(table, x, gy.data(), ga.data(), gb.data(), gv.data(), gt ? gt->data() : nullptr, threads);
}

void rerank(nb::ndarray<const float, nb::ndim<2>, nb::c_contig> unit,
            nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig> lists,
            nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig> same,
            nb::ndarray<const double, nb::ndim<1>, nb::c_contig> farthest, int64_t half, int64_t expand, double share,
            nb::ndarray<float, nb::ndim<2>, nb::c_contig> distances, int threads, const std::string& isa) {
  const Table& table = table_of(isa);
  const nb::gil_scoped_release release;
  const auto size = [](size_t n) { return static_cast<int64_t>(n); };
  const KReciprocal x{unit.data(),        lists.data(),       same.data(),          farthest.data(),
                      size(unit.shape(0)), size(unit.shape(1)), size(lists.shape(1)), half,
                      expand,             size(distances.shape(0))};
  k_reciprocal(table, x, static_cast<float>(share), distances.data(), threads);
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("instruction_sets", &instruction_sets);
  m.def("first_bad_row", &bad_row);
  m.def("first_bad_list", &bad_list);
  m.def("row_top_k", &top_k);
  m.def("pair_scores", &pair_scores);
  m.def("k_reciprocal", &rerank);
  m.def("attend", &attention);
  m.def("attend_backward", &attention_backward);
  m.attr("MAX_TREE_RANK") = kMaxTreeRank;
}
