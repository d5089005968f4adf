// IPluginV2DynamicExt for TensorRT 8.5 and 8.6. Thin: what the operators are stands in operators.cpp.
#include "version.h"

#if NV_TENSORRT_MAJOR < 10

#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "operators.h"

namespace nformer::trt {
namespace {

using namespace nvinfer1;

template <class Operator>
class Plugin final : public IPluginV2DynamicExt {
 public:
  explicit Plugin(Operator const& op) : op_(op) {}

  // IPluginV2
  AsciiChar const* getPluginType() const noexcept override { return Operator::kName; }
  AsciiChar const* getPluginVersion() const noexcept override { return "1"; }
  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t initialize() noexcept override { return 0; }
  void terminate() noexcept override {}
  void destroy() noexcept override { delete this; }
  // An engine keeps the one attribute as its 4 bytes.
  size_t getSerializationSize() const noexcept override { return kBytes; }
  void serialize(void* buffer) const noexcept override { std::memcpy(buffer, op_.field().data, kBytes); }
  void setPluginNamespace(AsciiChar const*) noexcept override {}
  AsciiChar const* getPluginNamespace() const noexcept override { return ""; }

  // IPluginV2Ext
  DataType getOutputDataType(int32_t, DataType const* inputs, int32_t count) const noexcept override {
    return counts(count, 1) ? op_.output_type(inputs) : DataType::kFLOAT;
  }

  // IPluginV2DynamicExt
  IPluginV2DynamicExt* clone() const noexcept override {
    try {
      return new Plugin(op_);
    } catch (std::exception const& error) {
      report(Operator::kName, error.what());
      return nullptr;
    }
  }
  DimsExprs getOutputDimensions(int32_t output, DimsExprs const* inputs, int32_t count,
                                IExprBuilder& builder) noexcept override {
    DimsExprs shape{};
    shape.nbDims = -1;  // this interface's way to say no
    if (output == 0 && counts(count, 1) && !op_.output_shape(inputs, shape, builder)) {
      shape.nbDims = -1;
    }
    return shape;
  }
  bool supportsFormatCombination(int32_t place, Desc const* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override {
    if (!counts(inputs, outputs) || place < 0 || place > Operator::kInputs) {
      return false;
    }
    std::array<DataType, Operator::kInputs + 1> types{};
    for (int32_t i = 0; i <= place; ++i) {
      types[static_cast<size_t>(i)] = tensors[i].type;
    }
    return tensors[place].format == TensorFormat::kLINEAR && op_.takes_type(place, types.data());
  }
  void configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*,
                       int32_t) noexcept override {}
  size_t getWorkspaceSize(Desc const*, int32_t, Desc const*, int32_t) const noexcept override { return 0; }
  int32_t enqueue(Desc const* inputs, Desc const* outputs, void const* const* data, void* const* results, void*,
                  cudaStream_t stream) noexcept override {
    if (!checked(inputs, outputs)) {
      return -1;
    }
    cudaError_t const error = op_.run(inputs, data, results[0], stream);
    if (error != cudaSuccess) {
      report(Operator::kName, cudaGetErrorString(error));
    }
    return static_cast<int32_t>(error);
  }

  static constexpr size_t kBytes = 4;

 private:
  static bool counts(int32_t inputs, int32_t outputs) {
    if (inputs == Operator::kInputs && outputs == 1) {
      return true;
    }
    report(Operator::kName, "got " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) +
                                " outputs, expected " + std::to_string(Operator::kInputs) + " and 1.");
    return false;
  }
  bool checked(Desc const* inputs, Desc const* outputs) const noexcept {
    try {
      return op_.check(inputs, outputs);
    } catch (std::exception const& error) {
      report(Operator::kName, error.what());
      return false;
    }
  }

  Operator op_;
};

template <class Operator>
class Creator final : public IPluginCreator {
 public:
  Creator() {
    for (Attribute const& attribute : Operator::attributes()) {
      names_.emplace_back(attribute.name, nullptr, attribute.type, 1);
    }
    fields_.nbFields = static_cast<int32_t>(names_.size());
    fields_.fields = names_.data();
  }
  AsciiChar const* getPluginName() const noexcept override { return Operator::kName; }
  AsciiChar const* getPluginVersion() const noexcept override { return "1"; }
  PluginFieldCollection const* getFieldNames() noexcept override { return &fields_; }
  void setPluginNamespace(AsciiChar const*) noexcept override {}
  AsciiChar const* getPluginNamespace() const noexcept override { return ""; }

  IPluginV2* createPlugin(AsciiChar const*, PluginFieldCollection const* fields) noexcept override {
    try {
      Operator op;
      return fields != nullptr && op.read(*fields) ? new Plugin<Operator>(op) : nullptr;
    } catch (std::exception const& error) {
      report(Operator::kName, error.what());
      return nullptr;
    }
  }
  // What an engine kept goes through the same checks as a node's attributes.
  IPluginV2* deserializePlugin(AsciiChar const* name, void const* data, size_t bytes) noexcept override {
    if (data == nullptr || bytes != Plugin<Operator>::kBytes) {
      report(Operator::kName, "got " + std::to_string(bytes) + " bytes from the engine, expected 4. Rebuild it.");
      return nullptr;
    }
    alignas(4) std::array<unsigned char, Plugin<Operator>::kBytes> kept{};
    std::memcpy(kept.data(), data, kept.size());
    PluginField const field{names_[0].name, kept.data(), names_[0].type, 1};
    PluginFieldCollection const fields{1, &field};
    return createPlugin(name, &fields);
  }

 private:
  std::vector<PluginField> names_;
  PluginFieldCollection fields_{};
};

IPluginCreator* const* creators(int32_t& count) {
  static Creator<RowTopK> row_top_k;
  static Creator<ReciprocalNeighborAttention> attention;
  static IPluginCreator* const all[] = {&row_top_k, &attention};
  count = 2;
  return all;
}

}  // namespace
}  // namespace nformer::trt

// For a process that opened the library itself: registers the creators that are not there yet. 0 on success.
NFORMER_EXPORT int32_t nformer_register_plugins() noexcept {
  nvinfer1::IPluginRegistry* const registry = nformer::trt::registry();
  if (registry == nullptr) {
    return -1;
  }
  int32_t count = 0;
  auto* const* const all = nformer::trt::creators(count);
  for (int32_t i = 0; i < count; ++i) {
    bool const known = registry->getPluginCreator(all[i]->getPluginName(), "1", "") != nullptr;
    if (!known && !registry->registerCreator(*all[i], "")) {
      return -1;
    }
  }
  return 0;
}

#if NFORMER_TENSORRT >= 806
// What IPluginRegistry::loadLibrary, and so `trtexec --dynamicPlugins`, looks for.
NFORMER_EXPORT nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& count) {
  return nformer::trt::creators(count);
}
NFORMER_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { nformer::trt::set_logger_finder(finder); }
#else
// 8.5 has no loadLibrary: `trtexec --plugins` merely opens the library, which therefore registers itself.
static int32_t const registered = nformer_register_plugins();
#endif

#endif
