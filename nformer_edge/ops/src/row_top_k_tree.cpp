// RowTopK for short factors, below quadratic time.
//
// Columns are laid out in k-d order, kLeaf to a leaf, with a box around each leaf, and a box around each kFan boxes, and
// so on. For row a, no column of a box scores above sum_r max(a_r lo_r, a_r hi_r), so a box whose bound is under the
// row's threshold is skipped. Rows are taken in k-d order as well: a row's threshold starts from what the last row's
// neighbors score with it, which is nearly final.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "kd_order.h"
#include "row_top_k.h"
#include "select.h"
#include "threads.h"

namespace nformer {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kTask = 256;    // rows a thread takes at once; the first starts without a threshold
constexpr int kSeeds = 2;           // times k: columns of the last row that set a threshold
constexpr int kRoom = 3;            // times k: candidates that may wait before the threshold is raised
constexpr int kLeavesAtOnce = 8;    // between them the threshold may rise

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
  const float* exact() const { return exact_.data(); }
  const int32_t* ids() const { return ids_.data(); }

 private:
  void add_level(int64_t count) {
    levels_.push_back({count, std::vector<float>((count + kFan - 1) / kFan * 2 * kFan * r_, kNaN)});
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
      std::fill(to + (end - begin), to + kLeaf, kNaN);  // no column: passes no threshold
      const auto range = std::minmax_element(to, to + (end - begin));
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

// One worker's walk: rows in order, one at a time. Each level's boxes are scanned in one go, then the leaves a few at a
// time, so that the processor always knows what comes next.
class Walk {
 public:
  Walk(const Table& table, const RowTopK& x, const Tree& tree, const Scaling& scaling, const float* most)
      : table_(table),
        x_(x),
        tree_(tree),
        scaling_(scaling),
        most_(most),
        selection_(table, {tree.exact(), tree.ids(), x.r, scaling.a * scaling.b}, x.k),
        capacity_(kRoom * x.k + kLeavesAtOnce * kLeaf),
        entries_(capacity_ + 1),
        buffer_(capacity_),
        boxes_(tree.levels()[0].count + kFan + 1),
        groups_(boxes_.size()) {
    for (int64_t axis = 0; axis < x.r; ++axis) leaf_offset_[axis] = static_cast<int32_t>(axis * kLeaf);
  }

  void start() { state_.count = 0; }

  void find(int64_t row) {
    row_ = x_.a + row * x_.r;
    double error = 0;
    for (int64_t axis = 0; axis < x_.r; ++axis) {
      factor_[axis] = static_cast<float>(row_[axis] * scaling_.a);
      box_offset_[axis] = static_cast<int32_t>((factor_[axis] >= 0 ? kFan * x_.r : 0) + axis * kFan);
      error += std::fabs(factor_[axis]) * static_cast<double>(most_[axis]);
    }
    const double steps = static_cast<double>(x_.r + 2) * 0x1p-24;
    const float bound = static_cast<float>((error * steps * 1.0001 + std::ldexp(x_.r, -120)) * 1.0001);
    state_ = {seed_threshold(bound), 0, bound};
    scan_leaves(find_leaves());
    selection_.finish(state_, entries_.data(), row_, buffer_, x_.neighbors + row * x_.k);
  }

 private:
  // At least k of the last row's best columns score this much with this row.
  float seed_threshold(float error) {
    if (state_.count < x_.k) return -kInfinity;
    const int count = std::min<int>(state_.count, kSeeds * x_.k);
    for (int n = 0; n < count; ++n) {
      const float* b = tree_.exact() + entries_[n].column * x_.r;
      double score = 0;
      for (int64_t axis = 0; axis < x_.r; ++axis) score += static_cast<double>(row_[axis]) * b[axis];
      buffer_.approximate[n] = static_cast<float>(score * scaling_.a * scaling_.b);
    }
    return threshold_under(selection_.kth_largest(buffer_, count) - static_cast<double>(error), error);
  }

  // The leaves that may hold a neighbor, in boxes_. Returns how many.
  int find_leaves() {
    int count = 1;
    boxes_[0] = {kInfinity, 0};
    for (int level = static_cast<int>(tree_.levels().size()) - 1; level >= 0; --level) {
      std::swap(boxes_, groups_);
      count = table_.scan_blocks(static_cast<int>(x_.r), tree_.group(level, 0), 2 * kFan * x_.r, box_offset_, factor_,
                                 kFan, state_.threshold, groups_.data(), count, boxes_.data());
    }
    if (state_.threshold == -kInfinity)
      std::sort(boxes_.begin(), boxes_.begin() + count, [](const Entry& x, const Entry& y) { return x.score > y.score; });
    return count;
  }

  void scan_leaves(int count) {
    const int room = capacity_ - kLeavesAtOnce * kLeaf;
    for (int n = 0; n < count; n += kLeavesAtOnce) {
      if (state_.count > room) selection_.compact(state_, entries_.data(), room, row_, buffer_);
      state_.count +=
          table_.scan_blocks(static_cast<int>(x_.r), tree_.leaf(0), kLeaf * x_.r, leaf_offset_, factor_, kLeaf,
                             state_.threshold, boxes_.data() + n, std::min(kLeavesAtOnce, count - n),
                             entries_.data() + state_.count);
    }
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
  std::vector<Entry> boxes_, groups_;
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
  const std::vector<int32_t> rows = kd_order(x.a, x.n, x.r, other.data(), 1, threads);
  parallel(threads, (x.n + kTask - 1) / kTask, [&](const auto& next) {
    Walk walk(table, x, tree, scaling, most.data());
    for (int64_t task; (task = next()) >= 0;) {
      walk.start();
      for (int64_t n = task * kTask; n < std::min((task + 1) * kTask, x.n); ++n) walk.find(rows[n]);
    }
  });
}

}  // namespace nformer