// SPDX-License-Identifier: Apache-2.0
// Prints the CPU levels that this machine runs, as a CMake list.
#include <cstdio>

#include "common/isa.h"

int main() {
  const char* separator = "";
  for (const dynamic_moe::Isa isa : dynamic_moe::supported_isas()) {
    std::printf("%s%s", separator, dynamic_moe::isa_name(isa));
    separator = ";";
  }
}
