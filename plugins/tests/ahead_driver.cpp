// One ahead-of-time kernel on the emulated GPU, launched as TensorRT launches it: blocks, threads, and the address of each
// argument in the kernel's own order. -DNFORMER_ROW_TOP_K or -DNFORMER_ATTENTION and the rest as for ahead_of_time.cu.
#include <cuda_runtime.h>

#include <utility>

#include "ahead_of_time.cu"

namespace {

template <class... Parameters, size_t... kPlaces>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, void** arguments,
            std::index_sequence<kPlaces...>) {
  for (unsigned number = 0; number < blocks; ++number) {
    emulated::run_block(number, threads, [kernel, arguments] {
      kernel(*static_cast<Parameters*>(arguments[kPlaces])...);
    });
  }
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, void** arguments) {
  launch(kernel, blocks, threads, arguments, std::index_sequence_for<Parameters...>{});
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void launch_kernel(unsigned blocks, unsigned threads,
                                                                     void** arguments) {
#if defined(NFORMER_ROW_TOP_K)
  launch(nformer_row_top_k, blocks, threads, arguments);
#else
  launch(nformer_reciprocal_neighbor_attention, blocks, threads, arguments);
#endif
}
