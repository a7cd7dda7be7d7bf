// SPDX-License-Identifier: Apache-2.0
// Prints the CPU levels that this machine runs, as a CMake list; to stderr why it lacks one that it should have.
#include <cstdio>

#include "common/isa.h"
#include "common/tile_permission.h"

int main() {
  const char* separator = "";
  for (const dynamic_moe::Isa isa : dynamic_moe::supported_isas()) {
    if (isa == dynamic_moe::Isa::kAmx) {
      dynamic_moe::TilePermission tiles(dynamic_moe::request_tile_data);
      if (!tiles.ask()) {
        std::fprintf(stderr, "amx is not tested, its tiles are refused: %s", tiles.reason().c_str());
        continue;
      }
    }
    std::printf("%s%s", separator, dynamic_moe::isa_name(isa));
    separator = ";";
  }
}
