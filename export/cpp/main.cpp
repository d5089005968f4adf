// reid QUERY.jpg GALLERY.jpg ...   ranks the gallery's images for the query, by cosine
// reid --features FILE IMAGE.jpg ...   writes the features as float32, row by row
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <numeric>
#include <stdexcept>

#include "reid.h"

static std::vector<float> embed(const std::vector<std::string> &paths, const Model &model) {
  const auto backbone = open_backbone(model);
  const int batch = 8;
  std::vector<float> rows;
  for (size_t start = 0; start < paths.size(); start += batch) {
    std::vector<char> images;
    const size_t end = std::min(paths.size(), start + batch);
    for (size_t i = start; i < end; ++i) {
      const std::vector<char> image = load_image(paths[i], model.preprocess);
      images.insert(images.end(), image.begin(), image.end());
    }
    const std::vector<float> found = backbone->embed(images, int(end - start));
    rows.insert(rows.end(), found.begin(), found.end());
  }
  return rows;
}

// To length 1. A row that is not finite, or zero, has no direction.
static void normalize(float *row, int size, const std::string &name) {
  const double length = std::sqrt(std::inner_product(row, row + size, row, 0.0));
  if (!(length > 0) || !std::isfinite(length)) throw std::runtime_error(name + ": a feature without a direction");
  for (int i = 0; i < size; ++i) row[i] = float(row[i] / length);
}

static int run(std::vector<std::string> given) {
  const bool store = given.size() > 2 && given[0] == "--features";
  if (given.size() < 2) throw std::runtime_error("usage: reid QUERY.jpg GALLERY.jpg ... | reid --features FILE IMAGE.jpg ...");
  const Model model = open_model(MODEL, MANIFEST_SHA256);
  const std::vector<std::string> paths(given.begin() + (store ? 2 : 0), given.end());
  std::vector<float> rows = embed(paths, model);
  const int size = model.features;
  if (store) {
    std::ofstream out(given[1], std::ios::binary);
    out.write(reinterpret_cast<const char *>(rows.data()), std::streamsize(rows.size() * sizeof(float)));
    return out.flush() ? 0 : throw std::runtime_error(given[1] + ": cannot be written");
  }
  std::vector<std::pair<float, size_t>> found;
  for (size_t i = 0; i < paths.size(); ++i) {
    normalize(&rows[i * size], size, paths[i]);
    if (i) found.emplace_back(std::inner_product(rows.begin(), rows.begin() + size, rows.begin() + i * size, 0.0), i);
  }
  std::stable_sort(found.begin(), found.end(), [](auto &a, auto &b) { return a.first > b.first; });
  for (size_t rank = 0; rank < found.size(); ++rank)
    std::printf("%4zu  %.4f  %s\n", rank + 1, found[rank].first, paths[found[rank].second].c_str());
  return 0;
}

int main(int count, char **arguments) try {
  return run({arguments + 1, arguments + count});
} catch (const std::exception &e) {
  std::fprintf(stderr, "reid: %s\n", e.what());
  return 1;
}
