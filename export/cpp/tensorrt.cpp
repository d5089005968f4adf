#include <NvInfer.h>
#include <cstdio>
#include <cuda_runtime_api.h>
#include <stdexcept>

#include "reid.h"

namespace {
struct Log : nvinfer1::ILogger {
  void log(Severity severity, const char *text) noexcept override {
    if (severity <= Severity::kWARNING) std::fprintf(stderr, "%s\n", text);
  }
};

void check(bool done, const char *what) {
  if (!done) throw std::runtime_error(std::string("TensorRT: ") + what);
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

struct TensorRT : Backbone {
  explicit TensorRT(const Model &model) : model_(model) {
    const auto &file = model.files.at("backbone.engine");
    runtime_.reset(nvinfer1::createInferRuntime(log_));
    check(runtime_ != nullptr, "no runtime");
    engine_.reset(runtime_->deserializeCudaEngine(file.data(), file.size()));
    check(engine_ != nullptr, "the plan is of another version or GPU: build the engine here");
    context_.reset(engine_->createExecutionContext());
    check(context_ != nullptr, "no execution context");
  }

  ~TensorRT() override { cudaFree(input_), cudaFree(output_); }

  std::vector<float> embed(const std::vector<char> &images, int count) override {
    const auto &to = model_.preprocess;
    std::vector<float> features(size_t(count) * size_t(model_.features));
    const nvinfer1::Dims4 shape = to.nhwc ? nvinfer1::Dims4{count, to.height, to.width, 3}
                                          : nvinfer1::Dims4{count, 3, to.height, to.width};
    check(context_->setInputShape("images", shape), "more images than the engine's profile admits");
    check(cudaFree(input_)), check(cudaMalloc(&input_, images.size()));
    check(cudaFree(output_)), check(cudaMalloc(&output_, features.size() * sizeof(float)));
    check(cudaMemcpy(input_, images.data(), images.size(), cudaMemcpyHostToDevice));
    check(context_->setTensorAddress("images", input_), "no tensor images");
    check(context_->setTensorAddress("features", output_), "no tensor features");
    check(context_->enqueueV3(nullptr), "the plan did not run");
    check(cudaMemcpy(features.data(), output_, features.size() * sizeof(float), cudaMemcpyDeviceToHost));
    return features;
  }

  const Model &model_;
  Log log_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  void *input_ = nullptr, *output_ = nullptr;
};
}  // namespace

std::unique_ptr<Backbone> open_backbone(const Model &model) { return std::make_unique<TensorRT>(model); }
