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
      uint32_t bits = not_less(sum[m][0], smaller(own, limit0)) | not_less(sum[m][1], smaller(own, limit1)) << kLanes;
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

namespace {

template <int R>
int scan(const float* base, const int32_t* offset, const float* a, int count, float threshold, int32_t first,
         Entry* out) {
  int found = 0;
  const Vec limit = broadcast(threshold);
  Vec factor[R];
  const float* at[R];
  for (int i = 0; i < R; ++i) factor[i] = broadcast(a[i]), at[i] = base + offset[i];
  for (int c = 0; c < count; c += kLanes) {
    Vec sum = factor[0] * load(at[0] + c);
#pragma GCC unroll 16
    for (int i = 1; i < R; ++i) sum += factor[i] * load(at[i] + c);
    uint32_t bits = not_less(sum, limit);
    if (bits) {
      float scores[kLanes];
      store(scores, sum);
      for (; bits; bits &= bits - 1) {
        const int lane = __builtin_ctz(bits);
        out[found++] = {scores[lane], first + c + lane};
      }
    }
  }
  return found;
}

using Scan = int (*)(const float*, const int32_t*, const float*, int, float, int32_t, Entry*);
constexpr Scan kScans[kMaxTreeRank] = {scan<1>,  scan<2>,  scan<3>,  scan<4>,  scan<5>,  scan<6>,  scan<7>,  scan<8>,
                                       scan<9>,  scan<10>, scan<11>, scan<12>, scan<13>, scan<14>, scan<15>, scan<16>};

}  // namespace

int scan_block(int r, const float* base, const int32_t* offset, const float* a, int count, float threshold,
               int32_t first, Entry* out) {
  return kScans[r - 1](base, offset, a, count, threshold, first, out);
}

}  // namespace NFORMER_ISA
}  // namespace nformer
