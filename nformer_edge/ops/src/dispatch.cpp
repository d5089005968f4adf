// Which instruction sets are compiled in, and which of them this machine runs.
#include <cstring>

#include "table.h"

#define NFORMER_ISA baseline
#include "isa.h"
#undef NFORMER_ISA
#if defined(__x86_64__)
#define NFORMER_ISA avx2
#include "isa.h"
#undef NFORMER_ISA
#ifdef NFORMER_AVX2VNNI
#define NFORMER_ISA avx2vnni
#include "isa.h"
#undef NFORMER_ISA
#endif
#define NFORMER_ISA avx512
#include "isa.h"
#undef NFORMER_ISA
#define NFORMER_ISA avx512vnni
#include "isa.h"
#undef NFORMER_ISA
#elif defined(__aarch64__)
#include <sys/auxv.h>
#define NFORMER_ISA neondot
#include "isa.h"
#undef NFORMER_ISA
#endif

// Functions of `isa` are called only once the machine is known to run it.
#define NFORMER_TABLE(isa, name, integers)                                                         \
  {name,             integers,         isa::tile_rows(), isa::tile_columns(), isa::scan_panel,     \
   isa::score_hits,  isa::scan_blocks, isa::kth_largest, isa::score,          isa::attend,         \
   isa::join,        isa::attend_backward_rows,          isa::attend_backward_columns}

namespace nformer {
namespace {

constexpr int kMostTables = 5;
constexpr IntegerFilter kNoIntegers{};  // measured: 16-bit products of AVX2 and AVX-512 gain 5 to 15 % on some CPUs

struct Tables {
  Table best_first[kMostTables];
  int count = 0;

  Tables() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      if (__builtin_cpu_supports("avx512vnni"))
        best_first[count++] = NFORMER_TABLE(avx512, "avx512vnni", avx512vnni::integer_filter());
      best_first[count++] = NFORMER_TABLE(avx512, "avx512", kNoIntegers);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
#ifdef NFORMER_AVX2VNNI
      if (__builtin_cpu_supports("avxvnni"))
        best_first[count++] = NFORMER_TABLE(avx2, "avx2vnni", avx2vnni::integer_filter());
#endif
      best_first[count++] = NFORMER_TABLE(avx2, "avx2", kNoIntegers);
    }
    best_first[count++] = NFORMER_TABLE(baseline, "baseline", baseline::integer_filter());
#elif defined(__aarch64__)  // NEON is the baseline of 64-bit Arm
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP)
      best_first[count++] = NFORMER_TABLE(baseline, "neondot", neondot::integer_filter());
    best_first[count++] = NFORMER_TABLE(baseline, "neon", kNoIntegers);
#else
    best_first[count++] = NFORMER_TABLE(baseline, "baseline", kNoIntegers);
#endif
  }
};

const Tables& tables() {
  static const Tables all;
  return all;
}

}  // namespace

const Table* find_table(const char* name) {
  const Tables& all = tables();
  for (int i = 0; i < all.count; ++i)
    if (!*name || !std::strcmp(name, all.best_first[i].name)) return &all.best_first[i];
  return nullptr;
}

int list_tables(const char** names, int capacity) {
  const Tables& all = tables();
  int listed = 0;
  for (; listed < all.count && listed < capacity; ++listed) names[listed] = all.best_first[listed].name;
  return listed;
}

}  // namespace nformer
