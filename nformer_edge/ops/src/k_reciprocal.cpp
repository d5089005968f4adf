#include "k_reciprocal.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "threads.h"

namespace nformer {
namespace {

constexpr int64_t kEncodeRows = 64;
constexpr int64_t kJaccardRows = 8;

struct Weight {
  int32_t column;
  float value;
};
using Encoding = std::vector<Weight>;  // columns ascend

// The nearest half precision number, ties to even, of a number up to 65504. Under 2^-14 the steps are 2^-24, which
// is what adding and taking away a number whose own last digit is 2^-24 leaves.
float half(float x) {
  const float small = (x + 0.75f) - 0.75f;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0xFFFu + (bits >> 13 & 1u)) & ~0x1FFFu;
  float large;
  std::memcpy(&large, &bits, sizeof large);
  return std::fabs(x) < 6.103515625e-05f ? small : large;
}

float half(double x) {
  const double small = (x + 402653184.0) - 402653184.0;
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x1FFFFFFFFFFu + (bits >> 42 & 1u)) & ~uint64_t{0x3FFFFFFFFFF};
  double large;
  std::memcpy(&large, &bits, sizeof large);
  return static_cast<float>(std::fabs(x) < 6.103515625e-05 ? small : large);
}

class Encoder {
 public:
  Encoder(const Table& table, const KReciprocal& x, int threads)
      : table_(table), x_(x), threads_(threads), lists_(x.lists, x.lists + x.n * x.k) {
    for (int64_t i = 0; i < x.n; ++i) lead(static_cast<int32_t>(i));
  }

  std::vector<Encoding> run() const {
    std::vector<Encoding> own(x_.n), expanded(x_.n);
    of_each([&](int32_t i) { own[i] = encode(i); });
    of_each([&](int32_t i) { expanded[i] = average(own, i); });
    return expanded;
  }

 private:
  const int32_t* list(int32_t i) const { return lists_.data() + i * x_.k; }

  // An image leads its own list, also where its rounded score with another is the larger.
  void lead(int32_t i) {
    int32_t* own = lists_.data() + i * x_.k;
    int32_t* place = std::find(own, own + x_.k - 1, i);
    std::move_backward(own, place, place + 1);
    own[0] = i;
  }

  // Equal images have one encoding, that of the first: its list has all that chose each other.
  template <class Work>
  void of_each(const Work& work) const {
    parallel_ranges(threads_, x_.n, kEncodeRows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        if (x_.same[i] == i) work(static_cast<int32_t>(i));
    });
  }

  bool chose(int32_t j, int64_t places, int32_t i) const {
    int found = 0;
    for (int64_t s = 0; s < places; ++s) found |= list(j)[s] == i;
    return found;
  }

  // Those among the first `places` of i's list that have i among theirs.
  void reciprocal(int32_t i, int64_t places, std::vector<int32_t>& out) const {
    out.clear();
    for (int64_t s = 0; s < places; ++s)
      if (chose(list(i)[s], places, i)) out.push_back(list(i)[s]);
  }

  Encoding encode(int32_t i) const {
    std::vector<int32_t> own, theirs;
    reciprocal(i, x_.k, own);
    std::vector<int32_t> columns = own;
    for (const int32_t j : own) {
      reciprocal(j, x_.half, theirs);
      int64_t shared = 0;
      for (const int32_t t : theirs) shared += std::find(own.begin(), own.end(), t) != own.end();
      if (3 * shared > 2 * static_cast<int64_t>(theirs.size())) columns.insert(columns.end(), theirs.begin(), theirs.end());
    }
    std::sort(columns.begin(), columns.end());
    columns.erase(std::unique(columns.begin(), columns.end()), columns.end());
    std::vector<double> weights(columns.size());
    table_.score(x_.unit + i * x_.d, x_.unit, x_.d, columns.data(), static_cast<int64_t>(columns.size()), weights.data());
    double total = 0;
    for (double& weight : weights) total += weight = std::exp(-2 * (1 - weight) / x_.farthest[i]);
    Encoding encoding(columns.size());
    for (size_t n = 0; n < columns.size(); ++n) encoding[n] = {columns[n], half(weights[n] / total)};
    return encoding;
  }

  // Over the nearest images, itself among them. Sums of a few half precision numbers are exact in double.
  Encoding average(const std::vector<Encoding>& encodings, int32_t i) const {
    Encoding all;
    for (int64_t s = 0; s < x_.expand; ++s) {
      const Encoding& other = encodings[x_.same[list(i)[s]]];
      all.insert(all.end(), other.begin(), other.end());
    }
    std::sort(all.begin(), all.end(), [](const Weight& p, const Weight& q) { return p.column < q.column; });
    Encoding merged;
    for (auto from = all.begin(); from != all.end();) {
      const int32_t column = from->column;
      double sum = 0;
      for (; from != all.end() && from->column == column; ++from) sum += from->value;
      merged.push_back({column, half(sum / static_cast<double>(x_.expand))});
    }
    return merged;
  }

  const Table& table_;
  const KReciprocal& x_;
  int threads_;
  std::vector<int32_t> lists_;
};

// The gallery's encodings by column: which gallery images have a weight there.
struct Inverted {
  std::vector<int64_t> starts;
  std::vector<Weight> weights;  // with the gallery image in place of the column

  Inverted(const KReciprocal& x, const std::vector<Encoding>& encodings) : starts(x.n + 1) {
    for (int64_t i = x.queries; i < x.n; ++i)
      for (const Weight& w : encodings[x.same[i]]) ++starts[w.column + 1];
    for (int64_t c = 0; c < x.n; ++c) starts[c + 1] += starts[c];
    weights.resize(starts[x.n]);
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t i = x.queries; i < x.n; ++i)
      for (const Weight& w : encodings[x.same[i]])
        weights[next[w.column]++] = {static_cast<int32_t>(i - x.queries), w.value};
  }
};

}  // namespace

void k_reciprocal(const Table& table, const KReciprocal& x, float share, float* distances, int threads) {
  const std::vector<Encoding> encodings = Encoder(table, x, threads).run();
  const Inverted inverted(x, encodings);
  const int64_t gallery = x.n - x.queries;
  parallel_ranges(threads, x.queries, kJaccardRows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* shared = distances + i * gallery;  // sum of the smaller weights, column by column
      std::fill(shared, shared + gallery, 0.0f);
      for (const Weight& own : encodings[x.same[i]])
        for (int64_t n = inverted.starts[own.column]; n < inverted.starts[own.column + 1]; ++n) {
          const Weight& other = inverted.weights[n];
          shared[other.column] = half(shared[other.column] + std::min(own.value, other.value));
        }
      for (int64_t g = 0; g < gallery; ++g)  // 1 - sum of the smaller over sum of the larger
        shared[g] = half(share * half(1 - half(shared[g] / half(2 - shared[g]))));
    }
  });
}

}  // namespace nformer
