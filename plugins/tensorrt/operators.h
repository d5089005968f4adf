// What both adapters say to TensorRT about the two operators: shapes, types, attributes, launches. No arithmetic.
// Only what is the same from TensorRT 8.5 to 11 is used here; the adapters add the interfaces of their version.
#pragma once

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <vector>

namespace nformer::trt {

// A tensor as TensorRT describes it to supportsFormatCombination and enqueue.
using Desc = nvinfer1::PluginTensorDesc;

// One attribute of an ONNX node, as the parser hands it over; and what goes into an engine.
struct Attribute {
  char const* name;
  nvinfer1::PluginFieldType type;
};

// k largest columns a row; docs/operators.md.
class RowTopK {
 public:
  static constexpr char const* kName = "RowTopK";
  static constexpr int32_t kInputs = 2, kMostInputs = 2;
  static std::vector<Attribute> attributes();

  // Reads the attributes of a node, or those of an engine. False: refused, and reported why.
  bool read(nvinfer1::PluginFieldCollection const& fields);
  std::vector<nvinfer1::PluginField> fields() const;  // of 4 bytes each
  std::string identity() const;  // tells two layers apart in a timing cache

  // `count` inputs, kInputs to kMostInputs, wherever they are given.
  nvinfer1::DataType output_type(nvinfer1::DataType const* type_of_inputs) const;
  bool output_shape(nvinfer1::DimsExprs const* inputs, int32_t count, nvinfer1::DimsExprs& output,
                    nvinfer1::IExprBuilder& builder) const;
  // Whether tensor `place` (inputs first) may have the type it has, those before it given.
  bool takes_type(int32_t place, nvinfer1::DataType const* types, int32_t count) const;
  bool check(Desc const* inputs, int32_t count, Desc const* output) const;
  cudaError_t run(Desc const* inputs, int32_t count, void const* const* data, void* output,
                  cudaStream_t stream) const;

 private:
  int32_t k_ = 0;
};

// Softmax over the neighbors that chose each other, or gated; docs/operators.md.
class ReciprocalNeighborAttention {
 public:
  static constexpr char const* kName = "ReciprocalNeighborAttention";
  static constexpr int32_t kInputs = 4, kMostInputs = 6;  // gated: t, and cameras
  static std::vector<Attribute> attributes();

  bool read(nvinfer1::PluginFieldCollection const& fields);
  std::vector<nvinfer1::PluginField> fields() const;
  std::string identity() const;

  nvinfer1::DataType output_type(nvinfer1::DataType const* type_of_inputs) const;
  bool output_shape(nvinfer1::DimsExprs const* inputs, int32_t count, nvinfer1::DimsExprs& output,
                    nvinfer1::IExprBuilder& builder) const;
  bool takes_type(int32_t place, nvinfer1::DataType const* types, int32_t count) const;
  bool check(Desc const* inputs, int32_t count, Desc const* output) const;
  cudaError_t run(Desc const* inputs, int32_t count, void const* const* data, void* output,
                  cudaStream_t stream) const;

 private:
  float scale_ = 0.0F;  // NaN: 1 / sqrt(size of a value), known at run time
  float camera_factor_ = 1.0F;
};

// A line to TensorRT's logger where one has been given, else to standard error.
void report(char const* who, std::string const& what) noexcept;

}  // namespace nformer::trt
