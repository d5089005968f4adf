#include "kd_order.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "threads.h"

namespace nformer {
namespace {

struct Keyed {
  float key;
  int32_t index;
  bool operator<(const Keyed& other) const { return key < other.key || (key == other.key && index < other.index); }
};

struct Span {
  int64_t begin, end;
};

class Builder {
 public:
  Builder(const float* x, int64_t r, const float* weight, int leaf, std::vector<int32_t>& order)
      : x_(x), r_(r), weight_(weight), leaf_(leaf), order_(order) {}

  // Splits spans down to `least` points; the ones that are left are returned.
  std::vector<Span> split(Span whole, int64_t least, std::vector<Keyed>& keyed) const {
    std::vector<Span> todo{whole}, done;
    while (!todo.empty()) {
      const Span span = todo.back();
      todo.pop_back();
      if (span.end - span.begin <= std::max<int64_t>(least, leaf_)) {
        done.push_back(span);
        continue;
      }
      const int64_t middle = span.begin + left_size(span.end - span.begin);
      part(span, middle, keyed);
      todo.push_back({span.begin, middle});
      todo.push_back({middle, span.end});
    }
    return done;
  }

 private:
  // The largest power of two of leaves that leaves something on the right.
  int64_t left_size(int64_t count) const {
    const int64_t leaves = (count + leaf_ - 1) / leaf_;
    int64_t left = 1;
    while (2 * left < leaves) left *= 2;
    return left * leaf_;
  }

  int64_t widest_axis(Span span) const {
    std::vector<float> lo(r_, std::numeric_limits<float>::infinity()), hi(r_, -lo[0]);
    for (int64_t n = span.begin; n < span.end; ++n) {
      const float* point = x_ + order_[n] * r_;
      for (int64_t i = 0; i < r_; ++i) {
        lo[i] = std::min(lo[i], point[i]);
        hi[i] = std::max(hi[i], point[i]);
      }
    }
    int64_t widest = 0;
    float most = -1;
    for (int64_t i = 0; i < r_; ++i) {
      const float spread = (hi[i] - lo[i]) * weight_[i];
      if (spread > most) most = spread, widest = i;
    }
    return widest;
  }

  void part(Span span, int64_t middle, std::vector<Keyed>& keyed) const {
    const int64_t axis = widest_axis(span);
    keyed.resize(span.end - span.begin);
    for (int64_t n = span.begin; n < span.end; ++n) keyed[n - span.begin] = {x_[order_[n] * r_ + axis], order_[n]};
    std::nth_element(keyed.begin(), keyed.begin() + (middle - span.begin), keyed.end());
    for (int64_t n = span.begin; n < span.end; ++n) order_[n] = keyed[n - span.begin].index;
  }

  const float* x_;
  int64_t r_;
  const float* weight_;
  int leaf_;
  std::vector<int32_t>& order_;
};

}  // namespace

std::vector<int32_t> kd_order(const float* x, int64_t count, int64_t r, const float* weight, int leaf, int threads) {
  std::vector<int32_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  const Builder builder(x, r, weight, leaf, order);
  std::vector<Keyed> keyed;
  const std::vector<Span> spans = builder.split({0, count}, count / (8 * static_cast<int64_t>(threads)), keyed);
  parallel(threads, spans.size(), [&](const auto& next) {
    std::vector<Keyed> own;
    for (int64_t task; (task = next()) >= 0;) builder.split(spans[task], 0, own);
  });
  return order;
}

}  // namespace nformer
