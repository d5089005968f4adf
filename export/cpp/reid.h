// What the parts of this program know of each other.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

// What manifest.json says of the images that the backbone takes.
struct Preprocess {
  int height, width;
  float mean[3], std[3];
  bool bgr;           // the model's order of colors
  bool pixels;        // backbone takes uint8 and normalizes by itself
  bool nhwc, bgr_in;  // of those pixels
};

// A verified bundle or engine.
struct Model {
  Preprocess preprocess;
  int features;                                      // D
  std::map<std::string, std::vector<char>> files;    // the very bytes that were hashed
};

// Reads `folder` and hashes every file; throws std::runtime_error naming what does not match. `sha256` is that of manifest.json.
Model open_model(const std::string &folder, const std::string &sha256);

// One JPEG as the backbone takes it: float [3, H, W], or uint8 pixels. Throws for what is no whole JPEG, or lies on its side.
std::vector<char> load_image(const std::string &path, const Preprocess &preprocess);

// A runtime with the backbone in it.
struct Backbone {
  virtual ~Backbone() = default;
  // images: `count` one after the other, as load_image gives them; returns count x D.
  virtual std::vector<float> embed(const std::vector<char> &images, int count) = 0;
};

std::unique_ptr<Backbone> open_backbone(const Model &model);  // of openvino.cpp, onnxruntime.cpp or tensorrt.cpp
