// An order of points in which near ones stand near: the leaves of a k-d tree, left to right.
#pragma once

#include <cstdint>
#include <vector>

namespace nformer {

// x [count, R]. Splits at the middle of the axis along which `weight` [R] times the spread is largest, down to runs of
// `leaf` points; every run but the last is full, and runs 2^p * i .. 2^p * (i + 1) - 1 form one subtree.
std::vector<int32_t> kd_order(const float* x, int64_t count, int64_t r, const float* weight, int leaf, int threads);

}  // namespace nformer
