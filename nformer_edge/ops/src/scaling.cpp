#include <algorithm>
#include <cmath>
#include <mutex>

#include "row_top_k.h"
#include "threads.h"

namespace nformer {
namespace {

double power_for(const float* x, int64_t count, int threads) {
  float most = 0;
  std::mutex guard;
  parallel_ranges(threads, count, 1 << 18, [&](int64_t begin, int64_t end) {
    float own = 0;
    for (int64_t i = begin; i < end; ++i) own = std::max(own, std::fabs(x[i]));
    const std::lock_guard<std::mutex> lock(guard);
    most = std::max(most, own);
  });
  int exponent = 0;
  std::frexp(most, &exponent);
  return most > 0 ? std::ldexp(1.0, -exponent) : 1.0;
}

}  // namespace

Scaling find_scaling(const RowTopK& x, int threads) {
  Scaling scaling;
  scaling.a = power_for(x.a, x.n * x.r, threads);
  scaling.b = x.symmetric ? scaling.a : power_for(x.b, x.m * x.r, threads);
  return scaling;
}

}  // namespace nformer
