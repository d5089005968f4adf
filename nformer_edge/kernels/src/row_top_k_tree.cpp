// RowTopK for short factors, below quadratic time.
//
// Columns are laid out in k-d order, kLeaf to a leaf, with a box around each leaf, and a box around each kFan boxes, and
// so on. For row a, no column of a box scores above sum_r max(a_r lo_r, a_r hi_r), so a box whose bound is under the
// row's threshold is skipped. Rows are taken in k-d order as well: a row's threshold starts from what the last row's
// neighbours score with it, which is nearly final.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kd_order.h"
#include "row_top_k.h"
#include "select.h"
#include "threads.h"

namespace nformer {
namespace {

constexpr int kLeaf = 64;      // columns in a leaf
constexpr int kFan = 16;       // boxes that share a parent: one AVX-512 register, two AVX2
constexpr int kRowLeaf = 16;   // rows that share a place in the row order
constexpr int64_t kTask = 256;  // rows a thread takes at once; the first starts without a threshold
constexpr int kMostLevels = 8;

class Tree {
 public:
  Tree(const RowTopK& x, const Scaling& scaling, const float* weight, int threads)
      : r_(x.r), m_(x.m), ids_(kd_order(x.b, x.m, x.r, weight, kLeaf, threads)), exact_(x.m * x.r) {
    const int64_t leaves = (m_ + kLeaf - 1) / kLeaf;
    leaf_values_.resize(leaves * kLeaf * r_);
    add_level(leaves);
    parallel_ranges(threads, leaves, 64, [&](int64_t begin, int64_t end) {
      for (int64_t leaf = begin; leaf < end; ++leaf) fill_leaf(x, scaling, leaf);
    });
    while (levels_.back().count > kFan) {
      add_level((levels_.back().count + kFan - 1) / kFan);
      for (int64_t box = 0; box < levels_.back().count; ++box) join_boxes(box);
    }
  }

  struct Level {
    int64_t count;
    std::vector<float> boxes;  // [group of kFan][low, high][R][kFan]
  };

  const std::vector<Level>& levels() const { return levels_; }
  const float* leaf(int64_t n) const { return leaf_values_.data() + n * kLeaf * r_; }
  const float* group(int level, int64_t n) const { return levels_[level].boxes.data() + n * 2 * kFan * r_; }
  float value(int32_t column, int64_t axis) const {
    return leaf_values_[(column / kLeaf * r_ + axis) * kLeaf + column % kLeaf];
  }
  int64_t columns() const { return m_; }
  const float* exact() const { return exact_.data(); }
  const int32_t* ids() const { return ids_.data(); }

 private:
  void add_level(int64_t count) {
    levels_.push_back({count, std::vector<float>((count + kFan - 1) / kFan * 2 * kFan * r_)});
  }

  float& bound(Level& level, int64_t box, int side, int64_t axis) {
    return level.boxes[((box / kFan * 2 + side) * r_ + axis) * kFan + box % kFan];
  }

  void fill_leaf(const RowTopK& x, const Scaling& scaling, int64_t leaf) {
    const int64_t begin = leaf * kLeaf, end = std::min(begin + kLeaf, m_);
    for (int64_t n = begin; n < end; ++n) std::copy_n(x.b + ids_[n] * r_, r_, exact_.begin() + n * r_);
    for (int64_t axis = 0; axis < r_; ++axis) {
      float* to = leaf_values_.data() + (leaf * r_ + axis) * kLeaf;
      for (int64_t n = begin; n < end; ++n) to[n - begin] = static_cast<float>(exact_[n * r_ + axis] * scaling.b);
      std::fill(to + (end - begin), to + kLeaf, to[0]);  // no column: refused by its number
      const auto range = std::minmax_element(to, to + kLeaf);
      bound(levels_[0], leaf, 0, axis) = *range.first;
      bound(levels_[0], leaf, 1, axis) = *range.second;
    }
  }

  void join_boxes(int64_t box) {
    Level& level = levels_.back();
    Level& below = levels_[levels_.size() - 2];
    const int64_t begin = box * kFan, end = std::min(begin + kFan, below.count);
    for (int64_t axis = 0; axis < r_; ++axis) {
      float low = bound(below, begin, 0, axis), high = bound(below, begin, 1, axis);
      for (int64_t child = begin + 1; child < end; ++child) {
        low = std::min(low, bound(below, child, 0, axis));
        high = std::max(high, bound(below, child, 1, axis));
      }
      bound(level, box, 0, axis) = low;
      bound(level, box, 1, axis) = high;
    }
  }

  int64_t r_, m_;
  std::vector<int32_t> ids_;
  std::vector<float> exact_;        // [M, R] in k-d order, as given
  std::vector<float> leaf_values_;  // [leaf][R][kLeaf], scaled
  std::vector<Level> levels_;       // leaves' boxes first
};

// One worker's walk: rows in order, one at a time.
class Walk {
 public:
  Walk(const Table& table, const RowTopK& x, const Tree& tree, const Scaling& scaling, const float* most)
      : table_(table),
        x_(x),
        tree_(tree),
        scaling_(scaling),
        most_(most),
        selection_(table, {tree.exact(), tree.ids(), x.r, scaling.a * scaling.b}, x.k),
        capacity_(4 * x.k + 4 * kLeaf),
        entries_(capacity_),
        buffer_(capacity_) {
    for (int64_t axis = 0; axis < x.r; ++axis) leaf_offset_[axis] = static_cast<int32_t>(axis * kLeaf);
  }

  void start() { state_.count = 0; }

  void find(int64_t row) {
    const float* a = x_.a + row * x_.r;
    double error = 0;
    for (int64_t axis = 0; axis < x_.r; ++axis) {
      factor_[axis] = static_cast<float>(a[axis] * scaling_.a);
      box_offset_[axis] = static_cast<int32_t>((factor_[axis] >= 0 ? kFan * x_.r : 0) + axis * kFan);
      error += std::fabs(factor_[axis]) * static_cast<double>(most_[axis]);
    }
    const double steps = static_cast<double>(x_.r + 2) * 0x1p-24;
    const float bound = static_cast<float>((error * steps * 1.0001 + std::ldexp(x_.r, -120)) * 1.0001);
    const float seed = seed_threshold(bound);
    state_ = {seed, 0, bound};
    row_ = a;
    const int top = static_cast<int>(tree_.levels().size()) - 1;
    descend(top, 0);
    selection_.finish(state_, entries_.data(), a, buffer_, x_.neighbors + row * x_.k);
  }

 private:
  // What the last row's neighbours score with this row: that many columns reach the least of it.
  float seed_threshold(float error) const {
    if (state_.count < x_.k) return -std::numeric_limits<float>::infinity();
    float least = std::numeric_limits<float>::infinity();
    for (int n = 0; n < x_.k; ++n) {
      float score = 0;
      for (int64_t axis = 0; axis < x_.r; ++axis) score += factor_[axis] * tree_.value(entries_[n].column, axis);
      least = std::min(least, score);
    }
    return threshold_under(least - static_cast<double>(error), error);
  }

  // The boxes of one group, best first, so that the threshold rises early.
  void descend(int level, int64_t group) {
    Entry found[kFan];
    int count = table_.scan_block(static_cast<int>(x_.r), tree_.group(level, group), box_offset_, factor_, kFan,
                                  state_.threshold, static_cast<int32_t>(group * kFan), found);
    const int64_t boxes = tree_.levels()[level].count;
    while (count && found[count - 1].column >= boxes) --count;
    if (state_.threshold == -std::numeric_limits<float>::infinity())
      std::sort(found, found + count, [](const Entry& x, const Entry& y) { return x.score > y.score; });
    for (int n = 0; n < count; ++n) {
      if (found[n].score < state_.threshold) continue;
      if (level)
        descend(level - 1, found[n].column);
      else
        scan_leaf(found[n].column);
    }
  }

  void scan_leaf(int64_t leaf) {
    if (state_.count + kLeaf > capacity_) selection_.compact(state_, entries_.data(), capacity_ - kLeaf, row_, buffer_);
    Entry* end = entries_.data() + state_.count;
    int count = table_.scan_block(static_cast<int>(x_.r), tree_.leaf(leaf), leaf_offset_, factor_, kLeaf,
                                  state_.threshold, static_cast<int32_t>(leaf * kLeaf), end);
    while (count && end[count - 1].column >= tree_.columns()) --count;
    state_.count += count;
  }

  const Table& table_;
  const RowTopK& x_;
  const Tree& tree_;
  const Scaling& scaling_;
  const float* most_;  // [R], largest scaled |b| of each axis
  Selection selection_;
  int capacity_;
  std::vector<Entry> entries_;
  RankBuffer buffer_;
  Row state_;
  const float* row_ = nullptr;
  float factor_[kMaxTreeRank];
  int32_t box_offset_[kMaxTreeRank];
  int32_t leaf_offset_[kMaxTreeRank];
};

// Per axis: the mean of |x|, scaled (how much that axis moves a score), or the largest.
std::vector<float> magnitudes(const float* x, int64_t count, int64_t r, double scale, bool largest) {
  std::vector<double> sum(r, 0.0);
  for (int64_t n = 0; n < count; ++n)
    for (int64_t axis = 0; axis < r; ++axis) {
      const double value = std::fabs(static_cast<double>(x[n * r + axis]));
      sum[axis] = largest ? std::max(sum[axis], value) : sum[axis] + value;
    }
  std::vector<float> out(r);
  for (int64_t axis = 0; axis < r; ++axis)
    out[axis] = static_cast<float>(sum[axis] * scale / (largest ? 1.0 : static_cast<double>(count)));
  return out;
}

}  // namespace

void row_top_k_tree(const Table& table, const RowTopK& x, int threads) {
  const Scaling scaling = find_scaling(x, threads);
  const std::vector<float> weight = magnitudes(x.a, x.n, x.r, scaling.a, false);
  const std::vector<float> other = magnitudes(x.b, x.m, x.r, scaling.b, false);
  const std::vector<float> most = magnitudes(x.b, x.m, x.r, scaling.b, true);
  const Tree tree(x, scaling, weight.data(), threads);
  const std::vector<int32_t> rows = kd_order(x.a, x.n, x.r, other.data(), kRowLeaf, threads);
  parallel(threads, (x.n + kTask - 1) / kTask, [&](const auto& next) {
    Walk walk(table, x, tree, scaling, most.data());
    for (int64_t task; (task = next()) >= 0;) {
      walk.start();
      for (int64_t n = task * kTask; n < std::min((task + 1) * kTask, x.n); ++n) walk.find(rows[n]);
    }
  });
}

}  // namespace nformer
