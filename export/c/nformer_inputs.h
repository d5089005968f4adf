/* What a program without Python needs to feed backbone.onnx and nformer.onnx as this package does: the resize of crops,
   their normalization, and the landmarks of the head. C99 and C++; no allocation but in nformer_resize.
   tests/unit/targets/test_c_inputs.py compiles this file and compares every function with the package's own. */
#ifndef NFORMER_INPUTS_H
#define NFORMER_INPUTS_H

#include <stdint.h>
#include <stdlib.h>

/* ---- landmarks: rule "splitmix64-fisher-yates-v1" ---- */

static uint64_t nformer_splitmix64(uint64_t *state) {
  uint64_t z = (*state += UINT64_C(0x9E3779B97F4A7C15));
  z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
  z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
  return z ^ (z >> 31);
}

/* The upper 64 bits of a * b, for b below 2^32. */
static uint64_t nformer_multiply_high(uint64_t a, uint32_t b) {
  return ((a >> 32) * b + (((a & UINT64_C(0xFFFFFFFF)) * b) >> 32)) >> 32;
}

/* out [layers][count]: indices below num_images (at least 1, below 2^31), for the seed in the manifest (`landmark_seed`).
   touched: room for 2 * count places. */
static inline void nformer_landmarks(uint32_t num_images, int layers, int count, uint64_t seed, int32_t *out, int32_t *touched) {
  for (int layer = 0; layer < layers; ++layer, out += count) {
    uint64_t state = seed + ((uint64_t)layer << 32) + num_images;
    int used = 0;
    for (int i = 0; i < count; ++i) {
      if ((uint32_t)i >= num_images) { /* more landmarks than images: the order repeats */
        out[i] = out[i - num_images];
        continue;
      }
      int32_t j = i + (int32_t)nformer_multiply_high(nformer_splitmix64(&state), num_images - i);
      int32_t at_i = i, at_j = j;
      int place = used;
      for (int t = 0; t < used; ++t) {
        if (touched[2 * t] == i) at_i = touched[2 * t + 1];
        if (touched[2 * t] == j) at_j = touched[2 * t + 1], place = t;
      }
      out[i] = at_j;
      touched[2 * place] = j;
      touched[2 * place + 1] = at_i;
      used += place == used;
    }
  }
}

/* ---- images ---- */

typedef struct {
  int first, taps;
  int32_t *weights; /* of 1 << 22 */
} nformer_window;

/* Pillow's bilinear filter along one axis: a triangle as wide as an output pixel is in the input, at least one. */
static int nformer_windows(int in, int out, nformer_window *windows) {
  const double scale = (double)in / out, wide = scale < 1 ? 1 : scale;
  for (int x = 0; x < out; ++x) {
    const double center = (x + 0.5) * scale;
    int first = (int)(center - wide + 0.5), end = (int)(center + wide + 0.5);
    double sum = 0;
    if (first < 0) first = 0;
    if (end > in) end = in;
    double *exact = (double *)malloc((size_t)(end - first) * sizeof *exact);
    int32_t *weights = (int32_t *)malloc((size_t)(end - first) * sizeof *weights);
    windows[x].first = first, windows[x].taps = end - first, windows[x].weights = weights;
    if (!exact || !weights) return free(exact), -1;
    for (int t = 0; t < end - first; ++t) {
      double far = (first + t - center + 0.5) * (1 / wide);
      if (far < 0) far = -far;
      sum += exact[t] = far < 1 ? 1 - far : 0;
    }
    for (int t = 0; t < end - first; ++t) weights[t] = (int32_t)(exact[t] / sum * (1 << 22) + 0.5);
    free(exact);
  }
  return 0;
}

/* One pass over lines of `in` pixels, each `step` bytes after the other; three channels. */
static void nformer_pass(const uint8_t *from, uint8_t *to, int lines, size_t from_line, size_t to_line, size_t from_step,
                         size_t to_step, int out, const nformer_window *windows) {
  for (int line = 0; line < lines; ++line, from += from_line, to += to_line)
    for (int x = 0; x < out; ++x)
      for (int c = 0; c < 3; ++c) {
        int32_t sum = 1 << 21;
        for (int t = 0; t < windows[x].taps; ++t)
          sum += from[(size_t)(windows[x].first + t) * from_step + c] * windows[x].weights[t];
        sum >>= 22;
        to[(size_t)x * to_step + c] = (uint8_t)(sum < 0 ? 0 : sum > 255 ? 255 : sum);
      }
}

/* pixels [height][width][3] to out [out_height][out_width][3], to the bit as Pillow 13's BILINEAR: down before across
   where the height shrinks by more than the width. Returns 0, or -1 where memory ran out. */
static inline int nformer_resize(const uint8_t *pixels, int width, int height, uint8_t *out, int out_width, int out_height) {
  const int down_first = height > out_height && (int64_t)height * out_width > (int64_t)width * out_height;
  const size_t in_line = 3 * (size_t)width, out_line = 3 * (size_t)out_width;
  nformer_window *across = (nformer_window *)calloc((size_t)out_width, sizeof *across);
  nformer_window *down = (nformer_window *)calloc((size_t)out_height, sizeof *down);
  uint8_t *half = (uint8_t *)malloc(down_first ? in_line * out_height : out_line * height);
  int failed = !across || !down || !half || nformer_windows(width, out_width, across) ||
               nformer_windows(height, out_height, down);
  if (!failed && down_first) {
    nformer_pass(pixels, half, width, 3, 3, in_line, in_line, out_height, down);
    nformer_pass(half, out, out_height, in_line, out_line, 3, 3, out_width, across);
  } else if (!failed) {
    nformer_pass(pixels, half, height, in_line, out_line, 3, 3, out_width, across);
    nformer_pass(half, out, out_width, 3, 3, out_line, out_line, out_height, down);
  }
  for (int x = 0; across && x < out_width; ++x) free(across[x].weights);
  for (int y = 0; down && y < out_height; ++y) free(down[y].weights);
  free(across), free(down), free(half);
  return failed ? -1 : 0;
}

/* pixels [height][width][3], RGB, to the backbone's input [3][height][width]; mean and std as in the manifest, whose
   order of channels they have (bgr: 1 where it says BGR). */
static inline void nformer_normalize(const uint8_t *pixels, int width, int height, const float mean[3], const float std[3], int bgr,
                              float *out) {
  const size_t plane = (size_t)width * height;
  for (int c = 0; c < 3; ++c) {
    const float scale = 1.0f / (255.0f * std[c]), shift = mean[c] / std[c];
    for (size_t i = 0; i < plane; ++i) out[c * plane + i] = pixels[3 * i + (bgr ? 2 - c : c)] * scale - shift;
  }
}

#endif
