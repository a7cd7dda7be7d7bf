// SPDX-License-Identifier: Apache-2.0
// The table through which each CPU level offers the three products. The 512-bit levels share one table.
#pragma once

#include "float32_linear/float32_linear.h"

namespace dynamic_moe {

// A part of the result: rows (tokens; for dw, experts) and columns (experts; for dx and dw, hidden units).
struct OutputRange {
  int64_t row_begin, row_end;
  int64_t column_begin, column_end;
};

struct Float32LinearKernels {
  int64_t block_columns;  // of dx and dw: ranges of columns begin at multiples of this
  void (*forward)(const Float32LinearParams&, const OutputRange&);
  void (*dx)(const Float32LinearDxParams&, const OutputRange&);
  void (*dw)(const Float32LinearDwParams&, const OutputRange&);
};

extern const Float32LinearKernels kFloat32LinearScalar;
#ifdef __x86_64__
extern const Float32LinearKernels kFloat32LinearAvx2;
extern const Float32LinearKernels kFloat32LinearAvx512;
#endif

}  // namespace dynamic_moe
