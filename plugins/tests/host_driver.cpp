// The row logic on the CPU, as a C library for tests/unit/plugins: the kernels' blocks and warps become loops, and the
// choice of instantiation is the kernels' own. The signatures are those of nformer/kernels.h without a stream.
#include <cstdint>
#include <vector>

#include "host_warp.h"
#include "nformer/dispatch.h"

namespace nformer {
namespace {

struct Source {
  void const* data;
  bool half;

  float at(int64_t i) const {
    return half ? static_cast<float>(static_cast<Half const*>(data)[i]) : static_cast<float const*>(data)[i];
  }
  Source from(int64_t i) const { return {static_cast<char const*>(data) + i * (half ? 2 : 4), half}; }
};

template <int kFactors>
void stage_tile(std::vector<float>& tile, Source const& b, int64_t first, int64_t columns, int factors) {
  for (int place = 0; place < kTileColumns; ++place) {
    stage_column<kFactors>(tile.data(), place, b, first + place, columns, factors);
  }
}

template <int kFactors, int kSlots>
void short_rows(Source const& a, Source const& b, int32_t* neighbors, int64_t rows, int64_t columns, int factors,
                int k) {
  using Rows = RowBlock<HostWarp, kFactors, kSlots>;
  std::vector<float> tile(size_t{kFactors} * kTileColumns);
  for (int64_t first_row = 0; first_row < rows; first_row += Rows::kRows) {
    Rows block;
    block.load(a, first_row, rows, factors);
    if (columns >= kSampleFrom) {
      typename Rows::Sample sample;
      sample.clear();
      for (int64_t first = 0; first < columns; first += int64_t{kSampleStride} * kTileColumns) {
        stage_tile<kFactors>(tile, b, first, columns, factors);
        block.look(tile.data(), sample);
      }
      block.learn(sample, k);
    }
    block.clear();
    for (int64_t first = 0; first < columns; first += kTileColumns) {
      stage_tile<kFactors>(tile, b, first, columns, factors);
      block.scan(tile.data(), first, k);
    }
    block.write(neighbors, first_row, rows, k);
  }
}

float score(Source const& a, Source const& b, int64_t i, int64_t j, int factors) {
  float sum = 0.0F;
  for (int r = 0; r < factors; ++r) {
    sum = std::fmaf(a.at(i * factors + r), b.at(j * factors + r), sum);
  }
  return sum;
}

template <int kSlots>
void long_rows(Source const& a, Source const& b, int32_t* neighbors, int64_t rows, int64_t columns, int factors,
               int k) {
  std::vector<float> scores(size_t{kLongRowsPerWarp} * kScoreColumns);
  for (int64_t first_row = 0; first_row < rows; first_row += kLongRowsPerWarp) {
    LongRowBlock<HostWarp, kSlots> block;
    block.clear();
    for (int64_t first = 0; first < columns; first += kScoreColumns) {
      for (int64_t i = 0; i < kLongRowsPerWarp; ++i) {
        for (int64_t j = 0; j < kScoreColumns; ++j) {
          bool const there = first_row + i < rows && first + j < columns;
          scores[i * kScoreColumns + j] = there ? score(a, b, first_row + i, first + j, factors) : NAN;
        }
      }
      block.take(scores.data(), first, k);
    }
    block.write(neighbors, first_row, rows, k);
  }
}

template <class T>
void attention(void const* a, void const* b, void const* v, int32_t const* neighbors, void* y, int64_t heads,
               int64_t rows, int64_t factors, int64_t size, int64_t neighbor_heads, int64_t count, float scale,
               float const* t, int64_t threshold_heads, int32_t const* cameras, float camera_factor, bool words) {
  for (int64_t h = 0; h < heads; ++h) {
    int64_t const from = h * rows * factors, values = h * rows * size;
    AttentionHead<T> const head{static_cast<T const*>(a) + from,
                                static_cast<T const*>(b) + from,
                                static_cast<T const*>(v) + values,
                                neighbors + (neighbor_heads == 1 ? 0 : h * rows * count),
                                static_cast<T*>(y) + values,
                                rows,
                                static_cast<int>(factors),
                                static_cast<int>(size),
                                static_cast<int>(count),
                                scale,
                                t == nullptr ? nullptr : t + (threshold_heads == 1 ? 0 : h * rows),
                                cameras,
                                camera_factor,
                                words};
    for (int64_t row = 0; row < rows; ++row) {
      with_slots(count, [&](auto slots) {
        attend<HostWarp, decltype(slots)::value>(head, row);
      });
    }
  }
}

}  // namespace
}  // namespace nformer

extern "C" void host_row_top_k(void const* a, void const* b, int32_t* neighbors, int64_t heads, int64_t rows,
                               int64_t columns, int64_t factors, int64_t k, int32_t half) {
  using namespace nformer;
  for (int64_t h = 0; h < heads; ++h) {
    Source const left = Source{a, half != 0}.from(h * rows * factors);
    Source const right = Source{b, half != 0}.from(h * columns * factors);
    int32_t* out = neighbors + h * rows * k;
    auto const count = static_cast<int>(factors), most = static_cast<int>(k);
    with_slots(k, [&](auto slots) {
      with_factors(factors, [&](auto held) {
        constexpr int kSlots = decltype(slots)::value, kFactors = decltype(held)::value;
        if constexpr (kFactors == kLongFactors) {
          long_rows<kSlots>(left, right, out, rows, columns, count, most);
        } else {
          short_rows<kFactors, kSlots>(left, right, out, rows, columns, count, most);
        }
      });
    });
  }
}

extern "C" void host_reciprocal_neighbor_attention(void const* a, void const* b, void const* v,
                                                   int32_t const* neighbors, void* y, int64_t heads, int64_t rows,
                                                   int64_t factors, int64_t size, int64_t neighbor_heads,
                                                   int64_t count, float scale, float const* t,
                                                   int64_t threshold_heads, int32_t const* cameras,
                                                   float camera_factor, int32_t half, int32_t words) {
  auto const run = half != 0 ? nformer::attention<nformer::Half> : nformer::attention<float>;
  run(a, b, v, neighbors, y, heads, rows, factors, size, neighbor_heads, count, scale, t, threshold_heads, cameras,
      camera_factor, words != 0);
}

// Round trips of every half, for the test of the test.
extern "C" void host_half_round_trip(uint16_t const* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = nformer::Half::from(static_cast<float>(nformer::Half{from[i]})).bits;
  }
}
extern "C" void host_to_half(float const* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = nformer::Half::from(from[i]).bits;
  }
}
