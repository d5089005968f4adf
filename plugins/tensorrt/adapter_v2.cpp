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
  explicit Plugin(Operator const& op, int32_t inputs = Operator::kInputs) : op_(op), inputs_(inputs) {}

  // IPluginV2
  AsciiChar const* getPluginType() const noexcept override { return Operator::kName; }
  AsciiChar const* getPluginVersion() const noexcept override { return "1"; }
  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t initialize() noexcept override { return 0; }
  void terminate() noexcept override {}
  void destroy() noexcept override { delete this; }
  // An engine keeps the attributes, 4 bytes each, and the number of inputs.
  size_t getSerializationSize() const noexcept override { return bytes(); }
  void serialize(void* buffer) const noexcept override {
    char* to = static_cast<char*>(buffer);
    for (PluginField const& field : op_.fields()) {
      std::memcpy(to, field.data, 4);
      to += 4;
    }
    std::memcpy(to, &inputs_, 4);
  }
  void setPluginNamespace(AsciiChar const*) noexcept override {}
  AsciiChar const* getPluginNamespace() const noexcept override { return ""; }

  // IPluginV2Ext
  DataType getOutputDataType(int32_t, DataType const* inputs, int32_t count) const noexcept override {
    return counts(count, 1) ? op_.output_type(inputs) : DataType::kFLOAT;
  }

  // IPluginV2DynamicExt
  IPluginV2DynamicExt* clone() const noexcept override {
    try {
      return new Plugin(op_, inputs_);
    } catch (std::exception const& error) {
      report(Operator::kName, error.what());
      return nullptr;
    }
  }
  DimsExprs getOutputDimensions(int32_t output, DimsExprs const* inputs, int32_t count,
                                IExprBuilder& builder) noexcept override {
    DimsExprs shape{};
    shape.nbDims = -1;  // this interface's way to say no
    if (output == 0 && counts(count, 1) && !op_.output_shape(inputs, count, shape, builder)) {
      shape.nbDims = -1;
    }
    return shape;
  }
  bool supportsFormatCombination(int32_t place, Desc const* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override {
    if (!counts(inputs, outputs) || place < 0 || place > inputs) {
      return false;
    }
    std::array<DataType, Operator::kMostInputs + 1> types{};
    for (int32_t i = 0; i <= place; ++i) {
      types[static_cast<size_t>(i)] = tensors[i].type;
    }
    return tensors[place].format == TensorFormat::kLINEAR && op_.takes_type(place, types.data(), inputs);
  }
  void configurePlugin(DynamicPluginTensorDesc const*, int32_t inputs, DynamicPluginTensorDesc const*,
                       int32_t outputs) noexcept override {
    inputs_ = counts(inputs, outputs) ? inputs : inputs_;
  }
  size_t getWorkspaceSize(Desc const*, int32_t, Desc const*, int32_t) const noexcept override { return 0; }
  int32_t enqueue(Desc const* inputs, Desc const* outputs, void const* const* data, void* const* results, void*,
                  cudaStream_t stream) noexcept override {
    if (!checked(inputs, outputs)) {
      return -1;
    }
    cudaError_t const error = op_.run(inputs, inputs_, data, results[0], stream);
    if (error != cudaSuccess) {
      report(Operator::kName, cudaGetErrorString(error));
    }
    return static_cast<int32_t>(error);
  }

  static size_t bytes() { return 4 * (Operator::attributes().size() + 1); }

 private:
  static bool counts(int32_t inputs, int32_t outputs) {
    if (inputs >= Operator::kInputs && inputs <= Operator::kMostInputs && outputs == 1) {
      return true;
    }
    report(Operator::kName, "got " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) +
                                " outputs, expected " + std::to_string(Operator::kInputs) + " to " +
                                std::to_string(Operator::kMostInputs) + " and 1.");
    return false;
  }
  bool checked(Desc const* inputs, Desc const* outputs) const noexcept {
    try {
      return op_.check(inputs, inputs_, outputs);
    } catch (std::exception const& error) {
      report(Operator::kName, error.what());
      return false;
    }
  }

  Operator op_;
  int32_t inputs_;
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
    return fields != nullptr ? create(*fields, Operator::kInputs) : nullptr;
  }
  // What an engine kept goes through the same checks as a node's attributes.
  IPluginV2* deserializePlugin(AsciiChar const*, void const* data, size_t bytes) noexcept override {
    if (data == nullptr || bytes != Plugin<Operator>::bytes()) {
      report(Operator::kName, "got " + std::to_string(bytes) + " bytes from the engine, expected " +
                                  std::to_string(Plugin<Operator>::bytes()) + ". Rebuild it.");
      return nullptr;
    }
    std::vector<int32_t> kept(bytes / 4);
    std::memcpy(kept.data(), data, bytes);
    std::vector<PluginField> given = names_;
    for (size_t i = 0; i < given.size(); ++i) {
      given[i].data = &kept[i];
    }
    PluginFieldCollection const fields{static_cast<int32_t>(given.size()), given.data()};
    return create(fields, kept.back());
  }

 private:
  static IPluginV2* create(PluginFieldCollection const& fields, int32_t inputs) noexcept {
    try {
      Operator op;
      return op.read(fields) ? new Plugin<Operator>(op, inputs) : nullptr;
    } catch (std::exception const& error) {
      report(Operator::kName, error.what());
      return nullptr;
    }
  }

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
