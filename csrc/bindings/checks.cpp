// SPDX-License-Identifier: Apache-2.0
#include "bindings/checks.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "common/parallel.h"

namespace dynamic_moe::bindings {
namespace {

constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();
constexpr int64_t kScanGrain = int64_t{1} << 16;  // ints per thread below which a second thread does not pay

// The name that Python users know.
std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

template <class Sizes>
std::string shape_name(const Sizes& sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) {
    if (text.size() > 1) text += ", ";
    text += size == kAnySize ? "any" : std::to_string(size);
  }
  return text + "]";
}

bool matches(torch::headeronly::IntHeaderOnlyArrayRef sizes, std::initializer_list<int64_t> expected) {
  return std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end(),
                    [](int64_t size, int64_t want) { return want == kAnySize || size == want; });
}

// The first index whose element is bad, or `count`.
template <class IsBad>
int64_t first_bad(int64_t count, const IsBad& is_bad) {
  std::atomic<bool> found{false};
  parallel_for(0, count, kScanGrain, [&](int64_t begin, int64_t end) {
    bool any = false;
    for (int64_t index = begin; index < end; ++index) any |= is_bad(index);  // without a branch: vectorized
    if (any) found.store(true, std::memory_order_relaxed);
  });
  int64_t index = 0;
  if (!found.load()) return count;
  while (!is_bad(index)) ++index;
  return index;
}

thread_local std::optional<std::string> argument_error;

}  // namespace

std::optional<std::string> take_argument_error() { return std::exchange(argument_error, std::nullopt); }

void keep_argument_error(const char* message) { argument_error = message; }

DType float_dtype(const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      fail(name, " must be float32, float64, bfloat16 or float16, got ", dtype_name(dtype));
  }
}

DType float_dtype(const char* name, const Tensor& tensor) { return float_dtype(name, tensor.scalar_type()); }

ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return ScalarType::Double;
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    case DType::kFloat16:
      return ScalarType::Half;
    case DType::kFloat32:
      break;
  }
  return ScalarType::Float;
}

ScalarType accumulator_type(DType dtype) { return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float; }

void check_tensor(const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape) {
  const ScalarType actual = tensor.scalar_type();
  if (actual != dtype || !matches(tensor.sizes(), shape)) {
    fail(name, " must be ", dtype_name(dtype), " of shape ", shape_name(shape), ", got ", dtype_name(actual),
         " of shape ", shape_name(tensor.sizes()));
  }
}

void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) fail(name, " must be in [", low, ", ", high, "], got ", value);
}

void check_fits_int32(const char* name, int64_t value) {
  if (value > kInt32Max) fail(name, " must be at most ", kInt32Max, " (rows are numbered in int32), got ", value);
}

void check_elements(const char* name, const Tensor& tensor, int64_t count, int64_t low, int64_t high) {
  const int32_t* elements = data<int32_t>(tensor);
  const int64_t bad = first_bad(count, [=](int64_t i) { return (elements[i] < low) | (elements[i] > high); });
  if (bad < count) {
    fail(name, " must hold values in [", low, ", ", high, "], got ", elements[bad], " at flat index ", bad);
  }
}

void check_elements(const char* name, const Tensor& tensor, int64_t low, int64_t high) {
  check_elements(name, tensor, tensor.numel(), low, high);
}

int64_t check_offsets(const Tensor& expert_offsets, int64_t num_rows) {
  const int32_t* offsets = data<int32_t>(expert_offsets);
  const int64_t num_experts = expert_offsets.numel() - 1;
  if (num_experts < 1) fail("expert_offsets must have E + 1 >= 2 entries, got ", expert_offsets.numel());
  if (offsets[0] != 0) fail("expert_offsets must start at 0, got ", offsets[0]);
  for (int64_t e = 0; e < num_experts; ++e) {
    if (offsets[e + 1] < offsets[e]) {
      fail("expert_offsets must not descend, got ", offsets[e], " then ", offsets[e + 1], " at expert ", e);
    }
  }
  if (offsets[num_experts] > num_rows) {
    fail("expert_offsets must end at most at the number of rows, ", num_rows, ", got ", offsets[num_experts]);
  }
  return offsets[num_experts];
}

void check_rows(const Tensor& row_token, const Tensor& row_slot, int64_t live_rows, int64_t num_tokens,
                int64_t max_experts) {
  check_elements("row_token", row_token, live_rows, 0, num_tokens - 1);
  const int32_t* token = data<int32_t>(row_token);
  const int32_t* slot = data<int32_t>(row_slot);
  const int64_t bad = first_bad(live_rows, [=](int64_t r) {
    const int64_t k = slot[r] - token[r] * max_experts;
    return (k < 0) | (k >= max_experts);
  });
  if (bad < live_rows) {
    fail("row_slot must be a slot of the row's own token, in [", token[bad] * max_experts, ", ",
         (token[bad] + 1) * max_experts - 1, "] for token ", token[bad], ", got ", slot[bad], " at row ", bad);
  }
}

int64_t check_slot_row(const Tensor& slot_row, int64_t num_rows) {
  check_elements("slot_row", slot_row, -1, num_rows - 1);
  const int32_t* rows = data<int32_t>(slot_row);
  std::vector<bool> seen(static_cast<size_t>(num_rows));
  int64_t count = 0;
  for (int64_t slot = 0; slot < slot_row.numel(); ++slot) {
    if (rows[slot] < 0) continue;
    if (seen[static_cast<size_t>(rows[slot])]) fail("slot_row must name each row once, got row ", rows[slot], " twice");
    seen[static_cast<size_t>(rows[slot])] = true;
    ++count;
  }
  return count;
}

}  // namespace dynamic_moe::bindings
