// A libcuda.so.1 that the CPU plays, for the real pycuda: memory is malloc's, a stream does its work at once.
// EMULATED_CUDA says what is wrong with the machine: "no-device", or the MiB that the GPU has (64 otherwise).
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_CONTEXT = 201 };

static __thread int pushed;
static size_t used;
static int retained, capturing, launches;

static char const* machine(void) {
  char const* said = getenv("EMULATED_CUDA");
  return said ? said : "64";
}
static size_t total(void) { return (size_t)atoi(machine()) << 20; }

CUresult cuInit(unsigned flags) { return strcmp(machine(), "no-device") == 0 ? NO_DEVICE : SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
CUresult cuGetErrorString(CUresult code, char const** text) {
  *text = code == OUT_OF_MEMORY ? "out of memory" : code == NO_DEVICE ? "no CUDA-capable device is detected" : "an error";
  return SUCCESS;
}
CUresult cuGetErrorName(CUresult code, char const** text) { return *text = "CUDA_ERROR_EMULATED", SUCCESS; }

CUresult cuDeviceGetCount(int* count) { return *count = 1, SUCCESS; }
CUresult cuDeviceGet(int* device, int ordinal) { return *device = ordinal, SUCCESS; }
CUresult cuDeviceGetName(char* name, int size, int device) { return strncpy(name, "Emulated GPU", (size_t)size), SUCCESS; }
CUresult cuDeviceComputeCapability(int* major, int* minor, int device) { return *major = 8, *minor = 7, SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, int attribute, int device) {
  return *value = attribute == 16 ? 16 : 0, SUCCESS;  // 16: CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
}
CUresult cuDevicePrimaryCtxRetain(void** context, int device) { return ++retained, *context = &retained, SUCCESS; }
CUresult cuDevicePrimaryCtxRelease_v2(int device) { return --retained, SUCCESS; }
CUresult cuCtxPushCurrent_v2(void* context) { return ++pushed, SUCCESS; }
CUresult cuCtxPopCurrent_v2(void** context) { return pushed > 0 ? (--pushed, *context = &retained, SUCCESS) : INVALID_CONTEXT; }

CUresult cuMemGetInfo_v2(size_t* free_bytes, size_t* all) {
  return pushed ? (*all = total(), *free_bytes = total() - used, SUCCESS) : INVALID_CONTEXT;
}
CUresult cuMemAlloc_v2(uint64_t* address, size_t size) {
  if (!pushed) return INVALID_CONTEXT;
  if (used + size > total()) return OUT_OF_MEMORY;
  size_t* block = malloc(size + 64);
  *block = size;
  used += size;
  return *address = (uint64_t)(uintptr_t)(block + 8), SUCCESS;
}
CUresult cuMemFree_v2(uint64_t address) {
  if (!pushed) return INVALID_CONTEXT;
  size_t* block = (size_t*)(uintptr_t)address - 8;
  used -= *block;
  free(block);
  return SUCCESS;
}
CUresult cuMemHostAlloc(void** memory, size_t size, unsigned flags) {
  return pushed ? (*memory = malloc(size), SUCCESS) : INVALID_CONTEXT;
}
CUresult cuMemFreeHost(void* memory) { return pushed ? (free(memory), SUCCESS) : INVALID_CONTEXT; }
CUresult cuMemcpyHtoDAsync_v2(uint64_t to, void const* from, size_t size, void* stream) {
  return pushed && !capturing ? (memcpy((void*)(uintptr_t)to, from, size), SUCCESS) : INVALID_CONTEXT;
}
CUresult cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t size, void* stream) {
  return pushed && !capturing ? (memcpy(to, (void*)(uintptr_t)from, size), SUCCESS) : INVALID_CONTEXT;
}

CUresult cuStreamCreate(void** stream, unsigned flags) { return pushed ? (*stream = malloc(1), SUCCESS) : INVALID_CONTEXT; }
CUresult cuStreamDestroy_v2(void* stream) { return pushed ? (free(stream), SUCCESS) : INVALID_CONTEXT; }
CUresult cuStreamSynchronize(void* stream) { return capturing ? INVALID_VALUE : SUCCESS; }
CUresult cuEventCreate(void** event, unsigned flags) { return pushed ? (*event = malloc(1), SUCCESS) : INVALID_CONTEXT; }
CUresult cuEventDestroy_v2(void* event) { return pushed ? (free(event), SUCCESS) : INVALID_CONTEXT; }
CUresult cuEventRecord(void* event, void* stream) { return SUCCESS; }
CUresult cuEventElapsedTime_v2(float* ms, void* start, void* end) { return *ms = 0.5F, SUCCESS; }

CUresult cuStreamBeginCapture_v2(void* stream, int mode) {
  return capturing || mode != 1 ? INVALID_VALUE : (capturing = 1, SUCCESS);
}
CUresult cuStreamEndCapture(void* stream, void** graph) {
  return capturing ? (capturing = 0, *graph = malloc(1), SUCCESS) : INVALID_VALUE;
}
CUresult cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long flags) {
  return flags == 0 ? (*executable = malloc(1), SUCCESS) : INVALID_VALUE;
}
CUresult cuGraphLaunch(void* executable, void* stream) { return ++launches, SUCCESS; }
CUresult cuGraphDestroy(void* graph) { return free(graph), SUCCESS; }
CUresult cuGraphExecDestroy(void* executable) { return free(executable), SUCCESS; }

size_t emulated_used(void) { return used; }
int emulated_launches(void) { return launches; }
