// Both adapters without a GPU and without libnvinfer: TensorRT's side is played here, the kernels only note their task.
// Compiled by tests/unit/plugins against whatever TensorRT headers are found. Exit code 0: every check held.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

#include "nformer/kernels.h"
#include "operators.h"
#include "version.h"

using namespace nvinfer1;

// ---- what the library expects of others ----

namespace {
nformer::RowTopKTask seen_top_k;
nformer::AttentionTask seen_attention;
cudaError_t kernel_answer = cudaSuccess;
int failures = 0;

#define EXPECT(condition)                                                   \
  do {                                                                      \
    if (!(condition)) {                                                     \
      std::printf("line %d: not so: %s\n", __LINE__, #condition);           \
      ++failures;                                                           \
    }                                                                       \
  } while (false)

#if NFORMER_TENSORRT >= 806
class Logger final : public ILogger {
 public:
  void log(Severity, AsciiChar const* line) noexcept override { lines.emplace_back(line); }
  std::vector<std::string> lines;
};
Logger logger;

#if NV_TENSORRT_MAJOR >= 10
using Size = int64_t;
#else
using Size = int32_t;
#endif

class Constant final : public IDimensionExpr {
 public:
  explicit Constant(int64_t value) : answers_(value) { mImpl = &answers_; }

 private:
  struct Answers final : apiv::VDimensionExpr {
    explicit Answers(int64_t given) : value(static_cast<Size>(given)) {}
    bool isConstant() const override { return true; }
    Size getConstantValue() const override { return value; }
    virtual bool isSizeTensor() const { return false; }  // of TensorRT 10
    Size value;
  };
  Answers answers_;
};

class Builder final : public IExprBuilder {
 public:
  Builder() { mImpl = &answers_; }

 private:
  struct Answers final : apiv::VExprBuilder {
    IDimensionExpr const* constant(Size value) override { return new Constant(value); }
    IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&, IDimensionExpr const&) override {
      return nullptr;
    }
    virtual IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) {
      return nullptr;
    }
  };
  Answers answers_;
};

DimsExprs exprs(std::initializer_list<int64_t> sizes) {
  DimsExprs shape{};
  for (int64_t size : sizes) {
    shape.d[shape.nbDims++] = new Constant(size);
  }
  return shape;
}

bool same(DimsExprs const& shape, std::initializer_list<int64_t> sizes) {
  if (shape.nbDims != static_cast<int32_t>(sizes.size())) {
    return false;
  }
  int32_t i = 0;
  for (int64_t size : sizes) {
    if (shape.d[i++]->getConstantValue() != size) {
      return false;
    }
  }
  return true;
}

PluginTensorDesc desc(std::initializer_list<int64_t> sizes, DataType type,
                      TensorFormat format = TensorFormat::kLINEAR) {
  PluginTensorDesc tensor{};
  for (int64_t size : sizes) {
    tensor.dims.d[tensor.dims.nbDims++] = static_cast<std::remove_reference_t<decltype(tensor.dims.d[0])>>(size);
  }
  tensor.type = type;
  tensor.format = format;
  return tensor;
}
#endif
}  // namespace

namespace nformer {
cudaError_t row_top_k(RowTopKTask const& task, cudaStream_t) noexcept {
  seen_top_k = task;
  return kernel_answer;
}
cudaError_t reciprocal_neighbor_attention(AttentionTask const& task, cudaStream_t) noexcept {
  seen_attention = task;
  return kernel_answer;
}
}  // namespace nformer
extern "C" char const* cudaGetErrorString(cudaError_t) { return "the error's own words"; }
extern "C" IPluginRegistry* getPluginRegistry() noexcept { return nullptr; }

#if NFORMER_TENSORRT >= 806

// ---- one face for both versions ----

#if NV_TENSORRT_MAJOR >= 10

extern "C" IPluginCreatorInterface* const* getCreators(int32_t& count);
using AnyCreator = IPluginCreatorV3One;

AnyCreator* creator(int32_t i) {
  int32_t count = 0;
  auto const* const all = getCreators(count);
  EXPECT(count == 2);
  return static_cast<AnyCreator*>(all[i]);
}

struct Face {
  IPluginV3* plugin;
  explicit operator bool() const { return plugin != nullptr; }
  template <class X>
  X* as(PluginCapabilityType type) const {
    return static_cast<X*>(plugin->getCapabilityInterface(type));
  }
  IPluginV3OneBuild* build() const { return as<IPluginV3OneBuild>(PluginCapabilityType::kBUILD); }
  IPluginV3OneRuntime* runtime() const { return as<IPluginV3OneRuntime>(PluginCapabilityType::kRUNTIME); }
  std::string name() const { return as<IPluginV3OneCore>(PluginCapabilityType::kCORE)->getPluginName(); }
  DataType output_type(std::vector<DataType> const& in) const {
    DataType out{};
    EXPECT(build()->getOutputDataTypes(&out, 1, in.data(), static_cast<int32_t>(in.size())) == 0);
    return out;
  }
  DimsExprs output_shape(std::vector<DimsExprs> const& in) const {
    Builder builder;
    DimsExprs out{};
    int32_t const answer =
        build()->getOutputShapes(in.data(), static_cast<int32_t>(in.size()), nullptr, 0, &out, 1, builder);
    out.nbDims = answer == 0 ? out.nbDims : -1;
    return out;
  }
  bool supports(int32_t place, std::vector<PluginTensorDesc> const& tensors) const {
    std::vector<DynamicPluginTensorDesc> all(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      all[i].desc = tensors[i];
    }
    return build()->supportsFormatCombination(place, all.data(), static_cast<int32_t>(tensors.size()) - 1, 1);
  }
  int32_t enqueue(std::vector<PluginTensorDesc> const& in, PluginTensorDesc const& out, void const* const* data,
                  void* const* results) const {
    int32_t const shapes = runtime()->onShapeChange(in.data(), static_cast<int32_t>(in.size()), &out, 1);
    int32_t const answer = runtime()->enqueue(in.data(), &out, data, results, nullptr, nullptr);
    EXPECT((shapes == 0) == (answer != -1));
    return answer;
  }
  Face through_an_engine(AnyCreator* maker) const {
    return {maker->createPlugin("layer", runtime()->getFieldsToSerialize(), TensorRTPhase::kRUNTIME)};
  }
  std::string identity() const { return build()->getTimingCacheID(); }
  void configure(std::vector<PluginTensorDesc> const& in) const {
    EXPECT(build()->configurePlugin(nullptr, static_cast<int32_t>(in.size()), nullptr, 1) == 0);
  }
  Face copy() const { return {plugin->clone()}; }
};

Face make(AnyCreator* maker, PluginFieldCollection const& fields) {
  return {maker->createPlugin("layer", &fields, TensorRTPhase::kBUILD)};
}

#else

extern "C" IPluginCreator* const* getPluginCreators(int32_t& count);
using AnyCreator = IPluginCreator;

struct Face {
  IPluginV2DynamicExt* plugin;
  explicit operator bool() const { return plugin != nullptr; }
  std::string name() const { return plugin->getPluginType(); }
  DataType output_type(std::vector<DataType> const& in) const {
    return plugin->getOutputDataType(0, in.data(), static_cast<int32_t>(in.size()));
  }
  DimsExprs output_shape(std::vector<DimsExprs> const& in) const {
    Builder builder;
    return plugin->getOutputDimensions(0, in.data(), static_cast<int32_t>(in.size()), builder);
  }
  bool supports(int32_t place, std::vector<PluginTensorDesc> const& tensors) const {
    return plugin->supportsFormatCombination(place, tensors.data(), static_cast<int32_t>(tensors.size()) - 1, 1);
  }
  // As when an engine is built: this interface counts the inputs then, and the engine keeps the number.
  void configure(std::vector<PluginTensorDesc> const& in) const {
    plugin->configurePlugin(nullptr, static_cast<int32_t>(in.size()), nullptr, 1);
  }
  int32_t enqueue(std::vector<PluginTensorDesc> const& in, PluginTensorDesc const& out, void const* const* data,
                  void* const* results) const {
    return plugin->enqueue(in.data(), &out, data, results, nullptr, nullptr);
  }
  Face through_an_engine(AnyCreator* maker) const {
    std::vector<char> kept(plugin->getSerializationSize());
    plugin->serialize(kept.data());
    EXPECT(maker->deserializePlugin("layer", kept.data(), kept.size() - 1) == nullptr);
    return {static_cast<IPluginV2DynamicExt*>(maker->deserializePlugin("layer", kept.data(), kept.size()))};
  }
  Face copy() const { return {plugin->clone()}; }
};

AnyCreator* creator(int32_t i) {
  int32_t count = 0;
  auto* const* const all = getPluginCreators(count);
  EXPECT(count == 2);
  return all[i];
}

Face make(AnyCreator* maker, PluginFieldCollection const& fields) {
  return {static_cast<IPluginV2DynamicExt*>(maker->createPlugin("layer", &fields))};
}

#endif

// ---- the checks ----

constexpr DataType kF32 = DataType::kFLOAT, kF16 = DataType::kHALF, kI32 = DataType::kINT32;

class Finder final : public ILoggerFinder {
 public:
  ILogger* findLogger() override { return &logger; }
};
extern "C" void setLoggerFinder(ILoggerFinder* finder);
extern "C" int32_t nformer_register_plugins() noexcept;

bool said(char const* words) {
  bool found = false;
  for (auto const& line : logger.lines) {
    found = found || line.find(words) != std::string::npos;
  }
  logger.lines.clear();
  return found;
}

void check_row_top_k() {
  AnyCreator* const maker = creator(0);
  EXPECT(std::strcmp(maker->getPluginName(), "RowTopK") == 0);
  EXPECT(std::strcmp(maker->getPluginVersion(), "1") == 0);
  EXPECT(std::strcmp(maker->getPluginNamespace(), "") == 0);
  EXPECT(maker->getFieldNames()->nbFields == 1);
  EXPECT(std::strcmp(maker->getFieldNames()->fields[0].name, "k") == 0);

  for (int32_t wrong : {0, -1, 129}) {
    PluginField const field{"k", &wrong, PluginFieldType::kINT32, 1};
    EXPECT(!make(maker, {1, &field}));
    EXPECT(said("expected an integer 1..128"));
  }
  EXPECT(!make(maker, {0, nullptr}));
  EXPECT(said("k: got none"));

  int32_t const k = 20;
  PluginField const field{"k", &k, PluginFieldType::kINT32, 1};
  Face const first = make(maker, {1, &field});
  Face const kept = first.through_an_engine(maker);
  EXPECT(kept);
  Face const plugin = kept.copy();
  EXPECT(plugin.name() == "RowTopK");
#if NV_TENSORRT_MAJOR >= 10
  EXPECT(plugin.identity() == "k=20");
#endif
  EXPECT(plugin.output_type({kF16, kF16}) == kI32);
  EXPECT(same(plugin.output_shape({exprs({2, 100, 5}), exprs({2, 70, 5})}), {2, 100, 20}));
  EXPECT(plugin.output_shape({exprs({100, 5}), exprs({2, 70, 5})}).nbDims == -1);
  EXPECT(said("expected 3"));

  auto const tensors = [](DataType a, DataType b, DataType out, TensorFormat format = TensorFormat::kLINEAR) {
    return std::vector<PluginTensorDesc>{desc({2, 100, 5}, a), desc({2, 70, 5}, b, format), desc({2, 100, 20}, out)};
  };
  for (DataType type : {kF32, kF16}) {
    for (int32_t place : {0, 1, 2}) {
      EXPECT(plugin.supports(place, tensors(type, type, kI32)));
    }
  }
  EXPECT(!plugin.supports(0, tensors(DataType::kINT8, kF32, kI32)));
  EXPECT(!plugin.supports(1, tensors(kF32, kF16, kI32)));
  EXPECT(!plugin.supports(1, tensors(kF32, kF32, kI32, TensorFormat::kCHW4)));
  EXPECT(!plugin.supports(2, tensors(kF32, kF32, kF32)));

  int x = 0;
  void const* const data[] = {&x, &x};
  void* const results[] = {&x};
  auto const given = tensors(kF16, kF16, kI32);
  EXPECT(plugin.enqueue({given[0], given[1]}, given[2], data, results) == 0);
  EXPECT(seen_top_k.heads == 2 && seen_top_k.rows == 100 && seen_top_k.columns == 70 && seen_top_k.factors == 5);
  EXPECT(seen_top_k.k == 20 && seen_top_k.type == nformer::Type::kFloat16 && seen_top_k.neighbors == &x);
  EXPECT(plugin.enqueue({given[0], desc({2, 70, 6}, kF16)}, given[2], data, results) == -1);
  EXPECT(said("b: got shape [2, 70, 6], expected [H=2, M=70, R=5]"));
  EXPECT(plugin.enqueue({given[0], given[1]}, desc({2, 100, 21}, kI32), data, results) == -1);
  EXPECT(said("neighbors: got shape"));
  kernel_answer = cudaErrorIllegalAddress;
  EXPECT(plugin.enqueue({given[0], given[1]}, given[2], data, results) == cudaErrorIllegalAddress);
  EXPECT(said("the error's own words"));
  kernel_answer = cudaSuccess;
}

void check_attention() {
  AnyCreator* const maker = creator(1);
  EXPECT(std::strcmp(maker->getPluginName(), "ReciprocalNeighborAttention") == 0);
  EXPECT(std::strcmp(maker->getFieldNames()->fields[0].name, "scale") == 0);
  int x = 0;
  void const* const data[] = {&x, &x, &x, &x};
  void* const results[] = {&x};
  auto const tensors = [](DataType type, int64_t lists) {
    return std::vector<PluginTensorDesc>{desc({2, 100, 5}, type), desc({2, 100, 5}, type), desc({2, 100, 64}, type),
                                         desc({lists, 100, 20}, kI32), desc({2, 100, 64}, type)};
  };

  Face const plain = make(maker, {0, nullptr}).through_an_engine(maker);
  EXPECT(plain);
  auto all = tensors(kF32, 1);
  auto const in = [&all] { return std::vector<PluginTensorDesc>(all.begin(), all.end() - 1); };
  EXPECT(plain.enqueue(in(), all[4], data, results) == 0);
  EXPECT(seen_attention.scale == 0.125F);  // 1 / sqrt(64)
  EXPECT(seen_attention.neighbor_heads == 1 && seen_attention.count == 20 && seen_attention.size == 64);

  float const scale = -0.3F;
  PluginField const field{"scale", &scale, PluginFieldType::kFLOAT32, 1};
  Face const given = make(maker, {1, &field}).through_an_engine(maker).copy();
  all = tensors(kF16, 2);
  EXPECT(given.enqueue(in(), all[4], data, results) == 0);
  EXPECT(seen_attention.scale == scale && seen_attention.neighbor_heads == 2);
  EXPECT(seen_attention.type == nformer::Type::kFloat16);
#if NV_TENSORRT_MAJOR >= 10
  EXPECT(given.identity() != plain.identity());
#endif
  float const endless = std::numeric_limits<float>::infinity();
  PluginField const wrong{"scale", &endless, PluginFieldType::kFLOAT32, 1};
  EXPECT(!make(maker, {1, &wrong}));
  EXPECT(said("expected a finite number"));

  EXPECT(given.output_type({kF16, kF16, kF16, kI32}) == kF16);
  auto const lists = exprs({1, 100, 20});
  EXPECT(same(given.output_shape({exprs({2, 100, 5}), exprs({2, 100, 5}), exprs({2, 100, 64}), lists}), {2, 100, 64}));
  for (int32_t place = 0; place < 5; ++place) {
    EXPECT(given.supports(place, all));
  }
  all[3].type = kF16;
  EXPECT(!given.supports(3, all));
  all = tensors(kF32, 3);
  EXPECT(given.enqueue(in(), all[4], data, results) == -1);
  EXPECT(said("neighbors: got shape [3, 100, 20], expected [H=2, N=100, K]"));
}

void check_gate() {
  AnyCreator* const maker = creator(1);
  EXPECT(std::strcmp(maker->getFieldNames()->fields[1].name, "camera_factor") == 0);
  int x = 0, thresholds = 0, cameras = 0;
  void const* const data[] = {&x, &x, &x, &x, &thresholds, &cameras};
  void* const results[] = {&x};
  float const scale = 20.0F, factor = 0.5F;
  PluginField const fields[] = {{"scale", &scale, PluginFieldType::kFLOAT32, 1},
                                {"camera_factor", &factor, PluginFieldType::kFLOAT32, 1}};
  for (size_t count : {5U, 6U}) {
    auto const out = desc({2, 100, 64}, kF16);
    auto const inputs = [&](int64_t heads_of_t, int64_t rows) {
      std::vector<PluginTensorDesc> all{desc({2, 100, 5}, kF16),         desc({2, 100, 5}, kF16),
                                        desc({2, 100, 64}, kF16),        desc({1, 100, 20}, kI32),
                                        desc({heads_of_t, rows}, kF32), desc({rows}, kI32)};
      all.resize(count);
      return all;
    };
    Face const built = make(maker, {2, fields});
    built.configure(inputs(1, 100));
    Face const plugin = built.copy().through_an_engine(maker).copy();
    EXPECT(plugin.enqueue(inputs(2, 100), out, data, results) == 0);
    EXPECT(seen_attention.t == reinterpret_cast<float*>(&thresholds) && seen_attention.threshold_heads == 2);
    EXPECT(seen_attention.cameras == (count == 6 ? &cameras : nullptr));
    EXPECT(seen_attention.camera_factor == (count == 6 ? factor : 1.0F) && seen_attention.scale == scale);
    EXPECT(plugin.enqueue(inputs(1, 100), out, data, results) == 0);
    EXPECT(seen_attention.threshold_heads == 1);
    EXPECT(plugin.enqueue(inputs(1, 99), out, data, results) == -1);
    EXPECT(said("t: got shape [1, 99], expected [1=1, N=100]"));
    auto wrong = inputs(1, 100);
    wrong.push_back(out);
    for (int32_t place = 0; place <= static_cast<int32_t>(count); ++place) {
      EXPECT(plugin.supports(place, wrong));
    }
    wrong[4].type = kF16;
    EXPECT(!plugin.supports(4, wrong));
    std::vector<DimsExprs> shapes{exprs({2, 100, 5}), exprs({2, 100, 5}), exprs({2, 100, 64}), exprs({1, 100, 20}),
                                  exprs({1, 100}),    exprs({100})};
    shapes.resize(count);
    EXPECT(same(plugin.output_shape(shapes), {2, 100, 64}));
    shapes[4] = exprs({1, 100, 1});
    EXPECT(plugin.output_shape(shapes).nbDims == -1);
    EXPECT(said("input 4: got 3 dimensions, expected 2"));
    shapes.resize(3);
    EXPECT(plugin.output_shape(shapes).nbDims == -1);
    EXPECT(said("expected 4 to 6 and 1"));
  }
}

int main() {
  static Finder finder;
  setLoggerFinder(&finder);
  check_row_top_k();
  check_attention();
  check_gate();
  EXPECT(nformer_register_plugins() == -1);  // no registry in this process
  if (failures == 0) {
    std::printf("TensorRT %d.%d headers: every check held\n", NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR);
  }
  return failures == 0 ? 0 : 1;
}

#else

// 8.5 gives out no list of creators, so nothing can be asked of the library here; that it compiles is what is shown.
int main() {
  std::printf("TensorRT %d.%d headers: compiled\n", NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR);
  return failures;
}

#endif
