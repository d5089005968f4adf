// The two operators as onnxruntime custom operators, in a library that `register_custom_ops_library` takes. float32.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "onnxruntime_abi.h"
#include "operators.h"

namespace {

using namespace nformer;

std::atomic<int> threads_to_use{0};

struct Tensor {
  void* data;                    // null: an optional input that the node does not have
  std::array<int64_t, 3> shape;  // 0 behind the last axis

  const float* floats() const { return static_cast<const float*>(data); }
  const int32_t* ints() const { return static_cast<const int32_t*>(data); }
  std::string text() const {
    return "[" + std::to_string(shape[0]) + ", " + std::to_string(shape[1]) + ", " + std::to_string(shape[2]) + "]";
  }
};

// A call's view of onnxruntime. Errors become exceptions and, at the border, a status again.
class Context {
 public:
  Context(const ort::Api& api, ort::KernelContext* context) : api_(api), context_(context) {}

  Tensor input(size_t index, size_t expected = 3) const {
    const ort::Value* value = nullptr;
    check(api_.call<ort::Status*>(ort::kKernelContextGetInput, const_cast<const ort::KernelContext*>(context_), index,
                                  &value));
    Tensor tensor{};
    if (!value) return tensor;
    ort::TensorInfo* info = nullptr;
    check(api_.call<ort::Status*>(ort::kGetTensorTypeAndShape, value, &info));
    size_t axes = 0;
    ort::Status* status = api_.call<ort::Status*>(ort::kGetDimensionsCount, const_cast<const ort::TensorInfo*>(info), &axes);
    if (!status && axes == expected)
      status = api_.call<ort::Status*>(ort::kGetDimensions, const_cast<const ort::TensorInfo*>(info), tensor.shape.data(), axes);
    api_.call<void>(ort::kReleaseTensorInfo, info);
    check(status);
    if (axes != expected)
      throw std::invalid_argument("got " + std::to_string(axes) + " axes, expected " + std::to_string(expected));
    check(api_.call<ort::Status*>(ort::kGetTensorMutableData, const_cast<ort::Value*>(value), &tensor.data));
    return tensor;
  }

  void* output(std::array<int64_t, 3> shape) const {
    ort::Value* value = nullptr;
    const int64_t* dimensions = shape.data();
    check(api_.call<ort::Status*>(ort::kKernelContextGetOutput, context_, size_t{0}, dimensions, shape.size(), &value));
    void* data = nullptr;
    check(api_.call<ort::Status*>(ort::kGetTensorMutableData, value, &data));
    return data;
  }

 private:
  void check(ort::Status* status) const {
    if (!status) return;
    api_.call<void>(ort::kReleaseStatus, status);
    throw std::runtime_error("onnxruntime refused to hand out a tensor");
  }

  const ort::Api& api_;
  ort::KernelContext* context_;
};

struct Kernel {
  const ort::Api* api;
  int threads;
  int64_t k;
  float scale, camera_factor;
};

void expect(bool holds, const char* what, const Tensor& got) {
  if (!holds) throw std::invalid_argument(std::string(what) + ": got shape " + got.text());
}

// Rows that hold a NaN or infinity choose nobody and are chosen by nobody; the others never notice.
void top_k_without_bad_rows(const Table& table, const TopKTensors& x, int threads, bool tree) {
  for (int64_t h = 0; h < x.heads; ++h) {
    std::vector<float> a(x.a + h * x.n * x.r, x.a + (h + 1) * x.n * x.r), b;
    std::vector<int32_t> ids;
    std::vector<bool> bad(x.n);
    for (int64_t i = 0; i < x.n; ++i) {
      bad[i] = first_bad_row(a.data() + i * x.r, 1, x.r, 1) == 0;
      if (bad[i]) std::fill_n(a.begin() + i * x.r, x.r, 0.0f);
    }
    for (int64_t j = 0; j < x.m; ++j) {
      const float* row = x.b + (h * x.m + j) * x.r;
      if (first_bad_row(row, 1, x.r, 1) == 0) continue;
      ids.push_back(static_cast<int32_t>(j));
      b.insert(b.end(), row, row + x.r);
    }
    const int found = static_cast<int>(std::min<size_t>(x.k, ids.size()));
    std::vector<int32_t> lists(x.n * std::max(found, 1));
    if (found)
      row_top_k(table, {a.data(), b.data(), 1, x.n, static_cast<int64_t>(ids.size()), x.r, found, lists.data(), false},
                threads, tree);
    for (int64_t i = 0; i < x.n; ++i)
      for (int s = 0; s < x.k; ++s)
        x.neighbors[(h * x.n + i) * x.k + s] = s < found && !bad[i] ? ids[lists[i * found + s]] : -1;
  }
}

// The fastest instruction set, or that which the environment names, as in Python; a name unknown here changes nothing.
const Table& chosen_table() {
  const char* name = std::getenv("NFORMER_EDGE_ISA");
  const Table* named = name ? find_table(name) : nullptr;
  return named ? *named : *find_table("");
}

void run_row_top_k(const Kernel& kernel, const Context& context) {
  const Tensor a = context.input(0), b = context.input(1);
  expect(a.shape[0] == b.shape[0] && a.shape[2] == b.shape[2], "b must be [H, M, R] as a [H, N, R]", b);
  expect(b.shape[1] < int64_t{1} << 29, "b has too many columns", b);
  const int64_t heads = a.shape[0], n = a.shape[1], m = b.shape[1], r = a.shape[2], k = kernel.k;
  int32_t* out = static_cast<int32_t*>(context.output({heads, n, k}));
  const int64_t found = r ? std::min(k, m) : 0;
  if (!heads || !n || !found) return void(std::fill_n(out, heads * n * k, -1));
  std::vector<int32_t> shorter(found < k ? heads * n * found : 0);
  int32_t* lists = found < k ? shorter.data() : out;
  const Table& table = chosen_table();
  const bool tree = r <= kMaxTreeRank, same = a.data == b.data && n == m;
  const TopKTensors x{a.floats(), b.floats(), heads, n, m, r, static_cast<int>(found), lists, same};
  const bool finite = first_bad_row(x.a, heads * n, r, kernel.threads) < 0 &&
                      (same || first_bad_row(x.b, heads * m, r, kernel.threads) < 0);
  if (finite)
    row_top_k(table, x, kernel.threads, tree);
  else
    top_k_without_bad_rows(table, x, kernel.threads, tree);
  for (int64_t row = 0; found < k && row < heads * n; ++row)
    std::fill(std::copy_n(lists + row * found, found, out + row * k), out + (row + 1) * k, -1);
}

void run_attention(const Kernel& kernel, const Context& context) {
  const Tensor a = context.input(0), b = context.input(1), v = context.input(2), lists = context.input(3);
  const int64_t heads = a.shape[0], n = a.shape[1], d = v.shape[2], k = lists.shape[2];
  expect(b.shape == a.shape, "b must be shaped as a", b);
  expect(v.shape[0] == heads && v.shape[1] == n, "v must be [H, N, D]", v);
  expect((lists.shape[0] == 1 || lists.shape[0] == heads) && lists.shape[1] == n, "neighbors must be [H or 1, N, K]", lists);
  expect(first_bad_list(lists.ints(), lists.shape[0] * n, k, n, kernel.threads) < 0, "a neighbor is out of range", lists);
  float* y = static_cast<float*>(context.output({heads, n, d}));
  const double scale = std::isnan(kernel.scale) ? 1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(1, d)))
                                                : static_cast<double>(kernel.scale);
  AttentionTensors x{a.floats(), b.floats(), v.floats(), lists.ints(), heads, lists.shape[0], n, a.shape[2], d, k, scale};
  const Tensor t = context.input(4, 2), cameras = context.input(5, 1);
  expect(!t.data || ((t.shape[0] == 1 || t.shape[0] == heads) && t.shape[1] == n), "t must be [H or 1, N]", t);
  expect(!cameras.data || (t.data && cameras.shape[0] == n), "cameras must be [N], and come with t", cameras);
  x.t = t.floats(), x.thresholds = t.shape[0], x.cameras = cameras.ints(), x.camera_factor = kernel.camera_factor;
  attend(chosen_table(), x, y, kernel.threads);
}

using Run = void (*)(const Kernel&, const Context&);

struct Operator : ort::CustomOp {
  const char* label;
  size_t inputs;
  ort::ElementType output;
  int threads;
};

const Operator& of(const ort::CustomOp* op) { return *static_cast<const Operator*>(op); }

ort::Status* failed(const ort::Api& api, const std::exception& error) {
  const std::string message = std::string("nformer: ") + error.what();
  return api.call<ort::Status*>(ort::kCreateStatus, ort::kInvalidArgument, message.c_str());
}

ort::Status* create(const ort::CustomOp* op, const ort::Api* api, const ort::KernelInfo* info, void** kernel) {
  auto made = std::make_unique<Kernel>(Kernel{api, of(op).threads, 0, NAN, 1.0f});
  if (of(op).inputs == 2) {
    ort::Status* status =
        api->call<ort::Status*>(ort::kKernelInfoGetAttributeInt64, info, static_cast<const char*>("k"), &made->k);
    if (status) return status;
    if (made->k < 1 || made->k > INT32_MAX) return failed(*api, std::invalid_argument("k must be at least 1"));
  } else {
    const auto read = [&](const char* name, float* value) {
      ort::Status* absent = api->call<ort::Status*>(ort::kKernelInfoGetAttributeFloat, info, name, value);
      if (absent) api->call<void>(ort::kReleaseStatus, absent);
    };
    read("scale", &made->scale), read("camera_factor", &made->camera_factor);
  }
  *kernel = made.release();
  return nullptr;
}

template <Run run>
ort::Status* compute(void* opaque, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(opaque);
  try {
    run(kernel, Context(*kernel.api, context));
    return nullptr;
  } catch (const std::exception& error) {
    return failed(*kernel.api, error);
  }
}

template <Run run>
Operator make(const char* label, size_t inputs, ort::ElementType output, int threads) {
  Operator op{};
  op.version = ort::kVersion;
  op.name = [](const ort::CustomOp* self) { return of(self).label; };
  op.provider = [](const ort::CustomOp*) -> const char* { return nullptr; };
  op.input_type = [](const ort::CustomOp*, size_t index) {
    return index == 3 || index == 5 ? ort::kInt32 : ort::kFloat;
  };
  op.input_count = [](const ort::CustomOp* self) { return of(self).inputs; };
  op.output_type = [](const ort::CustomOp* self, size_t) { return of(self).output; };
  op.output_count = [](const ort::CustomOp*) -> size_t { return 1; };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.input_characteristic = [](const ort::CustomOp*, size_t index) { return index < 4 ? ort::kRequired : ort::kOptional; };
  op.output_characteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  op.input_memory = [](const ort::CustomOp*, size_t) { return ort::kDefaultMemory; };
  op.variadic_input_minimum = op.variadic_output_minimum = [](const ort::CustomOp*) { return 1; };
  op.variadic_input_homogeneous = op.variadic_output_homogeneous = [](const ort::CustomOp*) { return 1; };
  op.create = create;
  op.compute = compute<run>;
  op.label = label, op.inputs = inputs, op.output = output, op.threads = threads;
  return op;
}

}  // namespace

#define NFORMER_EXPORT extern "C" __attribute__((visibility("default")))

// Threads for the sessions that register from now on; 0 takes one a processor.
NFORMER_EXPORT void NFormerSetThreads(int threads) { threads_to_use = threads; }

NFORMER_EXPORT ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  // Sessions keep pointers to these, and nothing says when the last one is gone.
  static std::deque<Operator>* const kept = new std::deque<Operator>;
  static std::mutex guard;
  const ort::Api* api = base->get(ort::kVersion);
  if (!api) return nullptr;  // older than version 16: the bodies in the file serve
  const int asked = threads_to_use, threads = asked > 0 ? asked : std::max(1u, std::thread::hardware_concurrency());
  ort::CustomOpDomain* domain = nullptr;
  if (ort::Status* status =
          api->call<ort::Status*>(ort::kCreateCustomOpDomain, static_cast<const char*>("nformer"), &domain))
    return status;
  const std::lock_guard<std::mutex> lock(guard);
  for (Operator op : {make<run_row_top_k>("RowTopK", 2, ort::kInt32, threads),
                      make<run_attention>("ReciprocalNeighborAttention", 6, ort::kFloat, threads)}) {
    kept->push_back(op);
    const ort::CustomOp* added = &kept->back();
    if (ort::Status* status = api->call<ort::Status*>(ort::kCustomOpDomainAdd, domain, added)) return status;
  }
  return api->call<ort::Status*>(ort::kAddCustomOpDomain, options, domain);
}
