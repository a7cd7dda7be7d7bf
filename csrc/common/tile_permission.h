// SPDX-License-Identifier: Apache-2.0
// The permission to use AMX tiles. Linux (5.16 and later) keeps the 8 KiB of tile data out of a process until it asks,
// and may refuse. Once it has granted them, every alternate signal stack of the process must have room for them: small
// ones of other libraries fail from then on. So nothing asks before tiles are about to be used, and nothing asks twice.
#pragma once

#include <atomic>
#include <string>

namespace dynamic_moe {

class TilePermission {
 public:
  // Asks the operating system; returns 0 or the error number of its refusal.
  using Request = int (*)();
  enum class State { kNotAsked, kGranted, kRefused };

  explicit TilePermission(Request request) : request_(request) {}

  // Whether tiles may be used. The first call asks, whichever thread makes it; later ones, also those of a child
  // process, repeat the answer: a child inherits what its parent was granted.
  bool ask();

  State state() const;

  // Why the tiles were refused: the error, and what commonly causes it. Empty where they were not.
  std::string reason() const;

 private:
  static constexpr int kNotAsked = -1;

  Request request_;
  std::atomic<int> answer_{kNotAsked};  // or 0: granted, or the error number of the refusal
};

// Of Linux on x86-64, for the calling process; elsewhere ENOSYS.
int request_tile_data();

}  // namespace dynamic_moe
