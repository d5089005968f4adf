// IPluginV3 for TensorRT 10 and 11. Thin: what the operators are stands in operators.cpp.
#include "version.h"

#if NV_TENSORRT_MAJOR >= 10

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "operators.h"

namespace nformer::trt {
namespace {

using namespace nvinfer1;

template <class Operator>
class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
 public:
  explicit Plugin(Operator const& op, int32_t inputs = Operator::kInputs)
      : op_(op), inputs_(inputs), identity_(op.identity()) {}

  // IPluginV3
  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE:
        return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD:
        return static_cast<IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME:
        return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  IPluginV3* clone() noexcept override {
    try {
      return new Plugin(op_, inputs_);
    } catch (std::exception const& error) {
      report(Operator::kName, error.what());
      return nullptr;
    }
  }

  // IPluginV3OneCore
  AsciiChar const* getPluginName() const noexcept override { return Operator::kName; }
  AsciiChar const* getPluginVersion() const noexcept override { return "1"; }
  AsciiChar const* getPluginNamespace() const noexcept override { return ""; }

  // IPluginV3OneBuild
  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t configurePlugin(DynamicPluginTensorDesc const*, int32_t inputs, DynamicPluginTensorDesc const*,
                          int32_t outputs) noexcept override {
    return take(inputs, outputs) ? 0 : -1;
  }
  int32_t getOutputDataTypes(DataType* outputs, int32_t output_count, DataType const* inputs,
                             int32_t input_count) const noexcept override {
    if (!counts(input_count, output_count)) {
      return -1;
    }
    outputs[0] = op_.output_type(inputs);
    return 0;
  }
  int32_t getOutputShapes(DimsExprs const* inputs, int32_t input_count, DimsExprs const*, int32_t, DimsExprs* outputs,
                          int32_t output_count, IExprBuilder& builder) noexcept override {
    return counts(input_count, output_count) && op_.output_shape(inputs, input_count, outputs[0], builder) ? 0 : -1;
  }
  bool supportsFormatCombination(int32_t place, DynamicPluginTensorDesc const* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override {
    if (!counts(inputs, outputs) || place < 0 || place > inputs) {
      return false;
    }
    std::array<DataType, Operator::kMostInputs + 1> types{};
    for (int32_t i = 0; i <= place; ++i) {
      types[static_cast<size_t>(i)] = tensors[i].desc.type;
    }
    return tensors[place].desc.format == TensorFormat::kLINEAR && op_.takes_type(place, types.data(), inputs);
  }
  char const* getTimingCacheID() noexcept override { return identity_.c_str(); }

  // IPluginV3OneRuntime
  int32_t onShapeChange(Desc const* inputs, int32_t input_count, Desc const* outputs,
                        int32_t output_count) noexcept override {
    return take(input_count, output_count) && checked(inputs, outputs) ? 0 : -1;
  }
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
  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }
  PluginFieldCollection const* getFieldsToSerialize() noexcept override {
    kept_ = op_.fields();
    fields_.nbFields = static_cast<int32_t>(kept_.size());
    fields_.fields = kept_.data();
    return &fields_;
  }

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
  // TensorRT says how many inputs there are before it enqueues, and not then.
  bool take(int32_t inputs, int32_t outputs) {
    bool const fits = counts(inputs, outputs);
    inputs_ = fits ? inputs : inputs_;
    return fits;
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
  std::string identity_;
  std::vector<PluginField> kept_;
  PluginFieldCollection fields_{};
};

template <class Operator>
class Creator final : public IPluginCreatorV3One {
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
  AsciiChar const* getPluginNamespace() const noexcept override { return ""; }
  PluginFieldCollection const* getFieldNames() noexcept override { return &fields_; }

  // The same fields come from an ONNX node (kBUILD) and from an engine (kRUNTIME).
  IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* fields, TensorRTPhase) noexcept override {
    try {
      Operator op;
      return fields != nullptr && op.read(*fields) ? new Plugin<Operator>(op) : nullptr;
    } catch (std::exception const& error) {
      report(Operator::kName, error.what());
      return nullptr;
    }
  }

 private:
  std::vector<PluginField> names_;
  PluginFieldCollection fields_{};
};

IPluginCreatorInterface* const* creators(int32_t& count) {
  static Creator<RowTopK> row_top_k;
  static Creator<ReciprocalNeighborAttention> attention;
  static IPluginCreatorInterface* const all[] = {&row_top_k, &attention};
  count = 2;
  return all;
}

}  // namespace
}  // namespace nformer::trt

// What IPluginRegistry::loadLibrary, and so `trtexec --dynamicPlugins`, looks for.
NFORMER_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  return nformer::trt::creators(count);
}

// For a process that opened the library itself: registers the creators that are not there yet. 0 on success.
NFORMER_EXPORT int32_t nformer_register_plugins() noexcept {
  nvinfer1::IPluginRegistry* const registry = nformer::trt::registry();
  if (registry == nullptr) {
    return -1;
  }
  int32_t count = 0;
  auto const* const all = nformer::trt::creators(count);
  for (int32_t i = 0; i < count; ++i) {
    auto* const creator = static_cast<nvinfer1::IPluginCreatorV3One*>(all[i]);
    bool const known = registry->getCreator(creator->getPluginName(), "1", "") != nullptr;
    if (!known && !registry->registerCreator(*all[i], "")) {
      return -1;
    }
  }
  return 0;
}

NFORMER_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { nformer::trt::set_logger_finder(finder); }

#endif
