// RowTopK for long factors: a packed, register-tiled matrix product whose tiles are compared with the thresholds
// while they are still in registers, so that no score is stored unless it may matter.
#include <array>
#include <cmath>
#include <limits>
#include <mutex>
#include <vector>

#include "row_top_k.h"
#include "select.h"
#include "threads.h"

namespace nformer {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Rows begin..begin+count-1 of x [*, R], scaled, as panels [R][width]; rows past `rows` are zero.
void pack(const float* x, int64_t rows, int64_t r, double scale, int64_t begin, int64_t count, int width, float* out) {
  const float factor = static_cast<float>(scale);
  const bool plain = factor > 0 && std::isfinite(factor);
  for (int64_t panel = 0; panel < count; panel += width, out += width * r)
    for (int lane = 0; lane < width; ++lane) {
      const int64_t row = begin + panel + lane;
      if (row >= rows)
        for (int64_t i = 0; i < r; ++i) out[i * width + lane] = 0;
      else if (plain)
        for (int64_t i = 0; i < r; ++i) out[i * width + lane] = x[row * r + i] * factor;
      else
        for (int64_t i = 0; i < r; ++i) out[i * width + lane] = static_cast<float>(x[row * r + i] * scale);
    }
}

double norm(const float* x, int64_t r, double scale) {
  double sum = 0;
  for (int64_t i = 0; i < r; ++i) sum += static_cast<double>(x[i]) * x[i];
  return std::sqrt(sum) * scale;
}

class Dense {
 public:
  Dense(const Table& table, const RowTopK& x, int threads)
      : table_(table),
        x_(x),
        threads_(threads),
        symmetric_(x.symmetric),
        scaling_(find_scaling(x, threads)),
        selection_(table, {x.b, nullptr, x.r, scaling_.a * scaling_.b}, x.k),
        capacity_(2 * x.k + 32),
        row_blocks_((x.n + kBlockRows - 1) / kBlockRows),
        column_blocks_((x.m + kBlockRows - 1) / kBlockRows),
        rows_(row_blocks_ * kBlockRows),
        entries_((symmetric_ ? x.n : 0) * capacity_),
        guards_(symmetric_ ? row_blocks_ : 0) {
    pack_columns();
    set_errors();
  }

  void run() {
    if (symmetric_) sweep(true);
    sweep(false);
    if (symmetric_) finish_all();
  }

 private:
  struct Worker {
    Worker(const Dense& d)
        : packed(kBlockRows * d.x_.r),
          hits(3 * static_cast<int64_t>(kBlockRows) * d.table_.nr),
          own(d.symmetric_ ? 0 : static_cast<int64_t>(kBlockRows) * d.capacity_),
          buffer(d.capacity_) {
      other_threshold.fill(kInfinity);
    }
    std::vector<float> packed;
    std::vector<Hit> hits;
    std::vector<Entry> own;  // the block's entries, where no other thread adds to them
    RankBuffer buffer;
    std::array<float, kBlockRows> threshold{};
    std::array<float, kBlockRows> other_threshold{};
  };

  void pack_columns() {
    packed_.resize(column_blocks_ * kBlockRows * x_.r);
    parallel_ranges(threads_, column_blocks_, 1, [&](int64_t block, int64_t) {
      const int64_t begin = block * kBlockRows;
      const int64_t end = std::min(begin + kBlockRows, x_.m);
      pack(x_.b, end, x_.r, scaling_.b, begin, kBlockRows, table_.nr, column_block(block));
    });
  }

  float* column_block(int64_t block) { return packed_.data() + block * kBlockRows * x_.r; }

  // |s' - d| <= gamma(R) |a_i| |b_j| by Cauchy-Schwarz (Higham 2002, section 3.1), plus what scaling and products
  // may lose to underflow.
  void set_errors() {
    std::vector<double> most(column_blocks_, 0.0);
    parallel_ranges(threads_, column_blocks_, 1, [&](int64_t block, int64_t) {
      const int64_t begin = block * kBlockRows;
      for (int64_t j = begin; j < std::min(begin + kBlockRows, x_.m); ++j)
        most[block] = std::max(most[block], norm(x_.b + j * x_.r, x_.r, scaling_.b));
    });
    const double widest = *std::max_element(most.begin(), most.end());
    const double steps = static_cast<double>(x_.r + 2) * std::ldexp(1.0, -24);
    const double gamma = steps / (1 - steps) * 1.0001;
    parallel_ranges(threads_, x_.n, kBlockRows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        rows_[i].error = static_cast<float>(
            (gamma * norm(x_.a + i * x_.r, x_.r, scaling_.a) * widest + std::ldexp(x_.r, -120)) * 1.0001);
    });
    for (int64_t i = x_.n; i < static_cast<int64_t>(rows_.size()); ++i) rows_[i].threshold = kInfinity;
  }

  // A square's diagonal blocks go first: they raise every row's threshold before the bulk.
  void sweep(bool diagonal) {
    parallel(threads_, row_blocks_, [&](const auto& next) {
      Worker worker(*this);
      for (int64_t block; (block = next()) >= 0;) {
        pack(x_.a, x_.n, x_.r, scaling_.a, block * kBlockRows, kBlockRows, table_.mr, worker.packed.data());
        if (diagonal)
          scan(worker, block, block);
        else
          for (int64_t other = symmetric_ ? block + 1 : 0; other < column_blocks_; ++other)
            scan(worker, block, other);
        if (!symmetric_) finish_block(worker, block);
      }
    });
  }

  void scan(Worker& worker, int64_t block, int64_t other) {
    const bool both = symmetric_ && block != other;
    read_thresholds(block, worker.threshold.data());
    if (both) read_thresholds(other, worker.other_threshold.data());
    else worker.other_threshold.fill(kInfinity);
    const int64_t flush_at = static_cast<int64_t>(worker.hits.size()) - static_cast<int64_t>(kBlockRows) * table_.nr;
    int64_t found = 0;
    const int64_t width = std::min<int64_t>(kBlockRows, x_.m - other * kBlockRows);
    for (int64_t c = 0; c < width; c += table_.nr) {
      found += table_.scan_panel(worker.packed.data(), kBlockRows / table_.mr, column_block(other) + c * x_.r, x_.r,
                                 worker.threshold.data(), worker.other_threshold.data() + c,
                                 static_cast<int32_t>(block * kBlockRows),
                                 static_cast<int32_t>(other * kBlockRows + c), worker.hits.data() + found);
      if (found > flush_at || c + table_.nr >= width) {
        take(worker, block, other, both, found);
        found = 0;
      }
    }
  }

  void read_thresholds(int64_t block, float* out) {
    const auto lock = hold(block);
    for (int i = 0; i < kBlockRows; ++i) out[i] = rows_[block * kBlockRows + i].threshold;
  }

  std::unique_lock<std::mutex> hold(int64_t block) {
    return symmetric_ ? std::unique_lock<std::mutex>(guards_[block]) : std::unique_lock<std::mutex>();
  }

  Entry* entries_of(Worker& worker, int64_t row) {
    return symmetric_ ? entries_.data() + row * capacity_ : worker.own.data() + row % kBlockRows * capacity_;
  }

  void take(Worker& worker, int64_t block, int64_t other, bool both, int64_t found) {
    if (!found) return;
    {
      const auto lock = hold(block);
      for (int64_t h = 0; h < found; ++h) {
        const Hit& hit = worker.hits[h];
        if (hit.row < x_.n && hit.column < x_.m) add(worker, hit.row, {hit.score, hit.column});
      }
      for (int i = 0; i < kBlockRows; ++i) worker.threshold[i] = rows_[block * kBlockRows + i].threshold;
    }
    if (!both) return;
    const auto lock = hold(other);
    for (int64_t h = 0; h < found; ++h) {
      const Hit& hit = worker.hits[h];
      if (hit.row < x_.n && hit.column < x_.m) add(worker, hit.column, {hit.score, hit.row});
    }
    for (int i = 0; i < kBlockRows; ++i) worker.other_threshold[i] = rows_[other * kBlockRows + i].threshold;
  }

  void add(Worker& worker, int64_t row, Entry entry) {
    Row& state = rows_[row];
    Entry* entries = entries_of(worker, row);
    state.push(entries, entry);
    if (state.count == capacity_) selection_.compact(state, entries, capacity_, x_.a + row * x_.r, worker.buffer);
  }

  void finish_block(Worker& worker, int64_t block) {
    for (int64_t i = block * kBlockRows; i < std::min((block + 1) * kBlockRows, x_.n); ++i)
      selection_.finish(rows_[i], entries_of(worker, i), x_.a + i * x_.r, worker.buffer, x_.neighbors + i * x_.k);
  }

  void finish_all() {
    parallel(threads_, row_blocks_, [&](const auto& next) {
      Worker worker(*this);
      for (int64_t block; (block = next()) >= 0;) finish_block(worker, block);
    });
  }

  const Table& table_;
  const RowTopK& x_;
  int threads_;
  bool symmetric_;
  Scaling scaling_;
  Selection selection_;
  int capacity_;
  int64_t row_blocks_, column_blocks_;
  std::vector<float> packed_;
  std::vector<Row> rows_;
  std::vector<Entry> entries_;
  std::vector<std::mutex> guards_;
};

}  // namespace

void row_top_k_dense(const Table& table, const RowTopK& x, int threads) { Dense(table, x, threads).run(); }

}  // namespace nformer
