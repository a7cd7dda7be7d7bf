// SPDX-License-Identifier: Apache-2.0
// What a launcher's contract says about the device, without CUDA's headers: contracts are read by CPU code too.
#pragma once

#include <cstddef>

namespace dynamic_moe {

// A cudaStream_t of the current device; null is the default stream.
struct Stream {
  void* handle = nullptr;
};

// Device memory that the caller lends for one call, 256-byte aligned. Launchers allocate nothing.
struct Workspace {
  void* data = nullptr;
  size_t bytes = 0;
};

struct DeviceLimits {
  int sm_count;
  int major, minor;                   // compute capability
  size_t max_shared_bytes_per_block;  // with the opt-in for more than 48 KiB
};

// Of the current device, asked once for each device. Throws std::runtime_error where there is none.
DeviceLimits current_device_limits();

}  // namespace dynamic_moe
