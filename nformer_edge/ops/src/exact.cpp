// The arithmetic that results are made of: the same bits on every instruction set and for every thread count.
//
// Compiled per instruction set with -ffp-contract=off. Sums run over a fixed number of lanes (8 doubles, 16 floats)
// that end in a fixed tree, so a wider register only takes more lanes at once. A product of two float32 is exact in
// double, so even a fused multiply-add would not change `dot`.
#include "isa.h"
#include "simd.h"

namespace nformer {
namespace NFORMER_ISA {
namespace {

// Registers' own widths, several side by side: a vector wider than a register goes through memory.
constexpr int kDoubles = kLanes / 2;
typedef double DoubleVec __attribute__((vector_size(8 * kDoubles)));
typedef float HalfVec __attribute__((vector_size(4 * kDoubles)));
typedef float HalfVecAnywhere __attribute__((vector_size(4 * kDoubles), aligned(4), may_alias));
constexpr int kDoubleVecs = 8 / kDoubles;
constexpr int kFloatVecs = 16 / kLanes;
constexpr int kPairs = 4;

// GCC 12 makes six instructions of the plain form under AVX-512, and warns of its own header without the full mask.
inline DoubleVec load_wide(const float* p) {
#if defined(__AVX512F__)
  return (DoubleVec)_mm512_maskz_cvtps_pd(0xFF, _mm256_loadu_ps(p));
#elif defined(__AVX2__)
  return (DoubleVec)_mm256_cvtps_pd(_mm_loadu_ps(p));
#else
  return __builtin_convertvector(static_cast<HalfVec>(*reinterpret_cast<const HalfVecAnywhere*>(p)), DoubleVec);
#endif
}

// x * y + z, where x and y were float32: their product is exact in double, so one rounding or two give the same bits.
inline DoubleVec add_product(DoubleVec x, DoubleVec y, DoubleVec z) {
#if defined(__AVX512F__)
  return (DoubleVec)_mm512_fmadd_pd((__m512d)x, (__m512d)y, (__m512d)z);
#elif defined(__AVX2__)
  return (DoubleVec)_mm256_fmadd_pd((__m256d)x, (__m256d)y, (__m256d)z);
#elif defined(__aarch64__)
  return (DoubleVec)vfmaq_f64((float64x2_t)z, (float64x2_t)x, (float64x2_t)y);
#else
  return z + x * y;
#endif
}

// float32 [R] . float32 [R] in double, of one row with several at once, whose sums do not wait for each other: wrong by
// less than 1e-13 of sum |a_r b_r|.
template <int Pairs>
inline void dots(const float* a, const float* const* b, int64_t r, double* out) {
  double lane[Pairs][8] = {};
  int64_t i = 0;
  if (r >= 8) {
    DoubleVec sum[Pairs][kDoubleVecs] = {};
    for (; i + 8 <= r; i += 8) {
#pragma GCC unroll 4
      for (int v = 0; v < kDoubleVecs; ++v) {
        const DoubleVec own = load_wide(a + i + v * kDoubles);
#pragma GCC unroll 4
        for (int p = 0; p < Pairs; ++p) sum[p][v] = add_product(own, load_wide(b[p] + i + v * kDoubles), sum[p][v]);
      }
    }
    __builtin_memcpy(lane, sum, sizeof lane);
  }
  for (int l = 0; i < r; ++i, ++l)
    for (int p = 0; p < Pairs; ++p) lane[p][l] += static_cast<double>(a[i]) * static_cast<double>(b[p][i]);
  for (int p = 0; p < Pairs; ++p)
    out[p] = ((lane[p][0] + lane[p][4]) + (lane[p][2] + lane[p][6])) +
             ((lane[p][1] + lane[p][5]) + (lane[p][3] + lane[p][7]));
}

inline double dot(const float* a, const float* b, int64_t r) {
  double out;
  dots<1>(a, &b, r, &out);
  return out;
}

// a . b[column(n)] for each n of `count`, while the rows of the next few are fetched.
template <class Column>
inline void dots_with(const float* a, const float* b, int64_t r, int64_t count, const Column& column, double* out) {
  int64_t n = 0;
  for (; n + kPairs <= count; n += kPairs) {
    const float* others[kPairs];
    for (int p = 0; p < kPairs; ++p) others[p] = b + column(n + p) * r;
    for (int64_t next = n + kPairs; next < count && next < n + 2 * kPairs; ++next)
      for (int64_t i = 0; i < r; i += 16) __builtin_prefetch(b + column(next) * r + i);
    dots<kPairs>(a, others, r, out + n);
  }
  for (; n < count; ++n) out[n] = dot(a, b + column(n) * r, r);
}

// The nearest number with float32's 24 significant bits, ties to even, in double's exponent range: float32 rounding
// that neither overflows nor underflows.
inline double round24(double x) {
  uint64_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  bits += 0x0FFFFFFFu + ((bits >> 29) & 1u);
  bits &= ~uint64_t{0x1FFFFFFF};
  __builtin_memcpy(&x, &bits, sizeof bits);
  return x;
}

// exp(x) for x <= 0, within 1e-12 of itself; 0 under -100. libm's own differs between machines.
inline double exp_negative(double x) {
  if (!(x > -100.0)) return x != x ? x : 0.0;
  const double n = static_cast<double>(static_cast<int64_t>(x * 1.4426950408889634 - 0.5));
  const double f = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  double p = 1.0 / 3628800 + f * (1.0 / 39916800);
  constexpr double kFactorials[] = {362880, 40320, 5040, 720, 120, 24, 6, 2, 1, 1};
  for (const double factorial : kFactorials) p = p * f + 1.0 / factorial;
  const uint64_t bits = static_cast<uint64_t>(static_cast<int64_t>(n) + 1023) << 52;
  double power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return p * power;
}

// out[D] = sum_n weight[n] * x[row[n]], added in order of n.
inline void weighted_sum(const float* x, const int32_t* row, const float* weight, int count, int64_t d, float* out) {
  constexpr int kVecs = 4;
  int64_t c = 0;
  for (; c + kVecs * kLanes <= d; c += kVecs * kLanes) {
    Vec sum[kVecs] = {};
    for (int n = 0; n < count; ++n) {
      const float* from = x + row[n] * d + c;
      const Vec w = broadcast(weight[n]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[v] += w * load(from + v * kLanes);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(out + c + v * kLanes, sum[v]);
  }
  for (; c < d; ++c) {
    float sum = 0;
    for (int n = 0; n < count; ++n) sum += weight[n] * x[row[n] * d + c];
    out[c] = sum;
  }
}

inline float dot_values(const float* x, const float* y, int64_t d) {
  Vec sum[kFloatVecs] = {};
  int64_t c = 0;
  for (; c + 16 <= d; c += 16) {
#pragma GCC unroll 4
    for (int v = 0; v < kFloatVecs; ++v) sum[v] += load(x + c + v * kLanes) * load(y + c + v * kLanes);
  }
  float lane[16];
  __builtin_memcpy(lane, sum, sizeof lane);
  for (int l = 0; c < d; ++c, ++l) lane[l] += x[c] * y[c];
  for (int half = 8; half; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

// The slot at which `row` stands in `list`, or -1.
inline int find(const int32_t* list, int64_t k, int32_t row) {
  int slot = -1;
  for (int t = 0; t < k; ++t)
    if (list[t] == row) slot = t;
  return slot;
}

inline bool contains(const int32_t* list, int64_t k, int32_t row) {
  int32_t any = 0;
  for (int64_t t = 0; t < k; ++t) any |= list[t] == row;
  return any != 0;
}

// Slots of row i whose column chose i as well. Returns how many.
inline int reciprocal(const Attention& x, int64_t i, int32_t* slots) {
  const int32_t* own = x.neighbors + i * x.k;
  int count = 0;
  for (int s = 0; s < x.k; ++s) {
    const int32_t j = own[s];
    if (j >= 0 && contains(x.neighbors + j * x.k, x.k, static_cast<int32_t>(i))) slots[count++] = s;
  }
  return count;
}

// Softmax over the slots of row i, into weights[0..count-1].
inline void softmax(const Attention& x, int64_t i, const int32_t* slots, int count, double* weights) {
  const int32_t* own = x.neighbors + i * x.k;
  dots_with(x.a + i * x.r, x.b, x.r, count, [&](int64_t n) { return own[slots[n]]; }, weights);
  double most = 0;
  for (int n = 0; n < count; ++n) {
    weights[n] *= x.scale;
    if (n == 0 || weights[n] > most) most = weights[n];
  }
  double sum = 0;
  for (int n = 0; n < count; ++n) sum += weights[n] = exp_negative(weights[n] - most);
  for (int n = 0; n < count; ++n) weights[n] /= sum;
}

// The factor of j's weight for i.
inline double camera_factor(const Attention& x, int64_t i, int64_t j) {
  return x.cameras && x.cameras[i] >= 0 && x.cameras[i] == x.cameras[j] ? x.camera_factor : 1.0;
}

// Gated: slots of row i that count, and sigmoid(scale * (score - (t_i + t_j) / 2)) of each. Returns how many.
inline int gate(const Attention& x, int64_t i, int32_t* slots, double* weights) {
  constexpr double kFinite = 3.4028234663852886e38;
  const int32_t* own = x.neighbors + i * x.k;
  int others = 0, count = 0;
  for (int s = 0; s < x.k; ++s)
    if (own[s] >= 0 && own[s] != i) slots[others++] = s;
  dots_with(x.a + i * x.r, x.b, x.r, others, [&](int64_t n) { return own[slots[n]]; }, weights);
  for (int n = 0; n < others; ++n) {
    const double mine = weights[n] - x.t[i], theirs = weights[n] - x.t[own[slots[n]]];
    if (!(__builtin_fabs(mine) <= kFinite && __builtin_fabs(theirs) <= kFinite)) continue;
    const double z = x.scale * (0.5 * mine + 0.5 * theirs), power = exp_negative(-__builtin_fabs(z));
    slots[count] = slots[n];
    weights[count++] = (z < 0 ? power : 1.0) / (1.0 + power);
  }
  return count;
}

// Slots of row i that count, and their weights but for the camera factor. Returns how many.
inline int weigh(const Attention& x, int64_t i, int32_t* slots, double* weights) {
  if (x.t) return gate(x, i, slots, weights);
  const int count = reciprocal(x, i, slots);
  softmax(x, i, slots, count, weights);
  return count;
}

// Gated: grad b, grad v and grad t. Who reads column j stands in `readers`.
inline void gate_backward_columns(const Attention& x, const AttentionGradient& g, int64_t begin, int64_t end) {
  const Readers& from = g.readers;
  for (int64_t j = begin; j < end; ++j) {
    const int64_t first = from.start[j], count = from.start[j + 1] - first;
    weighted_sum(x.a, from.row + first, from.slope + first, static_cast<int>(count), x.r, g.gb + j * x.r);
    weighted_sum(g.gy, from.row + first, from.weight + first, static_cast<int>(count), x.d, g.gv + j * x.d);
    double slope = 0;
    for (int64_t n = first; n < first + count; ++n) slope += from.slope[n];
    for (int64_t s = j * x.k; s < (j + 1) * x.k; ++s)
      if (x.neighbors[s] >= 0) slope += g.slope[s];
    g.gt[j] -= static_cast<float>(0.5 * slope);  // half of each pair's goes to either threshold
  }
}

}  // namespace

void score(const float* a, const float* b, int64_t r, const int32_t* columns, int64_t count, double* out) {
  dots_with(a, b, r, count, [&](int64_t n) { return columns[n]; }, out);
  for (int64_t n = 0; n < count; ++n) out[n] = round24(out[n]);
}

void attend(const Attention& x, int64_t begin, int64_t end, float* y, const Scratch& scratch) {
  int32_t* slots = scratch.slots;
  for (int64_t i = begin; i < end; ++i) {
    const int32_t* own = x.neighbors + i * x.k;
    const int count = weigh(x, i, slots, scratch.weights);
    for (int n = 0; n < count; ++n) {
      slots[n] = own[slots[n]];
      scratch.shares[n] = static_cast<float>(scratch.weights[n] * camera_factor(x, i, slots[n]));
    }
    weighted_sum(x.v, slots, scratch.shares, count, x.d, y + i * x.d);
  }
}

void join(const float* x, float factor, const float* y, int64_t d, float* out) {
  for (int64_t c = 0; c < d; ++c) out[c] = x[c] + factor * y[c];
  const float length = __builtin_sqrtf(dot_values(out, out, d)), by = length > 1e-12f ? length : 1e-12f;
  for (int64_t c = 0; c < d; ++c) out[c] /= by;
}

// Weights and slopes of each row's slots, and grad a.
void attend_backward_rows(const Attention& x, const AttentionGradient& g, int64_t begin, int64_t end,
                          const Scratch& scratch) {
  int32_t* slots = scratch.slots;
  for (int64_t i = begin; i < end; ++i) {
    const int32_t* own = x.neighbors + i * x.k;
    float* weight = g.weight + i * x.k;
    float* slope = g.slope + i * x.k;
    for (int s = 0; s < x.k; ++s) weight[s] = slope[s] = 0;
    const int count = weigh(x, i, slots, scratch.weights);
    double mean = 0;
    for (int n = 0; n < count; ++n) {
      const float p = static_cast<float>(scratch.weights[n] * camera_factor(x, i, own[slots[n]]));
      const float toward = dot_values(g.gy + i * x.d, x.v + own[slots[n]] * x.d, x.d);
      weight[slots[n]] = p;
      slope[slots[n]] = toward;
      mean += static_cast<double>(p) * toward;
    }
    for (int n = 0; n < count; ++n) {
      const int s = slots[n];
      const double toward = x.t ? (1.0 - scratch.weights[n]) * slope[s] : slope[s] - mean;
      slope[s] = static_cast<float>(x.scale * weight[s] * toward);
      scratch.shares[n] = slope[s];
      slots[n] = own[s];
    }
    weighted_sum(x.b, slots, scratch.shares, count, x.r, g.ga + i * x.r);
  }
}

// grad b and grad v. Reciprocity is symmetric: the rows that reach column j are the ones in j's own list, so each
// column gathers in the order of its list and no two threads write to one place.
void attend_backward_columns(const Attention& x, const AttentionGradient& g, int64_t begin, int64_t end,
                             const Scratch& scratch) {
  if (x.t) return gate_backward_columns(x, g, begin, end);
  int32_t* rows = scratch.slots;
  for (int64_t j = begin; j < end; ++j) {
    const int32_t* own = x.neighbors + j * x.k;
    float* slope = scratch.shares;
    float* weight = scratch.shares + x.k;
    int count = 0;
    for (int s = 0; s < x.k; ++s) {
      const int32_t i = own[s];
      const int slot = i < 0 ? -1 : find(x.neighbors + i * x.k, x.k, static_cast<int32_t>(j));
      if (slot < 0) continue;
      rows[count] = i;
      slope[count] = g.slope[i * x.k + slot];
      weight[count++] = g.weight[i * x.k + slot];
    }
    weighted_sum(x.a, rows, slope, count, x.r, g.gb + j * x.r);
    weighted_sum(g.gy, rows, weight, count, x.d, g.gv + j * x.d);
  }
}

}  // namespace NFORMER_ISA
}  // namespace nformer
