// The integer filter for long factors: an upper bound of each score from rows rounded to 8 or 16 bits, see
// row_top_k_dense.cpp. Compiled for each instruction set whose integer products are faster than its float32 ones.
#include "isa.h"

#include "simd.h"

namespace nformer {
namespace NFORMER_ISA {
namespace {

constexpr int kTileVectors = 2;
constexpr int kTileColumns = kTileVectors * kLanes;

typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVecAnywhere __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline IntVec load_integers(const int32_t* p) { return *reinterpret_cast<const IntVecAnywhere*>(p); }

// Adds the products of one row's group with each column's.
inline IntVec add_products(IntVec sum, int32_t row, IntVec columns) {
#if defined(__AVX512VNNI__)
  return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(row), (__m512i)columns);
#elif defined(__AVXVNNI__)
  return (IntVec)_mm256_dpbusd_avx_epi32((__m256i)sum, _mm256_set1_epi32(row), (__m256i)columns);
#elif defined(__x86_64__)
  return (IntVec)_mm_add_epi32((__m128i)sum, _mm_madd_epi16(_mm_set1_epi32(row), (__m128i)columns));
#elif defined(__ARM_FEATURE_DOTPROD)
  return (IntVec)vdotq_s32((int32x4_t)sum, vreinterpretq_s8_s32(vdupq_n_s32(row)),
                           vreinterpretq_s8_s32((int32x4_t)columns));
#endif
}

int64_t scan(const IntegerRows& rows, int64_t panels, const IntegerColumns& columns, int64_t groups, int32_t row,
             int32_t column, Hit* hits) {
  int64_t found = 0;
  const int32_t* x = rows.packed;
  for (int64_t panel = 0; panel < panels; ++panel) {
    IntVec sum[kTileRows][kTileVectors];
#pragma GCC unroll 12
    for (int m = 0; m < kTileRows; ++m)
      for (int v = 0; v < kTileVectors; ++v) sum[m][v] = load_integers(columns.start + v * kLanes);
    const int32_t* y = columns.packed;
    for (int64_t i = 0; i < groups; ++i, x += kTileRows, y += kTileColumns) {
      const IntVec y0 = load_integers(y), y1 = load_integers(y + kLanes);
#pragma GCC unroll 12
      for (int m = 0; m < kTileRows; ++m) {
        sum[m][0] = add_products(sum[m][0], x[m], y0);
        sum[m][1] = add_products(sum[m][1], x[m], y1);
      }
    }
#pragma GCC unroll 12
    for (int m = 0; m < kTileRows; ++m) {
      const int64_t i = panel * kTileRows + m;
      const Vec scale = broadcast(rows.scale[i]), norm = broadcast(rows.norm[i]);
      const Vec slack = broadcast(rows.slack[i]), own = broadcast(rows.threshold[i]);
      Vec most[kTileVectors];
      uint32_t bits = 0;
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) {
        const Vec limit = load(columns.threshold + v * kLanes);
        most[v] = __builtin_convertvector(sum[m][v], Vec) * load(columns.scale + v * kLanes) * scale +
                  norm * load(columns.error + v * kLanes) + slack;
        bits |= at_least(most[v], own < limit ? own : limit) << (v * kLanes);
      }
      if (__builtin_expect(bits != 0, 0)) {
        float scores[kTileColumns];
        for (int v = 0; v < kTileVectors; ++v) store(scores + v * kLanes, most[v]);
        for (; bits; bits &= bits - 1) {
          const int c = __builtin_ctz(bits);
          hits[found++] = {scores[c], row + static_cast<int32_t>(i), column + c};
        }
      }
    }
  }
  return found;
}

}  // namespace

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
IntegerFilter integer_filter() { return {4, 128, scan}; }
#elif defined(__ARM_FEATURE_DOTPROD)
IntegerFilter integer_filter() { return {4, 0, scan}; }
#else
IntegerFilter integer_filter() { return {2, 0, scan}; }
#endif

}  // namespace NFORMER_ISA
}  // namespace nformer
