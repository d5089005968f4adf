// What one instruction set provides: plain functions on raw pointers, chosen at run time.
//
// The translation units behind a Table are compiled several times with different flags. They therefore use no
// standard library template: the linker keeps one copy of an inline function, and it could be the AVX-512 one.
#pragma once

#include <cstdint>

namespace nformer {

// A column with the filter's approximate score.
struct Entry {
  float score;
  int32_t column;
};

// A pair that the filter let through.
struct Hit {
  float score;
  int32_t row;
  int32_t column;
};

// A row block, as panels [groups][mr] of 32-bit groups of numbers. The upper bound of score (i, j) is
// scale_i * scale_j * (q_i . q_j) + norm_i * error_j + slack_i.
struct IntegerRows {
  const int32_t* packed;
  const float* scale;
  const float* norm;
  const float* slack;
  const float* threshold;
};

// One column panel [groups][nr].
struct IntegerColumns {
  const int32_t* packed;
  const int32_t* start;  // what takes the rows' offset out of the sum
  const float* scale;
  const float* error;
  const float* threshold;
};

struct IntegerFilter {
  int group;   // numbers in 32 bits: four of 8 bits or two of 16; 0 where there is no filter
  int offset;  // added to the rows' numbers, where the products' left side has no sign
  // As Table::scan_panel: reports the pairs whose upper bound reaches either threshold, with that bound as the score.
  int64_t (*scan)(const IntegerRows& rows, int64_t panels, const IntegerColumns& columns, int64_t groups, int32_t row,
                  int32_t column, Hit* hits);
};

// One head of ReciprocalNeighborAttention. Row-major: a, b [N, R]; v [N, D]; neighbors [N, K]; t, cameras [N]. Gated if
// there is a t.
struct Attention {
  const float* a;
  const float* b;
  const float* v;
  const int32_t* neighbors;
  int64_t n, r, d, k;
  double scale;
  const float* t = nullptr;
  const int32_t* cameras = nullptr;
  double camera_factor = 1;
};

// The slots that name each column j: `row`, `weight` and `slope` of entries start[j]..start[j + 1] - 1, rows ascending.
struct Readers {
  const int64_t* start;
  const int32_t* row;
  const float* weight;
  const float* slope;
};

struct AttentionGradient {
  const float* gy;  // [N, D]
  float* weight;    // [N, K], of each slot that counts; 0 elsewhere
  float* slope;     // [N, K], d loss / d (a_i . b_j)
  float* ga;        // [N, R]
  float* gb;        // [N, R]
  float* gv;        // [N, D]
  // Gated only.
  float* gt = nullptr;  // [N], added to: heads may share it
  Readers readers = {};
};

// A worker's own memory while it attends.
struct Scratch {
  int32_t* slots;   // [K]
  double* weights;  // [K]
  float* shares;    // [2 K]
};

constexpr int kBlockRows = 192;  // a multiple of every table's mr and nr; 192 x 256 floats fill 3/8 of a 512 KiB L2
constexpr int kMaxTreeRank = 16;
constexpr int kFan = 16;   // boxes that share a parent: one AVX-512 register, two of AVX2
constexpr int kLeaf = 32;  // columns in a leaf

struct Table {
  const char* name;
  IntegerFilter integers;
  int mr, nr;  // register tile of scan_panel and of the integer filter

  // Filter. Approximate scores, any rounding: results never depend on them, see select.h.
  // `panels` packed row panels [R][mr] against one packed column panel [R][nr]; a pair is reported unless its
  // score is under both its row's and its column's threshold. Returns the number of hits.
  int64_t (*scan_panel)(const float* rows, int64_t panels, const float* columns, int64_t r, const float* row_threshold,
                        const float* column_threshold, int32_t row, int32_t column, Hit* hits);
  // Sets the hits' scores to (scale_a a [row]) . (scale_b b [column]).
  void (*score_hits)(const float* a, const float* b, int64_t r, float scale_a, float scale_b, Hit* hits, int64_t count);
  // Of each block listed (its column; its score is an upper bound): scores sum_r a[r] * values[offset[r] + c] of its
  // `width` members (kFan or kLeaf), at base + block * stride. Blocks and members under the threshold, and members that are
  // NaN, are left out; a member's column is block * width + c. `out` has room for one more than all members.
  int (*scan_blocks)(int r, const float* base, int64_t stride, const int32_t* offset, const float* a, int width,
                     float threshold, const Entry* blocks, int count, Entry* out);

  // The k-th largest of scores[0..count-1], 1 <= k <= count, by counting: for count up to a hundred or so. The array
  // has room up to the next multiple of 16.
  float (*kth_largest)(float* scores, int count, int k);

  // Exact. The same bits on every instruction set.
  void (*score)(const float* a, const float* b, int64_t r, const int32_t* columns, int64_t count, double* out);
  // Rows (or columns) begin..end-1 of one head.
  void (*attend)(const Attention& x, int64_t begin, int64_t end, float* y, const Scratch& scratch);
  // out [D] = x + factor * y at length 1; zeros stay. `out` may be x or y.
  void (*join)(const float* x, float factor, const float* y, int64_t d, float* out);
  void (*attend_backward_rows)(const Attention& x, const AttentionGradient& g, int64_t begin, int64_t end,
                               const Scratch& scratch);
  void (*attend_backward_columns)(const Attention& x, const AttentionGradient& g, int64_t begin, int64_t end,
                                  const Scratch& scratch);
};

// The table called `name`, or the best one that this machine runs when `name` is empty; null if there is none.
const Table* find_table(const char* name);
// Fills `names` with up to `capacity` runnable tables' names, best first. Returns how many.
int list_tables(const char** names, int capacity);

}  // namespace nformer
