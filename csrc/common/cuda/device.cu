// SPDX-License-Identifier: Apache-2.0
#include <map>
#include <mutex>

#include "common/cuda/launch.cuh"

namespace dynamic_moe {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "current_device_limits");
  return value;
}

DeviceLimits limits_of(int device) {
  return {attribute(cudaDevAttrMultiProcessorCount, device), attribute(cudaDevAttrComputeCapabilityMajor, device),
          attribute(cudaDevAttrComputeCapabilityMinor, device),
          static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device))};
}

}  // namespace

DeviceLimits current_device_limits() {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "current_device_limits");
  const std::lock_guard lock(mutex);
  const auto found = known.find(device);
  return found != known.end() ? found->second : known.emplace(device, limits_of(device)).first->second;
}

}  // namespace dynamic_moe
