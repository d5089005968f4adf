#include <openvino/openvino.hpp>

#include "reid.h"

namespace {
struct OpenVINO : Backbone {
  explicit OpenVINO(const Model &model) : model_(model) {
    const auto &file = model.files.at("backbone.onnx");
    ov::Core core;
    // By default a CPU that has bfloat16 computes in it: cosine 0.998 to float32 (docs/deploy.md).
    const auto exact = ov::hint::inference_precision(ov::element::f32);
    request_ = core.compile_model(std::string(file.begin(), file.end()), ov::Tensor(), "CPU", exact).create_infer_request();
  }

  std::vector<float> embed(const std::vector<char> &images, int count) override {
    const auto &to = model_.preprocess;
    const size_t n = size_t(count), height = size_t(to.height), width = size_t(to.width);
    const ov::Shape shape = to.nhwc ? ov::Shape{n, height, width, 3} : ov::Shape{n, 3, height, width};
    auto *data = const_cast<char *>(images.data());
    request_.set_input_tensor(ov::Tensor(to.pixels ? ov::element::u8 : ov::element::f32, shape, data));
    request_.infer();
    const ov::Tensor features = request_.get_output_tensor();
    return {features.data<const float>(), features.data<const float>() + features.get_size()};
  }

  const Model &model_;
  ov::InferRequest request_;
};
}  // namespace

std::unique_ptr<Backbone> open_backbone(const Model &model) { return std::make_unique<OpenVINO>(model); }
