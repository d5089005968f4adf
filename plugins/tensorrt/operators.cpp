#include "operators.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <mutex>

#include "nformer/kernels.h"
#include "version.h"

namespace nformer::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

#if NFORMER_TENSORRT >= 806
std::mutex finder_lock;
nvinfer1::ILoggerFinder* finder = nullptr;
#endif

bool real(DataType type) { return type == DataType::kFLOAT || type == DataType::kHALF; }

Type kernel_type(DataType type) { return type == DataType::kHALF ? Type::kFloat16 : Type::kFloat32; }

std::string shape_of(Dims const& dims) {
  std::string text = "[";
  for (int32_t i = 0; i < dims.nbDims; ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(dims.d[i]);
  }
  return text + "]";
}

// Compares shapes by letters: "HNR" gives each letter a size where it first stands and wants the same size later.
class Letters {
 public:
  explicit Letters(char const* who) : who_(who) {}

  bool match(char const* name, Dims const& dims, char const* letters) {
    bool fits = dims.nbDims == static_cast<int32_t>(std::strlen(letters));
    for (int32_t i = 0; fits && i < dims.nbDims; ++i) {
      int64_t& size = size_[static_cast<unsigned char>(letters[i])];
      int64_t const got = dims.d[i];
      size = size < 0 ? got : size;
      fits = got >= 0 && size == got;
    }
    if (!fits) {
      std::string expected;
      for (char const* letter = letters; *letter != '\0'; ++letter) {
        int64_t const size = size_[static_cast<unsigned char>(*letter)];
        expected += (letter == letters ? "" : ", ") + std::string(1, *letter);
        expected += size < 0 ? "" : "=" + std::to_string(size);
      }
      report(who_, std::string(name) + ": got shape " + shape_of(dims) + ", expected [" + expected + "].");
    }
    return fits;
  }
  int64_t of(char letter) const { return size_[static_cast<unsigned char>(letter)]; }
  void set(char letter, int64_t size) { size_[static_cast<unsigned char>(letter)] = size; }

 private:
  char const* who_;
  std::vector<int64_t> size_ = std::vector<int64_t>(256, -1);
};

bool linear(char const* who, Desc const& desc, char const* name, DataType expected) {
  if (desc.format == nvinfer1::TensorFormat::kLINEAR && desc.type == expected) {
    return true;
  }
  report(who, std::string(name) + ": got type " + std::to_string(static_cast<int>(desc.type)) + " in format " +
                  std::to_string(static_cast<int>(desc.format)) + ", expected type " +
                  std::to_string(static_cast<int>(expected)) + " in linear format.");
  return false;
}

PluginField const* find(nvinfer1::PluginFieldCollection const& fields, char const* name) {
  for (int32_t i = 0; i < fields.nbFields; ++i) {
    if (fields.fields[i].name != nullptr && std::strcmp(fields.fields[i].name, name) == 0) {
      return &fields.fields[i];
    }
  }
  return nullptr;
}

// Reads a float32 attribute that a node may have; false: refused, and reported why.
bool read_float(char const* who, nvinfer1::PluginFieldCollection const& fields, char const* name, float& value) {
  PluginField const* const given = find(fields, name);
  if (given == nullptr || given->data == nullptr || given->length == 0) {
    return true;
  }
  if (given->length != 1 || given->type != PluginFieldType::kFLOAT32) {
    report(who, std::string(name) + ": got another type, expected one float32. Export the model again.");
    return false;
  }
  value = *static_cast<float const*>(given->data);
  if (std::isinf(value)) {
    report(who, std::string(name) + ": got infinity, expected a finite number.");
    return false;
  }
  return true;
}

bool ranks(char const* who, nvinfer1::DimsExprs const* inputs, int32_t count) {
  for (int32_t i = 0; i < count; ++i) {
    int32_t const expected = i < 4 ? 3 : 6 - i;  // t [H, N], cameras [N]
    if (inputs[i].nbDims != expected) {
      report(who, "input " + std::to_string(i) + ": got " + std::to_string(inputs[i].nbDims) +
                      " dimensions, expected " + std::to_string(expected) + ". Add the head axis.");
      return false;
    }
  }
  return true;
}

}  // namespace

void report(char const* who, std::string const& what) noexcept {
  try {
    std::string const line = "nformer::" + std::string(who) + ": " + what;
#if NFORMER_TENSORRT >= 806
    std::lock_guard<std::mutex> const hold(finder_lock);
    nvinfer1::ILogger* const logger = finder != nullptr ? finder->findLogger() : nullptr;
    if (logger != nullptr) {
      logger->log(nvinfer1::ILogger::Severity::kERROR, line.c_str());
      return;
    }
#endif
    std::fprintf(stderr, "%s\n", line.c_str());
  } catch (...) {
    std::fputs("nformer: out of memory while reporting an error\n", stderr);
  }
}

#if NFORMER_TENSORRT >= 806
void set_logger_finder(nvinfer1::ILoggerFinder* given) noexcept {
  std::lock_guard<std::mutex> const hold(finder_lock);
  finder = given;
}
#endif

// ---- RowTopK ----

std::vector<Attribute> RowTopK::attributes() { return {{"k", PluginFieldType::kINT32}}; }

bool RowTopK::read(nvinfer1::PluginFieldCollection const& fields) {
  PluginField const* const given = find(fields, "k");
  if (given == nullptr || given->data == nullptr || given->length != 1) {
    report(kName, "k: got none, expected one integer. Export the model again.");
    return false;
  }
  int64_t k = 0;
#if NFORMER_TENSORRT >= 1000
  if (given->type == PluginFieldType::kINT64) {
    k = *static_cast<int64_t const*>(given->data);
  } else
#endif
      if (given->type == PluginFieldType::kINT32) {
    k = *static_cast<int32_t const*>(given->data);
  }
  if (k < 1 || k > kMaxNeighbors) {
    report(kName, "k: got " + std::to_string(k) + ", expected an integer 1.." + std::to_string(kMaxNeighbors) + ".");
    return false;
  }
  k_ = static_cast<int32_t>(k);
  return true;
}

std::vector<PluginField> RowTopK::fields() const { return {{"k", &k_, PluginFieldType::kINT32, 1}}; }

std::string RowTopK::identity() const { return "k=" + std::to_string(k_); }

DataType RowTopK::output_type(DataType const*) const { return DataType::kINT32; }

bool RowTopK::output_shape(nvinfer1::DimsExprs const* inputs, int32_t count, nvinfer1::DimsExprs& output,
                           nvinfer1::IExprBuilder& builder) const {
  if (!ranks(kName, inputs, count)) {
    return false;
  }
  output.nbDims = 3;
  output.d[0] = inputs[0].d[0];
  output.d[1] = inputs[0].d[1];
  output.d[2] = builder.constant(k_);
  return output.d[2] != nullptr;
}

bool RowTopK::takes_type(int32_t place, DataType const* types, int32_t) const {
  switch (place) {
    case 0:
      return real(types[0]);
    case 1:
      return types[1] == types[0];
    default:
      return place == 2 && types[2] == DataType::kINT32;
  }
}

bool RowTopK::check(Desc const* inputs, int32_t, Desc const* output) const {
  Letters letters(kName);
  letters.set('k', k_);
  return real(inputs[0].type) && linear(kName, inputs[0], "a", inputs[0].type) &&
         linear(kName, inputs[1], "b", inputs[0].type) && linear(kName, *output, "neighbors", DataType::kINT32) &&
         letters.match("a", inputs[0].dims, "HNR") && letters.match("b", inputs[1].dims, "HMR") &&
         letters.match("neighbors", output->dims, "HNk");
}

cudaError_t RowTopK::run(Desc const* inputs, int32_t, void const* const* data, void* output,
                         cudaStream_t stream) const {
  Dims const& a = inputs[0].dims;
  return row_top_k({data[0], data[1], static_cast<int32_t*>(output), a.d[0], a.d[1], inputs[1].dims.d[1], a.d[2], k_,
                    kernel_type(inputs[0].type)},
                   stream);
}

// ---- ReciprocalNeighborAttention ----

std::vector<Attribute> ReciprocalNeighborAttention::attributes() {
  return {{"scale", PluginFieldType::kFLOAT32}, {"camera_factor", PluginFieldType::kFLOAT32}};
}

bool ReciprocalNeighborAttention::read(nvinfer1::PluginFieldCollection const& fields) {
  scale_ = std::numeric_limits<float>::quiet_NaN();  // the default: 1 / sqrt(D)
  camera_factor_ = 1.0F;
  return read_float(kName, fields, "scale", scale_) && read_float(kName, fields, "camera_factor", camera_factor_);
}

std::vector<PluginField> ReciprocalNeighborAttention::fields() const {
  return {{"scale", &scale_, PluginFieldType::kFLOAT32, 1},
          {"camera_factor", &camera_factor_, PluginFieldType::kFLOAT32, 1}};
}

std::string ReciprocalNeighborAttention::identity() const {
  char digits[64];  // 9 digits tell any two apart
  std::snprintf(digits, sizeof(digits), "scale=%.9g, camera_factor=%.9g", static_cast<double>(scale_),
                static_cast<double>(camera_factor_));
  return std::isnan(scale_) ? "scale=default" + std::string(std::strchr(digits, ',')) : digits;
}

DataType ReciprocalNeighborAttention::output_type(DataType const* type_of_inputs) const { return type_of_inputs[2]; }

bool ReciprocalNeighborAttention::output_shape(nvinfer1::DimsExprs const* inputs, int32_t count,
                                               nvinfer1::DimsExprs& output, nvinfer1::IExprBuilder&) const {
  if (!ranks(kName, inputs, count)) {
    return false;
  }
  output = inputs[2];
  return true;
}

bool ReciprocalNeighborAttention::takes_type(int32_t place, DataType const* types, int32_t count) const {
  if (place == 0) {
    return real(types[0]);
  }
  if (place < 0 || place > count) {
    return false;
  }
  bool const whole = place < count && (place == 3 || place == 5), threshold = place < count && place == 4;
  return types[place] == (whole ? DataType::kINT32 : threshold ? DataType::kFLOAT : types[0]);
}

bool ReciprocalNeighborAttention::check(Desc const* inputs, int32_t count, Desc const* output) const {
  DataType const type = inputs[0].type;
  Letters letters(kName);
  bool const types = real(type) && linear(kName, inputs[0], "a", type) && linear(kName, inputs[1], "b", type) &&
                     linear(kName, inputs[2], "v", type) && linear(kName, inputs[3], "neighbors", DataType::kINT32) &&
                     (count < 5 || linear(kName, inputs[4], "t", DataType::kFLOAT)) &&
                     (count < 6 || linear(kName, inputs[5], "cameras", DataType::kINT32)) &&
                     linear(kName, *output, "y", type);
  return types && letters.match("a", inputs[0].dims, "HNR") && letters.match("b", inputs[1].dims, "HNR") &&
         letters.match("v", inputs[2].dims, "HND") && letters.match("y", output->dims, "HND") &&
         letters.match("neighbors", inputs[3].dims, inputs[3].dims.d[0] == 1 ? "1NK" : "HNK") &&
         (count < 5 || letters.match("t", inputs[4].dims, inputs[4].dims.d[0] == 1 ? "1N" : "HN")) &&
         (count < 6 || letters.match("cameras", inputs[5].dims, "N"));
}

cudaError_t ReciprocalNeighborAttention::run(Desc const* inputs, int32_t count, void const* const* data, void* output,
                                             cudaStream_t stream) const {
  Dims const &a = inputs[0].dims, &v = inputs[2].dims, &neighbors = inputs[3].dims;
  float const scale = std::isnan(scale_) ? 1.0F / std::sqrt(static_cast<float>(v.d[2])) : scale_;
  AttentionTask task{data[0], data[1], data[2], static_cast<int32_t const*>(data[3]), output,
                     a.d[0],  a.d[1],  a.d[2],  v.d[2], neighbors.d[0], neighbors.d[2], scale,
                     kernel_type(inputs[0].type)};
  if (count > 4) {
    task.t = static_cast<float const*>(data[4]);
    task.threshold_heads = inputs[4].dims.d[0];
  }
  if (count > 5) {
    task.cameras = static_cast<int32_t const*>(data[5]);
    task.camera_factor = camera_factor_;
  }
  return reciprocal_neighbor_attention(task, stream);
}

}  // namespace nformer::trt
