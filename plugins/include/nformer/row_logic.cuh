// What the kernels compute, without how it is spread over threads: scan, insert, reciprocity, softmax, weighted sum.
//
// Every algorithm is written once for a warp W of 32 lanes. On a GPU (device_warp.cuh) W::Float is one float and a
// lane is a thread; in the CPU tests (tests/host_warp.h) W::Float is 32 floats and the lanes go in step. Control flow
// depends on votes and broadcasts only, so it is the same in all lanes and both run the very same text.
//
// Sums run over the factors in ascending order with one fused multiply-add each (attention: in chains of 16), so a
// score has one bit pattern on every architecture, and the order (score descending, column ascending) is total: no
// result depends on scheduling.
#pragma once

#include "nformer/standard.h"

#if defined(__CUDACC__)
#define NFORMER_HD __host__ __device__ __forceinline__
#define NFORMER_UNROLL _Pragma("unroll")
#define NFORMER_NO_UNROLL _Pragma("unroll 1")
#else
#define NFORMER_HD inline
#define NFORMER_UNROLL
#define NFORMER_NO_UNROLL
#endif

namespace nformer {

inline constexpr int kLanes = 32;
inline constexpr float kMaxFloat = 3.402823466e+38F;
inline constexpr int32_t kNoNeighbor = -1;

// The kSlots * 32 best candidates so far, best first: place `slot * 32 + lane` stands in that lane's slot.
// Candidates must be offered in ascending order of their columns; then "not better" suffices to keep ties in order.
template <class W, int kSlots>
struct SortedList {
  typename W::Float score[kSlots];
  typename W::Int column[kSlots];

  NFORMER_HD void clear() {
    NFORMER_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
      score[slot] = W::splat(-kInfinity);
      column[slot] = W::splat(kNoNeighbor);
    }
  }

  // Puts a candidate behind every entry that is at least as good. Slots wholly beyond place k - 1 are left alone.
  NFORMER_HD void insert(float candidate, int32_t candidate_column, int k) {
    NFORMER_UNROLL
    for (int slot = kSlots - 1; slot >= 0; --slot) {
      if (slot > 0 && slot * kLanes >= k) {
        continue;
      }
      // The place before lane 0 is lane 31 of the slot before, or nothing, which counts as better than anything.
      float const before = slot > 0 ? W::broadcast(score[slot > 0 ? slot - 1 : 0], kLanes - 1) : kInfinity;
      int32_t const before_column = slot > 0 ? W::broadcast(column[slot > 0 ? slot - 1 : 0], kLanes - 1) : 0;
      auto const keep = score[slot] >= W::splat(candidate);
      auto const up = W::shift_up(score[slot], before);
      auto const up_column = W::shift_up(column[slot], before_column);
      auto const here = up >= W::splat(candidate);  // the entry before stays and this does not: the place
      score[slot] = W::select(keep, score[slot], W::select(here, W::splat(candidate), up));
      column[slot] = W::select(keep, column[slot], W::select(here, W::splat(candidate_column), up_column));
    }
  }

  // The score at place k - 1, which a later candidate has to exceed. All slots are asked before one is chosen: a choice
  // first would index the list by a variable and drive it out of registers.
  NFORMER_HD float worst_of(int k) const {
    float worst = W::broadcast(score[0], (k - 1) % kLanes);
    NFORMER_UNROLL
    for (int slot = 1; slot < kSlots; ++slot) {
      float const here = W::broadcast(score[slot], (k - 1) % kLanes);
      worst = (k - 1) / kLanes == slot ? here : worst;
    }
    return worst;
  }

  // Offers 32 columns, lane l holding the score of column first + l. `threshold` only ever rises.
  // NaN fails the first test and +infinity the second; -infinity exceeds no threshold.
  NFORMER_HD void offer(typename W::Float const& scores, int32_t first, int k, float& threshold) {
    uint32_t waiting = W::ballot((scores > W::splat(threshold)) & (scores <= W::splat(kMaxFloat)));
    if (waiting == 0) {
      return;
    }
    NFORMER_NO_UNROLL
    while (waiting != 0) {
      int const lane = W::lowest_bit(waiting);
      waiting &= waiting - 1;
      insert(W::broadcast(scores, lane), first + lane, k);
    }
    float const worst = worst_of(k);
    threshold = worst > threshold ? worst : threshold;
  }

  NFORMER_HD void write(int32_t* out, int k) const {
    NFORMER_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
      auto const place = W::lane() + W::splat(slot * kLanes);
      W::store(out, place, column[slot], place < W::splat(k));
    }
  }
};

// A lower bound on the k-th largest of all columns from a sample of them: the k-th largest of 32 * kSlots maxima
// over disjoint parts of the sample. -infinity where the sample shows no bound. Exceeding the result means to be at
// least as good as the bound, because a column as good as the bound may still be chosen.
template <class W, int kSlots>
NFORMER_HD float threshold_from_sample(typename W::Float const (&maxima)[kSlots], int k) {
  typename W::Float sound[kSlots];
  typename W::Int better[kSlots];
  NFORMER_UNROLL
  for (int slot = 0; slot < kSlots; ++slot) {
    // A part that met +infinity says nothing: that column is never chosen.
    sound[slot] = W::select(maxima[slot] <= W::splat(kMaxFloat), maxima[slot], W::splat(-kInfinity));
    better[slot] = W::splat(0);
  }
  NFORMER_UNROLL
  for (int slot = 0; slot < kSlots; ++slot) {
    NFORMER_NO_UNROLL
    for (int lane = 0; lane < kLanes; ++lane) {
      auto const other = W::splat(W::broadcast(sound[slot], lane));
      NFORMER_UNROLL
      for (int mine = 0; mine < kSlots; ++mine) {
        better[mine] = better[mine] + W::select(other > sound[mine], W::splat(1), W::splat(0));
      }
    }
  }
  float bound = kInfinity;
  NFORMER_UNROLL
  for (int slot = 0; slot < kSlots; ++slot) {
    float const least = W::min(W::select(better[slot] < W::splat(k), sound[slot], W::splat(kInfinity)));
    bound = least < bound ? least : bound;
  }
  return nextafterf(bound, -kInfinity);
}

// ---- RowTopK, short factors: a warp holds a few rows in registers and streams columns through a shared tile ----

inline constexpr int kTileColumns = 512;  // 16 steps of 32; 10 KB at five factors
inline constexpr int kSampleStride = 8;   // every eighth tile is looked at first to find a threshold
inline constexpr int64_t kSampleFrom = 2 * kSampleStride * kTileColumns;  // columns under which sampling cannot pay
static_assert(kTileColumns % (kLanes * 4) == 0, "steps are dealt to slots in turn");

// Rows of one warp, such that factors, thresholds and lists stay in registers.
template <int kFactors, int kSlots>
inline constexpr int kRowsPerWarp = 8 * (kFactors + 2 * kSlots + 1) <= 96   ? 8
                                    : 4 * (kFactors + 2 * kSlots + 1) <= 96 ? 4
                                                                            : 2;

// `Source` reads element i as a float with at(i), whatever the type in memory.
// Copies one column into a tile [kFactors][kTileColumns]. Absent factors are 0, which changes no sum. An absent column
// is NaN, so that its scores are NaN and never chosen: the scan needs no bounds.
template <int kFactors, class Source>
NFORMER_HD void stage_column(float* tile, int place, Source const& b, int64_t column, int64_t columns, int factors) {
  NFORMER_UNROLL
  for (int r = 0; r < kFactors; ++r) {
    float value = 0.0F;
    if (column >= columns) {
      value = kNaN;
    } else if (r < factors) {
      value = b.at(column * factors + r);
    }
    tile[r * kTileColumns + place] = value;
  }
}

template <class W, int kFactors, int kSlots>
struct RowBlock {
  static constexpr int kRows = kRowsPerWarp<kFactors, kSlots>;

  float factor[kRows][kFactors];
  float threshold[kRows];
  SortedList<W, kSlots> list[kRows];

  template <class Source>
  NFORMER_HD void load(Source const& a, int64_t first_row, int64_t rows, int factors) {
    NFORMER_UNROLL
    for (int i = 0; i < kRows; ++i) {
      NFORMER_UNROLL
      for (int r = 0; r < kFactors; ++r) {
        bool const there = first_row + i < rows;
        factor[i][r] = !there         ? kNaN  // an absent row: no score is ever chosen
                       : r < factors ? a.at((first_row + i) * factors + r)
                                     : 0.0F;
      }
      threshold[i] = -kInfinity;
    }
  }

  NFORMER_HD void clear() {
    NFORMER_UNROLL
    for (int i = 0; i < kRows; ++i) {
      list[i].clear();
    }
  }

  NFORMER_HD typename W::Float score(int i, typename W::Float const (&column)[kFactors]) const {
    auto sum = W::splat(factor[i][0]) * column[0];
    NFORMER_UNROLL
    for (int r = 1; r < kFactors; ++r) {
      sum = W::fma(W::splat(factor[i][r]), column[r], sum);
    }
    return sum;
  }

  NFORMER_HD static void columns_of(float const* tile, int step, typename W::Float (&column)[kFactors]) {
    NFORMER_UNROLL
    for (int r = 0; r < kFactors; ++r) {
      column[r] = W::load(tile + r * kTileColumns + step, W::lane());
    }
  }

  // Maxima over the sampled tiles; steps are dealt to the slots in turn, so the parts are disjoint.
  struct Sample {
    typename W::Float maxima[kRows][kSlots];

    NFORMER_HD void clear() {
      NFORMER_UNROLL
      for (int i = 0; i < kRows; ++i) {
        NFORMER_UNROLL
        for (int slot = 0; slot < kSlots; ++slot) {
          maxima[i][slot] = W::splat(-kInfinity);
        }
      }
    }
  };

  NFORMER_HD void look(float const* tile, Sample& sample) const {
    NFORMER_NO_UNROLL
    for (int step = 0; step < kTileColumns; step += kLanes * kSlots) {
      NFORMER_UNROLL
      for (int slot = 0; slot < kSlots; ++slot) {
        typename W::Float column[kFactors];
        columns_of(tile, step + slot * kLanes, column);
        NFORMER_UNROLL
        for (int i = 0; i < kRows; ++i) {
          sample.maxima[i][slot] = W::larger(sample.maxima[i][slot], score(i, column));
        }
      }
    }
  }

  NFORMER_HD void learn(Sample const& sample, int k) {
    NFORMER_UNROLL
    for (int i = 0; i < kRows; ++i) {
      threshold[i] = threshold_from_sample<W, kSlots>(sample.maxima[i], k);
    }
  }

  // Takes the tile's columns first .. first + kTileColumns - 1 in, in order.
  NFORMER_HD void scan(float const* tile, int64_t first, int k) {
    NFORMER_NO_UNROLL
    for (int step = 0; step < kTileColumns; step += kLanes) {
      typename W::Float column[kFactors];
      columns_of(tile, step, column);
      typename W::Float scores[kRows];
      auto hit = W::none();
      NFORMER_UNROLL
      for (int i = 0; i < kRows; ++i) {
        scores[i] = score(i, column);
        hit = hit | (scores[i] > W::splat(threshold[i]));
      }
      if (W::any(hit)) {
        NFORMER_UNROLL
        for (int i = 0; i < kRows; ++i) {
          list[i].offer(scores[i], static_cast<int32_t>(first) + step, k, threshold[i]);
        }
      }
    }
  }

  NFORMER_HD void write(int32_t* neighbors, int64_t first_row, int64_t rows, int k) const {
    NFORMER_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (first_row + i < rows) {
        list[i].write(neighbors + (first_row + i) * k, k);
      }
    }
  }
};

// ---- RowTopK, long factors: a block makes a tile of scores like a matrix product, then each warp takes its rows ----

inline constexpr int kScoreRows = 64, kScoreColumns = 128;
inline constexpr int kLongRowsPerWarp = 8;

template <class W, int kSlots>
struct LongRowBlock {
  float threshold[kLongRowsPerWarp];
  SortedList<W, kSlots> list[kLongRowsPerWarp];

  NFORMER_HD void clear() {
    NFORMER_UNROLL
    for (int i = 0; i < kLongRowsPerWarp; ++i) {
      threshold[i] = -kInfinity;
      list[i].clear();
    }
  }

  // `scores` [kLongRowsPerWarp][kScoreColumns]; the scores of absent rows and columns are NaN.
  NFORMER_HD void take(float const* scores, int64_t first, int k) {
    NFORMER_UNROLL
    for (int i = 0; i < kLongRowsPerWarp; ++i) {
      NFORMER_NO_UNROLL
      for (int step = 0; step < kScoreColumns; step += kLanes) {
        auto const here = W::load(scores + i * kScoreColumns + step, W::lane());
        list[i].offer(here, static_cast<int32_t>(first) + step, k, threshold[i]);
      }
    }
  }

  NFORMER_HD void write(int32_t* neighbors, int64_t first_row, int64_t rows, int k) const {
    NFORMER_UNROLL
    for (int i = 0; i < kLongRowsPerWarp; ++i) {
      if (first_row + i < rows) {
        list[i].write(neighbors + (first_row + i) * k, k);
      }
    }
  }
};

// ---- ReciprocalNeighborAttention: a warp takes one row, its lanes the neighbors, then the values ----

template <class T>
struct AttentionHead {
  T const* a;                // [rows, factors]
  T const* b;                // [rows, factors]
  T const* v;                // [rows, size]
  int32_t const* neighbors;  // [rows, count]
  T* y;                      // [rows, size]
  int64_t rows;
  int factors, size, count;
  float scale;
  float const* t;          // [rows]; null: not gated
  int32_t const* cameras;  // [rows] or null
  float camera_factor;
  bool words;  // four elements of every row of v and y make one aligned word
};

inline constexpr int kSideBySide = 4;
inline constexpr int kChain = 16;  // one chain of 256 additions rounds more than twice as badly as plain torch does

template <class W, int kSlots>
struct Neighborhood {
  static constexpr int kTogether = 4;

  typename W::Int neighbor[kSlots];
  typename W::Float weight[kSlots];
  uint32_t counting[kSlots];  // a bit for each lane whose neighbor counts

  // A neighbor out of 0 .. rows - 1 (-1 above all) never counts, nor does one whose score is not finite.
  template <class T>
  NFORMER_HD void find(AttentionHead<T> const& head, int64_t row) {
    NFORMER_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
      auto const place = W::lane() + W::splat(slot * kLanes);
      neighbor[slot] =
          W::load(head.neighbors + row * head.count, place, place < W::splat(head.count), kNoNeighbor);
      auto const self = W::splat(static_cast<int32_t>(row));
      auto const other = (neighbor[slot] < self) | (neighbor[slot] > self);
      auto const inside =
          (neighbor[slot] >= W::splat(0)) & (neighbor[slot] < W::splat(static_cast<int32_t>(head.rows)));
      counting[slot] = head.t != nullptr ? W::ballot(inside & other) : 0;
    }
    if (head.t != nullptr) {
      return;  // gated: the list of the row alone counts
    }
    NFORMER_NO_UNROLL
    for (int start = 0; start < head.count; start += kTogether) {
      uint32_t const bits = chosen_by(head, start, static_cast<int32_t>(row)) << start % kLanes;
      NFORMER_UNROLL
      for (int slot = 0; slot < kSlots; ++slot) {
        counting[slot] |= start / kLanes == slot ? bits : 0;
      }
    }
  }

  // One entry of a list spread over slots and lanes. All slots are asked before one is chosen, so that none is indexed
  // by a variable: that would drive the list out of registers.
  template <class X, class Spread>
  NFORMER_HD static X entry_of(Spread const (&spread)[kSlots], int slot, int lane) {
    X entry = W::broadcast(spread[0], lane);
    NFORMER_UNROLL
    for (int s = 1; s < kSlots; ++s) {
      X const here = W::broadcast(spread[s], lane);
      entry = s == slot ? here : entry;
    }
    return entry;
  }

  // Which of the neighbors at places start .. start + 3 have `row` in their own lists, as bits. The lanes read a list
  // side by side, and four lists are under way at once to hide latency.
  template <class T>
  NFORMER_HD uint32_t chosen_by(AttentionHead<T> const& head, int start, int32_t row) const {
    int32_t j[kTogether];
    typename W::Flag by[kTogether];
    NFORMER_UNROLL
    for (int n = 0; n < kTogether; ++n) {
      j[n] = entry_of<int32_t>(neighbor, start / kLanes, start % kLanes + n);
      by[n] = W::none();
    }
    for (int first = 0; first < head.count; first += kLanes) {
      auto const place = W::lane() + W::splat(first);
      typename W::Int entry[kTogether];
      NFORMER_UNROLL
      for (int n = 0; n < kTogether; ++n) {
        bool const there = j[n] >= 0 && j[n] < head.rows;
        int32_t const* list = head.neighbors + (there ? j[n] : 0) * int64_t{head.count};
        entry[n] = W::load(list, place, place < W::splat(there ? head.count : 0), kNoNeighbor);
      }
      NFORMER_UNROLL
      for (int n = 0; n < kTogether; ++n) {
        by[n] = by[n] | (entry[n] == W::splat(row));
      }
    }
    uint32_t bits = 0;
    NFORMER_UNROLL
    for (int n = 0; n < kTogether; ++n) {
      bits |= static_cast<uint32_t>(W::any(by[n])) << n;
    }
    return bits;
  }

  // The scores of the counting neighbors in one slot.
  template <class T>
  NFORMER_HD typename W::Float score(AttentionHead<T> const& head, int64_t row, int slot) const {
    auto const in = W::has_bit(counting[slot]);
    auto sum = W::splat(0.0F);
    NFORMER_NO_UNROLL
    for (int start = 0; start < head.factors; start += kChain) {
      int const stop = start + kChain < head.factors ? start + kChain : head.factors;
      auto part = W::splat(0.0F);
      for (int r = start; r < stop; ++r) {
        auto const left = W::splat(static_cast<float>(head.a[row * head.factors + r]));
        part = W::fma(left, W::gather(head.b + r, neighbor[slot], head.factors, in), part);
      }
      sum = sum + part;
    }
    return sum;
  }

  // Gated: fills `weight` with sigmoid(scale * (score - (t_i + t_j) / 2)), times the camera factor for one known camera.
  template <class T>
  NFORMER_HD void gate(AttentionHead<T> const& head, int64_t row) {
    int32_t const camera = head.cameras != nullptr ? head.cameras[row] : kNoNeighbor;
    NFORMER_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
      auto const in = W::has_bit(counting[slot]);
      auto const sum = score(head, row, slot);
      auto const mine = sum - W::splat(head.t[row]);
      auto const theirs = sum - W::gather(head.t, neighbor[slot], 1, in);
      auto const most = W::splat(kMaxFloat);
      counting[slot] &= W::ballot((W::absolute(mine) <= most) & (W::absolute(theirs) <= most));
      auto const half = W::splat(0.5F);
      auto const scaled = W::splat(head.scale) * W::fma(half, mine, half * theirs);
      auto const power = W::exp(W::splat(0.0F) - W::absolute(scaled));
      auto const part = W::select(scaled >= W::splat(0.0F), W::splat(1.0F), power);
      weight[slot] = part / (W::splat(1.0F) + power);
      if (camera >= 0) {
        auto const same = W::load(head.cameras, neighbor[slot], in, kNoNeighbor) == W::splat(camera);
        weight[slot] = W::select(same, weight[slot] * W::splat(head.camera_factor), weight[slot]);
      }
    }
  }

  // Fills `weight` with the softmax of scale * score over the counting neighbors. False: none counts.
  // The extreme score is subtracted before scaling, so that a large scale cannot overflow.
  template <class T>
  NFORMER_HD bool weigh(AttentionHead<T> const& head, int64_t row) {
    bool const falling = head.scale < 0.0F;
    float extreme = -kInfinity;
    NFORMER_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
      auto const sum = score(head, row, slot);
      counting[slot] &= W::ballot(W::absolute(sum) <= W::splat(kMaxFloat));
      weight[slot] = sum;
      auto const toward = falling ? W::splat(0.0F) - sum : sum;
      float const most = W::max(W::select(W::has_bit(counting[slot]), toward, W::splat(-kInfinity)));
      extreme = most > extreme ? most : extreme;
    }
    if (!(extreme > -kInfinity)) {
      return false;
    }
    float const base = falling ? -extreme : extreme;
    float total = 0.0F;
    NFORMER_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
      // A scale of 0 weighs all alike; 0 * infinity would not.
      auto const below = weight[slot] - W::splat(base);
      auto const exponent = head.scale == 0.0F ? W::splat(0.0F) : W::splat(head.scale) * below;
      weight[slot] = W::select(W::has_bit(counting[slot]), W::exp(exponent), W::splat(0.0F));
      total += W::sum(weight[slot]);
    }
    NFORMER_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
      weight[slot] = weight[slot] / W::splat(total);
    }
    return true;
  }

  // y[row] = sum of weight * v over the counting neighbors, in the order of the list; zero where none counts.
  // A lane takes four elements side by side. Four neighbors are loaded before any is added, to hide latency.
  template <class T>
  NFORMER_HD void blend(AttentionHead<T> const& head, int64_t row) const {
    NFORMER_NO_UNROLL
    for (int start = 0; start < head.size; start += kLanes * kSideBySide) {
      auto const place = W::lane() * W::splat(kSideBySide) + W::splat(start);
      typename W::Float sum[kSideBySide];
      NFORMER_UNROLL
      for (int e = 0; e < kSideBySide; ++e) {
        sum[e] = W::splat(0.0F);
      }
      NFORMER_NO_UNROLL
      for (int slot = 0; slot < kSlots; ++slot) {
        uint32_t left = counting[0];
        NFORMER_UNROLL
        for (int s = 1; s < kSlots; ++s) {
          left = s == slot ? counting[s] : left;
        }
        NFORMER_NO_UNROLL
        while (left != 0) {
          typename W::Float value[kTogether][kSideBySide];
          float share[kTogether];
          NFORMER_UNROLL
          for (int n = 0; n < kTogether; ++n) {
            share[n] = 0.0F;
            NFORMER_UNROLL
            for (int e = 0; e < kSideBySide; ++e) {
              value[n][e] = W::splat(0.0F);
            }
            if (left != 0) {
              int const lane = W::lowest_bit(left);
              left &= left - 1;
              share[n] = entry_of<float>(weight, slot, lane);
              int64_t const j = entry_of<int32_t>(neighbor, slot, lane);
              W::load_four(head.v + j * head.size, place, head.size, head.words, value[n]);
            }
          }
          NFORMER_UNROLL
          for (int n = 0; n < kTogether; ++n) {
            NFORMER_UNROLL
            for (int e = 0; e < kSideBySide; ++e) {
              sum[e] = W::fma(W::splat(share[n]), value[n][e], sum[e]);
            }
          }
        }
      }
      W::store_four(head.y + row * head.size, place, head.size, head.words, sum);
    }
  }

  NFORMER_HD void silence() {
    NFORMER_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
      counting[slot] = 0;
    }
  }
};

template <class W, int kSlots, class T>
NFORMER_HD void attend(AttentionHead<T> const& head, int64_t row) {
  Neighborhood<W, kSlots> near;
  near.find(head, row);
  if (head.t != nullptr) {
    near.gate(head, row);
  } else if (!near.weigh(head, row)) {
    near.silence();
  }
  near.blend(head, row);
}

}  // namespace nformer
