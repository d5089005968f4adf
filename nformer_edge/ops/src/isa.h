// What filter.cpp, exact.cpp and integers.cpp define for one instruction set. Included once for each: no guard; NFORMER_ISA names it.

#include "table.h"

#ifndef NFORMER_ISA
#error "NFORMER_ISA must name the instruction set"
#endif

namespace nformer {
namespace NFORMER_ISA {

IntegerFilter integer_filter();
int tile_rows();
int tile_columns();
int64_t scan_panel(const float* rows, int64_t panels, const float* columns, int64_t r, const float* row_threshold,
                   const float* column_threshold, int32_t row, int32_t column, Hit* hits);
void score_hits(const float* a, const float* b, int64_t r, float scale_a, float scale_b, Hit* hits, int64_t count);
int scan_blocks(int r, const float* base, int64_t stride, const int32_t* offset, const float* a, int width,
                float threshold, const Entry* blocks, int count, Entry* out);
float kth_largest(float* scores, int count, int k);
void score(const float* a, const float* b, int64_t r, const int32_t* columns, int64_t count, double* out);
void attend(const Attention& x, int64_t begin, int64_t end, float* y, const Scratch& scratch);
void join(const float* x, float factor, const float* y, int64_t d, float* out);
void attend_backward_rows(const Attention& x, const AttentionGradient& g, int64_t begin, int64_t end,
                          const Scratch& scratch);
void attend_backward_columns(const Attention& x, const AttentionGradient& g, int64_t begin, int64_t end,
                             const Scratch& scratch);

}  // namespace NFORMER_ISA
}  // namespace nformer
