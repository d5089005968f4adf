#include "operators.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <vector>

#include "row_top_k.h"
#include "threads.h"

namespace nformer {
namespace {

constexpr int64_t kCheckRows = 4096;
constexpr int64_t kAttendRows = 32;
constexpr int64_t kReachRows = 16384;  // fewer are done before a thread has started
constexpr int64_t kSwapRows = 4096;    // likewise

// The first row of which `bad` holds, or -1.
template <class Bad>
int64_t first_row(int64_t rows, int threads, const Bad& bad, int64_t grain = kCheckRows) {
  std::atomic<int64_t> first{rows};
  parallel_ranges(threads, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (!bad(row)) continue;
      int64_t seen = first.load();
      while (row < seen && !first.compare_exchange_weak(seen, row)) {
      }
      return;
    }
  });
  return first < rows ? first.load() : -1;
}

// Whether an entry of a list is outside -1..count-1.
bool outside(const int32_t* list, int64_t length, int64_t count) {
  int bad = 0;
  for (int64_t i = 0; i < length; ++i) bad |= list[i] < -1 || list[i] >= count;
  return bad != 0;
}

Attention head_of(const AttentionTensors& x, int64_t h) {
  const int32_t* neighbors = x.neighbors + (x.lists == 1 ? 0 : h) * x.n * x.k;
  const float* t = x.t ? x.t + (x.thresholds == 1 ? 0 : h) * x.n : nullptr;
  return {x.a + h * x.n * x.r, x.b + h * x.n * x.r, x.v + h * x.n * x.d, neighbors, x.n, x.r, x.d, x.k, x.scale,
          t,                   x.cameras,           x.camera_factor};
}

// The lists of one head turned around, with what the rows found for their slots.
struct Turned {
  std::vector<int64_t> start;
  std::vector<int32_t> row;
  std::vector<float> weight, slope;

  Turned(const Attention& x, const AttentionGradient& g) : start(x.n + 2) {
    const int64_t slots = x.n * x.k;
    for (int64_t s = 0; s < slots; ++s)
      if (x.neighbors[s] >= 0) ++start[x.neighbors[s] + 2];
    for (int64_t j = 2; j < x.n + 2; ++j) start[j] += start[j - 1];
    row.resize(start[x.n + 1]), weight.resize(row.size()), slope.resize(row.size());
    for (int64_t s = 0; s < slots; ++s) {  // start[j + 1] walks from the first entry of j to the first of j + 1
      if (x.neighbors[s] < 0) continue;
      const int64_t at = start[x.neighbors[s] + 1]++;
      row[at] = static_cast<int32_t>(s / x.k), weight[at] = g.weight[s], slope[at] = g.slope[s];
    }
  }

  Readers readers() const { return {start.data(), row.data(), weight.data(), slope.data()}; }
};

// Runs work(begin, end, scratch) over 0..rows-1.
template <class Work>
void over_rows(const Attention& x, int64_t rows, int threads, const Work& work) {
  parallel_ranges(threads, rows, kAttendRows, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> slots(x.k);
    std::vector<double> weights(x.k);
    std::vector<float> shares(2 * x.k);
    work(begin, end, Scratch{slots.data(), weights.data(), shares.data()});
  });
}

}  // namespace

int64_t first_bad_row(const float* x, int64_t rows, int64_t length, int threads) {
  return first_row(rows, threads, [=](int64_t row) {
    float sum = 0;  // x - x is 0 for a finite x and NaN otherwise
    for (int64_t i = row * length; i < (row + 1) * length; ++i) sum += x[i] - x[i];
    return sum != 0;
  });
}

int64_t first_bad_list(const int32_t* x, int64_t rows, int64_t length, int64_t count, int threads) {
  return first_row(rows, threads, [=](int64_t row) { return outside(x + row * length, length, count); });
}

int64_t row_top_k(const Table& table, const TopKTensors& x, int threads, bool tree) {
  int64_t confirmed = 0;
  const StandardArithmetic scope;
  for (int64_t h = 0; h < x.heads; ++h) {
    const RowTopK head{x.a + h * x.n * x.r,         x.b + h * x.m * x.r, x.n, x.m, x.r, x.k,
                       x.neighbors + h * x.n * x.k, x.symmetric};
    if (tree)
      row_top_k_tree(table, head, threads);
    else
      confirmed += row_top_k_dense(table, head, threads);
  }
  return confirmed;
}

void attend(const Table& table, const AttentionTensors& tensors, float* y, int threads) {
  for (int64_t h = 0; h < tensors.heads; ++h) {
    const Attention x = head_of(tensors, h);
    if (!tensors.rows) {
      over_rows(x, x.n, threads, [&](int64_t begin, int64_t end, const Scratch& scratch) {
        table.attend(x, begin, end, y + h * x.n * x.d, scratch);
      });
      continue;
    }
    over_rows(x, tensors.row_count, threads, [&](int64_t begin, int64_t end, const Scratch& scratch) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t i = tensors.rows[p];  // `attend` writes row i at place i
        table.attend(x, i, i + 1, y + (h * tensors.row_count + p - i) * x.d, scratch);
      }
    });
  }
}

int64_t gated_layer(const Table& table, const GatedLayer& x, float* y, int threads) {
  const auto bad_list = [&](int64_t p) { return outside(x.lists + x.rows[p] * x.width, x.k, x.n); };
  const int64_t bad = first_row(x.count, threads, bad_list);
  if (bad >= 0) return x.rows[bad];
  Attention one{x.x, x.x, x.x, nullptr, x.n, x.d, x.d, x.k, x.scale, x.t};
  over_rows(one, x.count, threads, [&](int64_t begin, int64_t end, const Scratch& scratch) {
    Attention own = one;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t i = x.rows[p];
      float* out = y + p * x.d;
      own.neighbors = x.lists + i * (x.width - x.k);  // `attend` looks for row i's list at i * k, and writes at i * d
      table.attend(own, i, i + 1, out - i * x.d, scratch);
      table.join(x.x + i * x.d, x.strength, out, x.d, out);
      if (x.own) table.join(out, x.own_share, x.own + i * x.d, x.d, out);
    }
  });
  return -1;
}

void swap_rows(float* array, const int32_t* rows, float* values, int64_t d, int64_t count, float still, uint8_t* moved,
               int threads) {
  parallel_ranges(threads, count, kSwapRows, [=](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      float* old = array + rows[p] * d;
      float* own = values + p * d;
      int differs = 0;
      for (int64_t c = 0; c < d; ++c) differs |= !(std::fabs(old[c] - own[c]) <= still) & (old[c] != own[c]);
      moved[p] = differs != 0;
      if (differs) std::swap_ranges(old, old + d, own);
    }
  });
}

int64_t reached(const uint8_t* flags, const int32_t* lists, int64_t n, int64_t width, const int32_t* places,
                int64_t count, uint8_t* out, int threads) {
  const auto reach = [=](int64_t row) {
    const int32_t* list = lists + row * width;
    uint8_t together = 0;
    for (int64_t s = 0; s < count; ++s) {
      const int32_t name = list[places[s]];
      if (name >= n || name < -1) return true;
      if (name >= 0) together |= flags[name];
    }
    out[row] = together;
    return false;
  };
  return first_row(n, threads, reach, kReachRows);
}

void attend_backward(const Table& table, const AttentionTensors& tensors, const float* gy, float* ga, float* gb,
                     float* gv, float* gt, int threads) {
  for (int64_t h = 0; h < tensors.heads; ++h) {
    const Attention x = head_of(tensors, h);
    std::vector<float> weight(x.n * x.k), slope(x.n * x.k);
    AttentionGradient g{gy + h * x.n * x.d, weight.data(),      slope.data(),
                        ga + h * x.n * x.r, gb + h * x.n * x.r, gv + h * x.n * x.d};
    over_rows(x, x.n, threads, [&](int64_t begin, int64_t end, const Scratch& scratch) {
      table.attend_backward_rows(x, g, begin, end, scratch);
    });
    std::optional<Turned> turned;
    if (x.t) {
      g.gt = gt + (tensors.thresholds == 1 ? 0 : h) * x.n;
      g.readers = turned.emplace(x, g).readers();
    }
    over_rows(x, x.n, threads, [&](int64_t begin, int64_t end, const Scratch& scratch) {
      table.attend_backward_columns(x, g, begin, end, scratch);
    });
  }
}

}  // namespace nformer
