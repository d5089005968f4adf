// The filter: fast approximate scores that say which pairs deserve an exact one. Compiled per instruction set,
// with fused multiply-add where there is one.
#include "isa.h"

#include "simd.h"

namespace nformer {
namespace NFORMER_ISA {
namespace {

constexpr int kTileVectors = 2;
constexpr int kTileColumns = kTileVectors * kLanes;

inline Vec smaller(Vec x, Vec y) { return x < y ? x : y; }

}  // namespace

int tile_rows() { return kTileRows; }
int tile_columns() { return kTileColumns; }

int64_t scan_panel(const float* rows, int64_t panels, const float* columns, int64_t r, const float* row_threshold,
                   const float* column_threshold, int32_t row, int32_t column, Hit* hits) {
  int64_t found = 0;
  const Vec limit0 = load(column_threshold), limit1 = load(column_threshold + kLanes);
  for (int64_t panel = 0; panel < panels; ++panel) {
    Vec sum[kTileRows][kTileVectors] = {};
    const float* x = rows + panel * kTileRows * r;
    const float* y = columns;
    for (int64_t i = 0; i < r; ++i, x += kTileRows, y += kTileColumns) {
      const Vec y0 = load(y), y1 = load(y + kLanes);
#pragma GCC unroll 12
      for (int m = 0; m < kTileRows; ++m) {
        const Vec xm = broadcast(x[m]);
        sum[m][0] += xm * y0;
        sum[m][1] += xm * y1;
      }
    }
    const float* limit = row_threshold + panel * kTileRows;
#pragma GCC unroll 12
    for (int m = 0; m < kTileRows; ++m) {
      const Vec own = broadcast(limit[m]);
      uint32_t bits = at_least(sum[m][0], smaller(own, limit0)) | at_least(sum[m][1], smaller(own, limit1)) << kLanes;
      if (__builtin_expect(bits != 0, 0)) {
        float scores[kTileColumns];
        store(scores, sum[m][0]);
        store(scores + kLanes, sum[m][1]);
        const int32_t at = row + static_cast<int32_t>(panel * kTileRows + m);
        for (; bits; bits &= bits - 1) {
          const int c = __builtin_ctz(bits);
          hits[found++] = {scores[c], at, column + c};
        }
      }
    }
  }
  return found;
}

void score_hits(const float* a, const float* b, int64_t r, float scale_a, float scale_b, Hit* hits, int64_t count) {
  constexpr int kPairs = 4;
  const Vec left = broadcast(scale_a), right = broadcast(scale_b);
  for (int64_t n = 0; n < count; n += kPairs) {
    const float *x[kPairs], *y[kPairs];
    for (int p = 0; p < kPairs; ++p) {
      const Hit& hit = hits[n + p < count ? n + p : n];
      x[p] = a + hit.row * r, y[p] = b + hit.column * r;
    }
    for (int64_t next = n + kPairs; next < count && next < n + 2 * kPairs; ++next)
      for (int64_t i = 0; i < r; i += 16) {
        __builtin_prefetch(a + hits[next].row * r + i);
        __builtin_prefetch(b + hits[next].column * r + i);
      }
    Vec sum[kPairs] = {};
    int64_t i = 0;
    for (; i + kLanes <= r; i += kLanes)
#pragma GCC unroll 4
      for (int p = 0; p < kPairs; ++p) sum[p] += (load(x[p] + i) * left) * (load(y[p] + i) * right);
    for (int p = 0; p < kPairs && n + p < count; ++p) {
      float lane[kLanes], score = 0;
      store(lane, sum[p]);
      for (int l = 0; l < kLanes; ++l) score += lane[l];
      for (int64_t rest = i; rest < r; ++rest) score += (x[p][rest] * scale_a) * (y[p][rest] * scale_b);
      hits[n + p].score = score;
    }
  }
}

namespace {

// R is 0 for a length that is known only at run time.
template <int R, int Width>
int scan(int r, const float* base, int64_t stride, const int32_t* offset, const float* a, float threshold,
         const Entry* blocks, int count, Entry* out) {
  constexpr int kVectors = Width / kLanes;
  const int length = R ? R : r;
  int found = 0;
  const Vec limit = broadcast(threshold);
  Vec factor[R ? R : kMaxTreeRank];
  for (int i = 0; i < length; ++i) factor[i] = broadcast(a[i]);
  for (int n = 0; n < count; ++n) {
    if (blocks[n].score < threshold) continue;
    const float* values = base + blocks[n].column * stride;
    Vec sum[kVectors];
    uint32_t bits = 0;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sum[v] = factor[0] * load(values + offset[0] + v * kLanes);
#pragma GCC unroll 8
      for (int i = 1; i < length; ++i) sum[v] += factor[i] * load(values + offset[i] + v * kLanes);
      bits |= at_least(sum[v], limit) << (v * kLanes);
    }
    if (!bits) continue;
    float scores[Width];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(scores + v * kLanes, sum[v]);
    const int32_t first = blocks[n].column * Width;
    if (Width == kFan) {
      // Many boxes pass: every one is written and those that passed are kept, as a loop over bits mispredicts its end.
#pragma GCC unroll 16
      for (int c = 0; c < Width; ++c) {
        out[found] = {scores[c], first + c};
        found += bits >> c & 1;
      }
    } else {
      for (; bits; bits &= bits - 1) {
        const int c = __builtin_ctz(bits);
        out[found++] = {scores[c], first + c};
      }
    }
  }
  return found;
}

using Scan = int (*)(int, const float*, int64_t, const int32_t*, const float*, float, const Entry*, int, Entry*);

constexpr int kUnrolled = 8;
template <int Width>
constexpr Scan kScans[kUnrolled + 1] = {scan<0, Width>, scan<1, Width>, scan<2, Width>, scan<3, Width>, scan<4, Width>,
                                        scan<5, Width>, scan<6, Width>, scan<7, Width>, scan<8, Width>};

}  // namespace

int scan_blocks(int r, const float* base, int64_t stride, const int32_t* offset, const float* a, int width,
                float threshold, const Entry* blocks, int count, Entry* out) {
  const int known = r <= kUnrolled ? r : 0;
  const Scan scan = width == kFan ? kScans<kFan>[known] : kScans<kLeaf>[known];
  return scan(r, base, stride, offset, a, threshold, blocks, count, out);
}

// A score with at least k scores that reach it, itself among them; the largest such is the k-th.
float kth_largest(float* scores, int count, int k) {
  constexpr float kLowest = -__builtin_inff();
  while (count % kLanes) scores[count++] = kLowest;
  Vec best = broadcast(kLowest);
  for (int i = 0; i < count; i += kLanes) {
    const Vec own = load(scores + i);
    decltype(own < own) reached = {};  // counted downwards: a comparison that holds is -1
    for (int j = 0; j < count; ++j) reached += broadcast(scores[j]) >= own;
    const Vec candidate = reached <= -k ? own : broadcast(kLowest);
    best = best > candidate ? best : candidate;
  }
  float most = best[0];
  for (int lane = 1; lane < kLanes; ++lane) most = best[lane] > most ? best[lane] : most;
  return most;
}

}  // namespace NFORMER_ISA
}  // namespace nformer
