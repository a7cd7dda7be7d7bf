// SPDX-License-Identifier: Apache-2.0
// Skips every test of the program where there is no device.
#include <gtest/gtest.h>

#include "common/cuda/platform.cuh"

namespace dynamic_moe::testing {
namespace {

class NeedDevice : public ::testing::Environment {
 public:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "no device";
  }
};

[[maybe_unused]] const auto* const need_device = ::testing::AddGlobalTestEnvironment(new NeedDevice);

}  // namespace
}  // namespace dynamic_moe::testing
