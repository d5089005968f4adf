#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <turbojpeg.h>

#include "nformer_inputs.h"
#include "reid.h"

static const int64_t kMaxPixels = 64000000;  // as the package

// The orientation that EXIF names, 1 where it names none.
static int orientation(const std::vector<unsigned char> &file) {
  const auto at = [&](size_t i) -> unsigned { return i < file.size() ? file[i] : 0; };
  for (size_t i = 2; at(i) == 0xFF && at(i + 1) != 0xDA; i += 2 + (at(i + 2) << 8 | at(i + 3))) {
    const size_t tiff = i + 10;
    if (at(i + 1) != 0xE1 || tiff > file.size() || memcmp(&file[i + 4], "Exif\0\0", 6)) continue;
    const bool little = at(tiff) == 'I';
    const auto number = [&](size_t j, int bytes) {
      size_t value = 0;
      for (int b = 0; b < bytes; ++b) value |= size_t(at(little ? j + b : j + bytes - 1 - b)) << (8 * b);
      return value;
    };
    const size_t entries = tiff + number(tiff + 4, 4);
    for (size_t e = 0; e < number(entries, 2); ++e)
      if (number(entries + 2 + 12 * e, 2) == 0x0112) return int(number(entries + 10 + 12 * e, 2));
  }
  return 1;
}

std::vector<char> load_image(const std::string &path, const Preprocess &to) {
  std::ifstream stream(path, std::ios::binary);
  const std::vector<unsigned char> file{std::istreambuf_iterator<char>(stream), {}};
  const std::unique_ptr<void, int (*)(tjhandle)> decoder(tjInitDecompress(), tjDestroy);
  int width = 0, height = 0, sampling = 0, colors = 0;
  const auto failed = [&] { return std::runtime_error(path + ": " + tjGetErrorStr2(decoder.get())); };
  if (file.empty()) throw std::runtime_error(path + ": no such file, or an empty one");
  if (tjDecompressHeader3(decoder.get(), file.data(), file.size(), &width, &height, &sampling, &colors)) throw failed();
  if (int64_t(width) * height > kMaxPixels) throw std::runtime_error(path + ": too many pixels");
  if (orientation(file) > 1) throw std::runtime_error(path + ": lies on its side by EXIF; turn it first");
  std::vector<unsigned char> rgb(size_t(3) * width * height), small(size_t(3) * to.width * to.height);
  if (tjDecompress2(decoder.get(), file.data(), file.size(), rgb.data(), width, 0, height, TJPF_RGB, TJFLAG_ACCURATEDCT))
    throw failed();
  if (nformer_resize(rgb.data(), width, height, small.data(), to.width, to.height)) throw std::bad_alloc();

  const size_t plane = size_t(to.width) * to.height;
  std::vector<char> image(3 * plane * (to.pixels ? 1 : sizeof(float)));
  if (!to.pixels) {
    nformer_normalize(small.data(), to.width, to.height, to.mean, to.std, to.bgr, reinterpret_cast<float *>(image.data()));
    return image;
  }
  for (size_t i = 0; i < plane; ++i)
    for (size_t c = 0; c < 3; ++c) image[to.nhwc ? 3 * i + c : c * plane + i] = char(small[3 * i + (to.bgr_in ? 2 - c : c)]);
  return image;
}
