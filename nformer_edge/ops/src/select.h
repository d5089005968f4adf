// The streaming selection of one row's k best columns from approximate scores.
//
// The filter's score s' of a column and its exact score d differ by at most E (Row::error). If x is the k-th largest
// s' seen, then k columns have d >= x - E, so a column with s' < x - 2 E cannot be in the list and is never looked at
// again. What is left, k columns and a few, gets exact scores and is sorted by them: the list does not depend on how
// the filter rounds, in which order columns come, or how many threads bring them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "table.h"

namespace nformer {

constexpr int32_t kNone = -1;

// The columns as exact scoring sees them, possibly in another order than the caller's.
struct Columns {
  const float* values;  // [M, R]
  const int32_t* ids;   // [M], the caller's index of each; null if it is the same
  int64_t r;
  double unscale;  // filter score / this = exact score; a power of two

  int32_t id(int32_t column) const { return ids ? ids[column] : column; }
};

// A column's place in the list as one number, larger is better. A score has 24 significant bits, so the last 29 of a
// double are free to hold its number: equal scores, lower column first.
constexpr int kNumberBits = 29;
constexpr int64_t kMostColumns = int64_t{1} << kNumberBits;

inline uint64_t place_of(double score, int32_t id) {
  score += 0.0;  // -0 and 0 are equal
  uint64_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  bits ^= bits >> 63 ? ~uint64_t{0} : uint64_t{1} << 63;
  return (bits | (kMostColumns - 1)) - static_cast<uint64_t>(id);
}

// The exact score of a place.
inline double score_of(uint64_t place) {
  uint64_t bits = place & ~static_cast<uint64_t>(kMostColumns - 1);
  bits = bits >> 63 ? bits ^ (uint64_t{1} << 63) : ~bits & ~static_cast<uint64_t>(kMostColumns - 1);
  double score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

struct Ranked {
  uint64_t place;
  Entry entry;

  bool operator<(const Ranked& other) const { return place > other.place; }
};

// A selection's scratch for exact scoring, one a worker.
struct RankBuffer {
  explicit RankBuffer(int64_t capacity)
      : columns(capacity), scores(capacity), places(capacity), ranked(capacity), approximate(capacity + 16) {}
  std::vector<int32_t> columns;
  std::vector<double> scores;
  std::vector<uint64_t> places;
  std::vector<Ranked> ranked;
  std::vector<float> approximate;
};

inline float round_down(double x) {
  const float f = static_cast<float>(x);
  return static_cast<double>(f) > x ? std::nextafterf(f, -std::numeric_limits<float>::infinity()) : f;
}

// Under this filter score, no column's rounded exact score can reach that of one known to be at least `known`.
inline float threshold_under(double known, double error) {
  return round_down(known - error - (std::fabs(known) + error) * 0x1p-22);
}

// One row's state; its `capacity` entries lie elsewhere.
struct Row {
  float threshold = -std::numeric_limits<float>::infinity();
  int32_t count = 0;
  float error = 0;

  // Adds a column if it may be in the list. The caller makes room first.
  void push(Entry* entries, Entry entry) {
    if (!(entry.score < threshold)) entries[count++] = entry;
  }
};

class Selection {
 public:
  Selection(const Table& table, const Columns& columns, int k) : table_(table), columns_(columns), k_(k) {}

  int k() const { return k_; }

  // Drops what cannot be in the list. Leaves at most (k + capacity) / 2 entries, by exact scores if it has to.
  void compact(Row& row, Entry* entries, int capacity, const float* a, RankBuffer& buffer) const {
    prune(row, entries, buffer);
    if (row.count <= (k_ + capacity) / 2) return;
    rank(entries, row.count, a, buffer);
    raise(row, threshold_under(score_of(buffer.ranked[k_ - 1].place) * columns_.unscale, row.error));
    row.count = k_;
  }

  // The final list: `out` [k], and the candidates, best first, in entries[0..row.count-1].
  void finish(Row& row, Entry* entries, const float* a, RankBuffer& buffer, int32_t* out) const {
    prune(row, entries, buffer);
    sort(entries, row.count, buffer);
    // Filter scores that are farther apart than both errors stand in their exact order.
    for (int begin = 0, end; begin < std::min(row.count, static_cast<int32_t>(k_)); begin = end) {
      for (end = begin + 1; end < row.count; ++end)
        if (entries[end].score < threshold_under(entries[end - 1].score - static_cast<double>(row.error), row.error)) break;
      if (end - begin > 1) rank(entries + begin, end - begin, a, buffer);
    }
    const int kept = std::min(row.count, static_cast<int32_t>(k_));
    for (int n = 0; n < kept; ++n) out[n] = columns_.id(entries[n].column);
    std::fill(out + kept, out + k_, kNone);
  }

  // The k-th largest of buffer.approximate[0..count-1], which is used up.
  float kth_largest(RankBuffer& buffer, int count) const {
    if (count <= 10 * table_.nr) return table_.kth_largest(buffer.approximate.data(), count, k_);
    const auto first = buffer.approximate.begin();
    std::nth_element(first, first + (k_ - 1), first + count, std::greater<>());
    return buffer.approximate[k_ - 1];
  }

 private:
  // Drops what the approximate scores alone rule out.
  void prune(Row& row, Entry* entries, RankBuffer& buffer) const {
    if (row.count <= k_) return;
    for (int n = 0; n < row.count; ++n) buffer.approximate[n] = entries[n].score;
    const double kth = kth_largest(buffer, row.count);
    raise(row, threshold_under(kth - static_cast<double>(row.error), row.error));
    int32_t kept = 0;
    for (int n = 0; n < row.count; ++n) {
      const Entry entry = entries[n];
      entries[kept] = entry;
      kept += entry.score >= row.threshold;  // without a branch that would mispredict
    }
    row.count = kept;
  }

  static void raise(Row& row, float threshold) { row.threshold = std::max(row.threshold, threshold); }

  // By descending filter score.
  void sort(Entry* entries, int count, RankBuffer& buffer) const {
    if (count > kFew) {
      std::sort(entries, entries + count, [](const Entry& x, const Entry& y) { return x.score > y.score; });
      return;
    }
    for (int n = 0; n < count; ++n) buffer.approximate[n] = entries[n].score, buffer.ranked[n].entry = entries[n];
    for (int n = 0; n < count; ++n) {
      int before = 0;
      for (int o = 0; o < n; ++o) before += buffer.approximate[o] >= buffer.approximate[n];
      for (int o = n + 1; o < count; ++o) before += buffer.approximate[o] > buffer.approximate[n];
      entries[before] = buffer.ranked[n].entry;
    }
  }

  // By place, from exact scores. Leaves the places in buffer.ranked.
  void rank(Entry* entries, int count, const float* a, RankBuffer& buffer) const {
    for (int n = 0; n < count; ++n) buffer.columns[n] = entries[n].column;
    table_.score(a, columns_.values, columns_.r, buffer.columns.data(), count, buffer.scores.data());
    for (int n = 0; n < count; ++n) buffer.places[n] = place_of(buffer.scores[n], columns_.id(entries[n].column));
    if (count <= kFew) {
      for (int n = 0; n < count; ++n) {
        int before = 0;
        for (int o = 0; o < count; ++o) before += buffer.places[o] > buffer.places[n];
        buffer.ranked[before] = {buffer.places[n], entries[n]};
      }
    } else {
      for (int n = 0; n < count; ++n) buffer.ranked[n] = {buffer.places[n], entries[n]};
      std::sort(buffer.ranked.begin(), buffer.ranked.begin() + count);
    }
    for (int n = 0; n < count; ++n) entries[n] = buffer.ranked[n].entry;
  }

  static constexpr int kFew = 96;  // up to here counting who stands before beats a sort, whose branches mispredict

  const Table& table_;
  Columns columns_;
  int k_;
};

}  // namespace nformer
