// TensorRT's version as one number, 806 for 8.6 and 1013 for 10.13, and what the library gives out.
#pragma once

#include <NvInferRuntime.h>
#include <NvInferVersion.h>

#define NFORMER_TENSORRT (NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR)

#if NFORMER_TENSORRT < 805
#error "TensorRT: got a version before 8.5. Install TensorRT 8.5 or later (JetPack 5.1 has 8.5)."
#endif

#define NFORMER_EXPORT extern "C" __attribute__((visibility("default")))

#if NFORMER_TENSORRT >= 806
namespace nformer::trt {
void set_logger_finder(nvinfer1::ILoggerFinder* given) noexcept;
}  // namespace nformer::trt
#endif

namespace nformer::trt {
// The process's plugin registry. A library that was linked without libnvinfer.so finds it in the process that loads it,
// and opens in others all the same: there it has no registry.
#ifdef NFORMER_WEAK_REGISTRY
#pragma weak getPluginRegistry
inline nvinfer1::IPluginRegistry* registry() { return getPluginRegistry != nullptr ? getPluginRegistry() : nullptr; }
#else
inline nvinfer1::IPluginRegistry* registry() { return getPluginRegistry(); }
#endif
}  // namespace nformer::trt
