// SPDX-License-Identifier: Apache-2.0
// Divides the products among threads and hands them to the level in use.
#include "float32_linear/float32_linear.h"

#include <algorithm>

#include "common/isa.h"
#include "common/parallel.h"
#include "float32_linear/cpu_levels.h"

namespace dynamic_moe {
namespace {

constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kMostRows = 64;  // tokens of a task: with H 2048 they fill half of a second-level cache

const Float32LinearKernels& kernels() {
  switch (current_isa()) {
    case Isa::kScalar:
      break;
    case Isa::kAvx2:
#ifdef DYNAMIC_MOE_HAS_AVX2
      return kFloat32LinearAvx2;
#else
      break;
#endif
    case Isa::kAvx512:
    case Isa::kAvx512Bf16:
    case Isa::kAmx:
#ifdef DYNAMIC_MOE_HAS_AVX512
      return kFloat32LinearAvx512;
#else
      break;
#endif
  }
  return kFloat32LinearScalar;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// run(range) for ranges that cover [rows, columns] and are cut at multiples of the two steps. Rows are cut first,
// columns where that leaves threads without work.
template <class Run>
void for_ranges(int64_t rows, int64_t row_step, int64_t columns, int64_t column_step, int64_t work, const Run& run) {
  const int64_t wanted = kTasksPerThread * num_threads();
  const int64_t range_rows = divide_up(std::clamp<int64_t>(divide_up(rows, wanted), 1, kMostRows), row_step) * row_step;
  const int64_t row_ranges = divide_up(rows, range_rows);
  const int64_t column_ranges = std::clamp<int64_t>(divide_up(wanted, std::max<int64_t>(row_ranges, 1)), 1,
                                                    std::max<int64_t>(divide_up(columns, column_step), 1));
  const int64_t range_columns = divide_up(divide_up(columns, column_ranges), column_step) * column_step;
  if (range_columns == 0) return;
  const int64_t column_tasks = divide_up(columns, range_columns);
  parallel_tasks(row_ranges * column_tasks, work, [&](int64_t index) {
    const int64_t row = index / column_tasks * range_rows, column = index % column_tasks * range_columns;
    run(OutputRange{.row_begin = row,
                    .row_end = std::min(row + range_rows, rows),
                    .column_begin = column,
                    .column_end = std::min(column + range_columns, columns)});
  });
}

}  // namespace

void float32_linear_cpu(const Float32LinearParams& p) {
  const Float32LinearKernels& level = kernels();
  for_ranges(p.num_tokens, 4, p.num_experts, 4, p.num_tokens * p.num_experts * p.hidden_size,
             [&](const OutputRange& range) { level.forward(p, range); });
}

void float32_linear_dx_cpu(const Float32LinearDxParams& p) {
  const Float32LinearKernels& level = kernels();
  for_ranges(p.num_tokens, 4, p.hidden_size, level.block_columns, p.num_tokens * p.num_experts * p.hidden_size,
             [&](const OutputRange& range) { level.dx(p, range); });
}

void float32_linear_dw_cpu(const Float32LinearDwParams& p) {
  const Float32LinearKernels& level = kernels();
  // Columns are cut first: experts that share a task share the copy of the tokens' columns.
  for_ranges(1, 1, p.hidden_size, level.block_columns, p.num_tokens * p.num_experts * p.hidden_size,
             [&](const OutputRange& columns) {
               level.dw(p, {.row_begin = 0,
                            .row_end = p.num_experts,
                            .column_begin = columns.column_begin,
                            .column_end = columns.column_end});
             });
}

}  // namespace dynamic_moe
