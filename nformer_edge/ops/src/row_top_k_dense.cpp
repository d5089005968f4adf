// RowTopK for long factors: a packed, register-tiled matrix product whose tiles are compared with the thresholds
// while they are still in registers, so that no score is stored unless it may matter.
//
// Where the instruction set has faster products of integers, these come first and float32 scores are computed of the pairs
// that they leave. Rows a_i and b_j are rounded to s_i q_i and s_j q_j, with s in float32 and q in integers. With
// e_i = a_i - s_i q_i and e_j = b_j - s_j q_j,
//     a_i . b_j = s_i s_j (q_i . q_j) + (s_i q_i) . e_j + e_i . b_j,
// so by Cauchy-Schwarz
//     a_i . b_j <= s_i s_j (q_i . q_j) + |s_i q_i| |e_j| + |e_i| |b_j|.
// The norms are those of the e and q at hand, whichever way q was rounded, so the bound holds however badly integers fit
// a row. The integer sum is exact: |q_i . q_j| < 2^31 (see kMostLength), and sums that wrap on the way come back. The
// filter evaluates the bound in float32, from the sum's conversion to the comparison, in steps that are each wrong by
// 2^-24 of a number under 2 |s_i q_i| max|s_j q_j| + the bound's last two terms; `slack` has 2^-20 of these, and what
// underflow may lose. A pair whose bound is under its row's threshold cannot be in the row's list: the threshold is under
// the list's last exact score, less the error of a float32 score, which the bound does not have.
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <numeric>
#include <vector>

#include "row_top_k.h"
#include "select.h"
#include "threads.h"

namespace nformer {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Rows as integers: 8 bits fill a row's largest number; 16 bits fill its norm as well, so that |q_i| |q_j| < 2^31.
constexpr int64_t kLeastLength = 64, kMostLength = 65536;  // 127 * 127 * 65,536 < 2^31, and sqrt(65,536) / 2 = 128
constexpr float kMost8 = 127, kMost16 = 32767, kMostNorm16 = 46200, kLeastScale = 1e-36f;
constexpr double kMostScale = 0x1p127;  // of factors, in float32

// One pair in so many left, and float32 products of all cost less than scores of those: measured, where k is 20 to 129.
constexpr int kCrowded = 10;
constexpr int kMostPatience = 16;

// x * scale, of R numbers.
void scaled(const float* x, int64_t r, double scale, float* out, int64_t stride) {
  const float factor = static_cast<float>(scale);
  if (factor > 0 && std::isfinite(factor))
    for (int64_t i = 0; i < r; ++i) out[i * stride] = x[i] * factor;
  else
    for (int64_t i = 0; i < r; ++i) out[i * stride] = static_cast<float>(x[i] * scale);
}

// Rows begin..begin+count-1 of x [*, R], scaled, as panels [R][width]; rows past `rows` are zero.
void pack(const float* x, int64_t rows, int64_t r, double scale, int64_t begin, int64_t count, int width, float* out) {
  for (int64_t panel = 0; panel < count; panel += width, out += width * r)
    for (int lane = 0; lane < width; ++lane) {
      const int64_t row = begin + panel + lane;
      if (row < rows)
        scaled(x + row * r, r, scale, out + lane, width);
      else
        for (int64_t i = 0; i < r; ++i) out[i * width + lane] = 0;
    }
}

// A scaled row v in integers, and what the bound needs of it.
struct Rounded {
  explicit Rounded(int64_t r) : values((r + kStep - 1) / kStep * kStep), numbers(values.size()) {}

  // Sums run over kStep lanes in float32: wrong by less than one in a thousand for kMostLength numbers.
  void round(const float* x, int64_t r, double factor, int group) {
    scaled(x, r, factor, values.data(), 1);
    float most[kStep] = {}, squares[kStep] = {}, errors[kStep] = {};
    int32_t sums[kStep] = {};
    for (size_t i = 0; i < values.size(); i += kStep)
      for (int l = 0; l < kStep; ++l) {
        const float size = std::fabs(values[i + l]);
        most[l] = most[l] < size ? size : most[l];
        squares[l] += size * size;
      }
    const double length = std::sqrt(std::accumulate(squares, squares + kStep, 0.0) * 1.001);
    const float limit = group == 4 ? kMost8 : kMost16;
    double step = *std::max_element(most, most + kStep) / limit;
    if (group == 2) step = std::max(step, length / kMostNorm16);
    scale = step < kLeastScale ? 0 : static_cast<float>(step);
    const float inverse = scale > 0 ? 1 / scale : 0;
    for (size_t i = 0; i < values.size(); i += kStep)
      for (int l = 0; l < kStep; ++l) {
        const float value = values[i + l], near = value * inverse;
        const float inside = near < -limit ? -limit : near > limit ? limit : near;
        const int32_t number = static_cast<int32_t>(inside + (inside < 0 ? -0.5f : 0.5f));
        const float left = value - scale * static_cast<float>(number);
        numbers[i + l] = static_cast<int16_t>(number);
        sums[l] += number;
        errors[l] += left * left;
      }
    sum = std::accumulate(sums, sums + kStep, 0);
    error = std::sqrt(std::accumulate(errors, errors + kStep, 0.0) * 1.001) + std::ldexp(length, -22);
    norm = length + error;
  }

  static constexpr int kStep = 16;
  std::vector<float> values;
  std::vector<int16_t> numbers;  // q
  float scale = 0;               // s
  double norm = 0;               // at least |v| and |s q|
  double error = 0;              // at least |v - s q|
  int32_t sum = 0;               // of q
};

// Numbers of one row as 32-bit groups, `width` apart.
void pack_groups(const int16_t* q, int64_t groups, int group, int offset, int width, int32_t* out) {
  for (int64_t g = 0; g < groups; ++g, q += group, out += width) {
    uint32_t word = 0;
    for (int n = 0; n < group; ++n)
      word |= group == 4 ? static_cast<uint32_t>(static_cast<uint8_t>(q[n] + offset)) << (8 * n)
                         : static_cast<uint32_t>(static_cast<uint16_t>(q[n])) << (16 * n);
    *out = static_cast<int32_t>(word);
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
        row_blocks_((x.n + kBlockRows - 1) / kBlockRows),
        column_blocks_((x.m + kBlockRows - 1) / kBlockRows),
        integers_(table.integers.group && x.r >= kLeastLength && x.r <= kMostLength && column_blocks_ > 2 &&
                  scaling_.a <= kMostScale && scaling_.b <= kMostScale),
        capacity_(integers_ ? x.k + x.k / 2 + 10 : 2 * x.k + 32),
        groups_(integers_ ? (x.r + table.integers.group - 1) / table.integers.group : 0),
        columns_(column_blocks_),
        rows_(row_blocks_ * kBlockRows),
        entries_((symmetric_ ? x.n : 0) * capacity_),
        guards_(symmetric_ ? row_blocks_ : 0) {
    set_errors();
  }

  // Returns how many pairs the integers left to exact scores.
  int64_t run() {
    if (symmetric_) sweep(true);
    if (integers_) round_columns();
    sweep(false);
    if (symmetric_) finish_all();
    return confirmed_;
  }

 private:
  struct Worker {
    Worker(const Dense& d)
        : packed(kBlockRows * d.x_.r),
          integers(kBlockRows * d.groups_),
          columns(d.integers_ ? d.table_.nr * d.x_.r : 0),
          hits(3 * static_cast<int64_t>(kBlockRows) * d.table_.nr),
          own(d.symmetric_ ? 0 : static_cast<int64_t>(kBlockRows) * d.capacity_),
          buffer(d.capacity_) {
      other_threshold.fill(kInfinity);
    }
    std::vector<float> packed;
    std::vector<int32_t> integers;
    std::vector<float> columns;  // a panel
    std::array<float, kBlockRows> scale{}, norm{}, slack{};
    int64_t packed_block = -1;  // whose rows `packed` has
    int waiting = 0, patience = 1;  // column panels until integers are tried again, and after they left too many pairs
    std::vector<Hit> hits;
    std::vector<Entry> own;  // the block's entries, where no other thread adds to them
    RankBuffer buffer;
    std::array<float, kBlockRows> threshold{};
    std::array<float, kBlockRows> other_threshold{};
  };

  // A column panel in float32. Beside integers it is packed anew each time: all columns would take as much again.
  const float* column_panel(Worker& worker, int64_t other, int64_t c) {
    if (!integers_) return column_block(other) + c * x_.r;
    pack(x_.b, x_.m, x_.r, scaling_.b, other * kBlockRows + c, table_.nr, table_.nr, worker.columns.data());
    return worker.columns.data();
  }

  // A column block in float32, packed when it is first asked for.
  const float* column_block(int64_t block) {
    Columns32& columns = columns_[block];
    std::call_once(columns.once, [&] {
      columns.packed.resize(kBlockRows * x_.r);
      pack(x_.b, x_.m, x_.r, scaling_.b, block * kBlockRows, kBlockRows, table_.nr, columns.packed.data());
    });
    return columns.packed.data();
  }

  void round_columns() {
    const int64_t count = column_blocks_ * kBlockRows;
    rounded_.resize(count * groups_);
    start_.resize(count);
    scale_.resize(count);
    error_.resize(count);
    std::vector<double> most(column_blocks_, 0.0);
    parallel_ranges(threads_, column_blocks_, 1, [&](int64_t block, int64_t) {
      Rounded row(x_.r);
      for (int64_t j = block * kBlockRows; j < std::min((block + 1) * kBlockRows, x_.m); ++j) {
        row.round(x_.b + j * x_.r, x_.r, scaling_.b, table_.integers.group);
        start_[j] = -table_.integers.offset * row.sum;
        scale_[j] = row.scale;
        error_[j] = static_cast<float>(row.error * 1.0001);
        most[block] = std::max(most[block], row.norm);
        pack_groups(row.numbers.data(), groups_, table_.integers.group, 0, table_.nr,
                    rounded_.data() + j / table_.nr * table_.nr * groups_ + j % table_.nr);
      }
    });
    widest_ = *std::max_element(most.begin(), most.end());
  }

  void round_rows(Worker& worker, int64_t block) {
    Rounded own(x_.r);
    for (int i = 0; i < kBlockRows; ++i) {
      const int64_t row = std::min(block * kBlockRows + i, x_.n - 1);  // rows past the end have no threshold to reach
      own.round(x_.a + row * x_.r, x_.r, scaling_.a, table_.integers.group);
      worker.scale[i] = own.scale;
      worker.norm[i] = static_cast<float>(own.norm * 1.0001);
      worker.slack[i] = static_cast<float>(
          (own.error + std::ldexp(own.norm, -19)) * widest_ * 1.0001 + std::ldexp(x_.r, -120));
      pack_groups(own.numbers.data(), groups_, table_.integers.group, table_.integers.offset, table_.mr,
                  worker.integers.data() + i / table_.mr * table_.mr * groups_ + i % table_.mr);
    }
  }

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
        if (integers_ && !diagonal) round_rows(worker, block);
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
    // Integers bound scores too loosely for a row without a threshold: its first block goes through float32.
    const bool first = symmetric_ ? block == other : other == 0;
    for (int64_t c = 0; c < width; c += table_.nr) {
      int64_t left = -1;
      if (integers_ && !first && --worker.waiting < 0) left = scan_integers(worker, block, other, c, found);
      found += left >= 0 ? left : scan_floats(worker, block, other, c, found);
      if (found > flush_at || left >= 0 || c + table_.nr >= width) {
        take(worker, block, other, both, found);
        found = 0;
      }
    }
  }

  int64_t scan_floats(Worker& worker, int64_t block, int64_t other, int64_t c, int64_t found) {
    if (worker.packed_block != block)
      pack(x_.a, x_.n, x_.r, scaling_.a, block * kBlockRows, kBlockRows, table_.mr, worker.packed.data());
    worker.packed_block = block;
    return table_.scan_panel(worker.packed.data(), kBlockRows / table_.mr, column_panel(worker, other, c), x_.r,
                             worker.threshold.data(), worker.other_threshold.data() + c,
                             static_cast<int32_t>(block * kBlockRows), static_cast<int32_t>(other * kBlockRows + c),
                             worker.hits.data() + found);
  }

  // As scan_floats, or -1 where too many pairs are left.
  int64_t scan_integers(Worker& worker, int64_t block, int64_t other, int64_t c, int64_t found) {
    const int64_t column = other * kBlockRows + c;
    Hit* hits = worker.hits.data() + found;
    const IntegerRows rows{worker.integers.data(), worker.scale.data(), worker.norm.data(), worker.slack.data(),
                           worker.threshold.data()};
    const IntegerColumns columns{rounded_.data() + column * groups_, start_.data() + column, scale_.data() + column,
                                 error_.data() + column, worker.other_threshold.data() + c};
    const int64_t left = table_.integers.scan(rows, kBlockRows / table_.mr, columns, groups_,
                                              static_cast<int32_t>(block * kBlockRows), static_cast<int32_t>(column), hits);
    if (left * kCrowded > static_cast<int64_t>(kBlockRows) * table_.nr) {
      worker.waiting = worker.patience;
      worker.patience = std::min(2 * worker.patience, kMostPatience);
      return -1;
    }
    worker.waiting = 0;
    worker.patience = 1;
    Hit* end = std::remove_if(hits, hits + left, [&](const Hit& h) { return h.row >= x_.n || h.column >= x_.m; });
    table_.score_hits(x_.a, x_.b, x_.r, static_cast<float>(scaling_.a), static_cast<float>(scaling_.b), hits,
                      end - hits);
    confirmed_ += end - hits;
    return end - hits;
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
  int64_t row_blocks_, column_blocks_;
  bool integers_;
  int capacity_;
  int64_t groups_;
  struct Columns32 {
    std::once_flag once;
    std::vector<float> packed;
  };
  std::vector<Columns32> columns_;
  std::vector<int32_t> rounded_, start_;  // of the columns
  std::vector<float> scale_, error_;
  double widest_ = 0;  // over |b_j| and |s_j q_j|
  std::atomic<int64_t> confirmed_{0};
  std::vector<Row> rows_;
  std::vector<Entry> entries_;
  std::vector<std::mutex> guards_;
};

}  // namespace

int64_t row_top_k_dense(const Table& table, const RowTopK& x, int threads) { return Dense(table, x, threads).run(); }

}  // namespace nformer
