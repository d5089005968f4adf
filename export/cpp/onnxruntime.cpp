#include <onnxruntime_cxx_api.h>

#include "reid.h"

namespace {
struct OnnxRuntime : Backbone {
  explicit OnnxRuntime(const Model &model) : model_(model) {
    const auto &file = model.files.at("backbone.onnx");
    session_ = Ort::Session(env_, file.data(), file.size(), Ort::SessionOptions());
  }

  std::vector<float> embed(const std::vector<char> &images, int count) override {
    const auto &to = model_.preprocess;
    const std::vector<int64_t> shape = to.nhwc ? std::vector<int64_t>{count, to.height, to.width, 3}
                                               : std::vector<int64_t>{count, 3, to.height, to.width};
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    const auto type = to.pixels ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    auto *data = const_cast<char *>(images.data());
    const auto input = Ort::Value::CreateTensor(memory, data, images.size(), shape.data(), shape.size(), type);
    const char *in = "images", *out = "features";
    const auto found = session_.Run(Ort::RunOptions(), &in, &input, 1, &out, 1);
    const float *rows = found[0].GetTensorData<float>();
    return {rows, rows + size_t(count) * size_t(model_.features)};
  }

  const Model &model_;
  Ort::Env env_{ORT_LOGGING_LEVEL_WARNING, "reid"};
  Ort::Session session_{nullptr};
};
}  // namespace

std::unique_ptr<Backbone> open_backbone(const Model &model) { return std::make_unique<OnnxRuntime>(model); }
