#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <openssl/evp.h>
#include <stdexcept>

#include "reid.h"

static std::vector<char> read(const std::string &path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": no such file");
  return {std::istreambuf_iterator<char>(file), {}};
}

static std::string sha256(const std::vector<char> &data) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned size = 0;
  if (!EVP_Digest(data.data(), data.size(), digest, &size, EVP_sha256(), nullptr)) throw std::runtime_error("no SHA-256");
  std::string text;
  for (unsigned i = 0; i < size; ++i) {
    char two[3];
    snprintf(two, sizeof two, "%02x", digest[i]);
    text += two;
  }
  return text;
}

static void require(const std::string &path, const std::vector<char> &data, const std::string &expected) {
  const std::string found = sha256(data);
  if (found != expected) throw std::runtime_error(path + ": sha256 " + found + ", expected " + expected);
}

Model open_model(const std::string &folder, const std::string &expected) {
  const std::string path = folder + "/manifest.json";
  const std::vector<char> text = read(path);
  require(path, text, expected);
  const auto manifest = nlohmann::json::parse(text);
  Model model;
  for (const auto &[name, file] : manifest.at("files").items()) {
    if (name.find('/') != std::string::npos || name == "..") throw std::runtime_error(path + ": file " + name);
    require(folder + "/" + name, model.files[name] = read(folder + "/" + name), file.at("sha256"));
  }
  const auto &given = manifest.at("preprocess");
  auto &to = model.preprocess;
  to.height = given.at("height"), to.width = given.at("width");
  for (int c = 0; c < 3; ++c) to.mean[c] = given.at("mean")[c], to.std[c] = given.at("std")[c];
  if (given.at("interpolation") != "bilinear") throw std::runtime_error(path + ": only bilinear images are made here");
  to.bgr = given.at("channels") == "BGR";
  const auto pixels = given.value("pixels", nlohmann::json());
  to.pixels = !pixels.is_null();
  to.nhwc = to.pixels && pixels.at("layout") == "NHWC", to.bgr_in = to.pixels && pixels.at("channels") == "BGR";
  model.features = manifest.at("model").at("backbone").at("features");
  return model;
}
