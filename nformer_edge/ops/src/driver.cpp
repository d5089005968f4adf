// Runs the kernels without Python, for sanitizers and emulators: every instruction set here, several shapes, against a
// plain loop in double. Prints one checksum of all results, which is the same on every machine; exits 1 at a difference.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "operators.h"
#include "row_top_k.h"
#include "table.h"
#include "threads.h"

namespace {

using namespace nformer;

uint64_t state = 1;

uint64_t random_bits() {  // SplitMix64
  uint64_t z = state += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// Exact-size heap blocks, so that AddressSanitizer sees one element too many.
std::vector<float> random_floats(int64_t count, int64_t distinct, float size) {
  std::vector<float> out(count);
  for (float& x : out) {
    const double u = static_cast<double>(random_bits() >> 11) / 9007199254740992.0 - 0.5;
    x = distinct ? static_cast<float>(static_cast<int64_t>(u * static_cast<double>(distinct))) : static_cast<float>(u);
    x *= size;
  }
  return out;
}

std::vector<int32_t> plain_top_k(const std::vector<float>& a, const std::vector<float>& b, int64_t n, int64_t m,
                                 int64_t r, int k) {
  std::vector<int32_t> out(n * k, -1);
  std::vector<std::pair<double, int32_t>> scores(m);
  const Table* table = find_table("");
  for (int64_t i = 0; i < n; ++i) {
    for (int32_t j = 0; j < m; ++j) {
      double score;
      table->score(a.data() + i * r, b.data(), r, &j, 1, &score);
      scores[j] = {-score, j};
    }
    std::sort(scores.begin(), scores.end());
    for (int64_t s = 0; s < std::min<int64_t>(k, m); ++s) out[i * k + s] = scores[s].second;
  }
  return out;
}

uint64_t checksum = 1469598103934665603u;

void add(const void* data, size_t bytes) {  // FNV-1a
  for (size_t i = 0; i < bytes; ++i) checksum = (checksum ^ static_cast<const unsigned char*>(data)[i]) * 1099511628211u;
}

bool check(bool holds, const char* what, const char* isa, int threads) {
  if (!holds) std::printf("%s differs: %s, %d threads\n", what, isa, threads);
  return holds;
}

struct Case {
  int64_t n, m, r;
  int k;
  int64_t distinct;
  float size;
};

bool run_top_k(const Case& c, const std::vector<const Table*>& tables) {
  const std::vector<float> a = random_floats(c.n * c.r, c.distinct, c.size);
  const bool same = c.m == 0;
  const int64_t m = same ? c.n : c.m;
  const std::vector<float> other = same ? std::vector<float>() : random_floats(m * c.r, c.distinct, c.size);
  const std::vector<float>& b = same ? a : other;
  const std::vector<int32_t> expected = plain_top_k(a, b, c.n, m, c.r, c.k);
  add(expected.data(), expected.size() * sizeof(int32_t));
  bool right = true;
  for (const Table* table : tables)
    for (int threads : {1, 3})
      for (int tree = 0; tree <= (c.r <= kMaxTreeRank); ++tree) {
        std::vector<int32_t> lists(c.n * c.k);
        const RowTopK x{a.data(), b.data(), c.n, m, c.r, c.k, lists.data(), same};
        if (tree)
          row_top_k_tree(*table, x, threads);
        else
          row_top_k_dense(*table, x, threads);
        right &= check(lists == expected, tree ? "tree" : "product", table->name, threads);
      }
  return right;
}

struct Gradients {
  std::vector<float> y, ga, gb, gv, gt;
  bool operator==(const Gradients& o) const {
    return y == o.y && ga == o.ga && gb == o.gb && gv == o.gv && gt == o.gt;
  }
};

bool run_attention(int64_t n, int64_t r, int64_t d, int k, bool gated, const std::vector<const Table*>& tables) {
  const std::vector<float> a = random_floats(n * r, 0, 4), b = random_floats(n * r, 0, 4), v = random_floats(n * d, 0, 1);
  const std::vector<float> gy = random_floats(n * d, 0, 1);
  const std::vector<int32_t> lists = plain_top_k(a, b, n, n, r, k);
  AttentionTensors x{a.data(), b.data(), v.data(), lists.data(), 1, 1, n, r, d, k, 0.5};
  const std::vector<float> t = random_floats(gated ? n : 0, 5, 1), cameras_as_floats = random_floats(gated ? n : 0, 4, 1);
  const std::vector<int32_t> cameras(cameras_as_floats.begin(), cameras_as_floats.end());
  if (gated) x.t = t.data(), x.cameras = cameras.data(), x.camera_factor = 0.5;
  Gradients first;
  bool right = true;
  for (const Table* table : tables)
    for (int threads : {1, 3}) {
      Gradients own;
      for (auto* part : {&own.y, &own.gv}) part->resize(n * d);
      for (auto* part : {&own.ga, &own.gb}) part->resize(n * r);
      own.gt.resize(t.size());
      attend(*table, x, own.y.data(), threads);
      attend_backward(*table, x, gy.data(), own.ga.data(), own.gb.data(), own.gv.data(), own.gt.data(), threads);
      if (first.y.empty()) first = own;
      right &= check(own == first, gated ? "gated attention" : "attention", table->name, threads);
    }
  for (const auto* part : {&first.y, &first.ga, &first.gb, &first.gv, &first.gt})
    add(part->data(), part->size() * sizeof(float));
  return right;
}

// What row `i` is after a layer, in double.
std::vector<double> plain_layer(const GatedLayer& x, int64_t i) {
  std::vector<double> y(x.d), joined(x.d);
  for (int64_t s = 0; s < x.k; ++s) {
    const int64_t j = x.lists[i * x.width + s];
    if (j < 0 || j == i) continue;
    double score = 0;
    for (int64_t c = 0; c < x.d; ++c) score += static_cast<double>(x.x[i * x.d + c]) * x.x[j * x.d + c];
    const double weight = 1 / (1 + std::exp(-x.scale * (score - 0.5 * x.t[i] - 0.5 * x.t[j])));
    for (int64_t c = 0; c < x.d; ++c) y[c] += weight * x.x[j * x.d + c];
  }
  const auto join = [&](const float* a, double share, const std::vector<double>& b, double of_b) {
    double sum = 0;
    for (int64_t c = 0; c < x.d; ++c) joined[c] = share * a[i * x.d + c] + of_b * b[c], sum += joined[c] * joined[c];
    for (double& value : joined) value /= std::max(std::sqrt(sum), 1e-12);
  };
  join(x.x, 1, y, x.strength);
  if (x.own) join(x.own, x.own_share, std::vector<double>(joined), 1);
  return joined;
}

bool run_layer(int64_t n, int64_t d, int k, const std::vector<const Table*>& tables) {
  const std::vector<float> x = random_floats(n * d, 0, 2), own = random_floats(n * d, 0, 1), t = random_floats(n, 5, 1);
  const std::vector<int32_t> lists = plain_top_k(x, x, n, n, d, k);
  std::vector<int32_t> rows;
  for (int32_t i = 0; i < n; i += 2) rows.push_back(i);
  const int64_t count = static_cast<int64_t>(rows.size());
  const GatedLayer layer{x.data(), lists.data(), t.data(), rows.data(), n, d, k, k - 1, count, 2, 0.5f, own.data(), 0.25f};
  std::vector<float> first;
  bool right = true;
  for (const Table* table : tables)
    for (int threads : {1, 3}) {
      std::vector<float> y(count * d);
      gated_layer(*table, layer, y.data(), threads);
      if (first.empty()) first = y;
      right &= check(y == first, "layer", table->name, threads);
    }
  double most = 0;
  for (int64_t p = 0; p < count; ++p) {
    const std::vector<double> expected = plain_layer(layer, rows[p]);
    for (int64_t c = 0; c < d; ++c) most = std::max(most, std::fabs(first[p * d + c] - expected[c]));
  }
  add(first.data(), first.size() * sizeof(float));
  return check(most <= 1e-6, "layer in double", "", 1) && right;
}

}  // namespace

int main() {
  const char* names[8];
  const int count = list_tables(names, 8);
  std::vector<const Table*> tables;
  for (int i = 0; i < count; ++i) tables.push_back(find_table(names[i])), std::printf("%s ", names[i]);
  // n, m (0: the same array), r, k, distinct values (0: any), size
  const Case cases[] = {
      {70, 300, 5, 20, 0, 1},     {1, 1, 1, 1, 0, 1},       {33, 1100, 3, 7, 4, 1},    {200, 0, 64, 20, 0, 1},
      {450, 0, 5, 20, 3, 1},      {193, 0, 31, 128, 0, 1},  {20, 17, 256, 40, 0, 1},   {40, 90, 16, 5, 0, 1e30f},
      {40, 90, 8, 5, 0, 1e-38f},  {90, 90, 5, 9, 2, 0.0f},  {25, 600, 512, 20, 0, 1},  {300, 2100, 1, 3, 0, 1},
  };
  bool right = true;
  {
    const StandardArithmetic scope;
    for (const Case& c : cases) right &= run_top_k(c, tables);
    right &= run_attention(90, 5, 128, 20, false, tables);
    right &= run_attention(41, 19, 37, 50, false, tables);
    right &= run_attention(7, 1, 1, 3, false, tables);
    right &= run_attention(300, 5, 33, 20, true, tables);
    right &= run_attention(41, 19, 37, 50, true, tables);
    right &= run_layer(150, 37, 20, tables);
  }
  std::printf("checksum %016llx\n", static_cast<unsigned long long>(checksum));
  return right ? 0 : 1;
}
