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
#define NFORMER_ISA avx512
#include "isa.h"
#undef NFORMER_ISA
#endif

// tile_rows and tile_columns are read only once the machine is known to run the instruction set.
#define NFORMER_TABLE(isa)                                                                                    \
  {#isa,             isa::tile_rows(), isa::tile_columns(),          isa::scan_panel, isa::scan_blocks, \
   isa::kth_largest, isa::score,       isa::attend,                  isa::attend_backward_rows,         \
   isa::attend_backward_columns}

namespace nformer {
namespace {

constexpr int kMostTables = 3;

struct Tables {
  Table best_first[kMostTables];
  int count = 0;

  Tables() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      best_first[count++] = NFORMER_TABLE(avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best_first[count++] = NFORMER_TABLE(avx2);
    best_first[count++] = NFORMER_TABLE(baseline);
#else
    best_first[count++] = NFORMER_TABLE(baseline);
#if defined(__aarch64__)
    best_first[0].name = "neon";  // NEON is the baseline of 64-bit Arm
#endif
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
