// SPDX-License-Identifier: Apache-2.0
#include "simt/accounting.h"

#include <bit>

namespace simt {
namespace {

constexpr uint32_t kSectorBytes = 32;
constexpr uint32_t kBanks = 32, kBankBytes = 4;

// Distinct values, in a buffer that is large enough for 32 lanes of 16 bytes in words.
struct Distinct {
  uintptr_t value[128];
  int count = 0;

  bool insert(uintptr_t wanted) {
    for (int i = 0; i < count; ++i) {
      if (value[i] == wanted) return false;
    }
    value[count++] = wanted;
    return true;
  }
};

uint64_t sectors(const uintptr_t (&address)[32], uint32_t lanes) {
  Distinct touched;
  for (; lanes != 0; lanes &= lanes - 1) {
    touched.insert(address[std::countr_zero(lanes)] / kSectorBytes);  // aligned to its size: in one sector
  }
  return static_cast<uint64_t>(touched.count);
}

// How often the 32 banks are needed for lanes that are served together: as often as the busiest bank has words.
uint64_t passes(const uintptr_t (&address)[32], uint32_t lanes, uint32_t bytes) {
  Distinct words;
  uint32_t of_bank[kBanks] = {};
  uint32_t most = 0;
  for (; lanes != 0; lanes &= lanes - 1) {
    const uintptr_t first = address[std::countr_zero(lanes)] / kBankBytes;
    for (uintptr_t word = first; word < first + (bytes + kBankBytes - 1) / kBankBytes; ++word) {
      if (!words.insert(word)) continue;
      const uint32_t count = ++of_bank[word % kBanks];
      if (count > most) most = count;
    }
  }
  return most;
}

// A warp is served 128 bytes at a time: all lanes up to 4 bytes each, half of them at 8, a quarter at 16.
void count_shared(const uintptr_t (&address)[32], uint32_t lanes, uint32_t bytes, uint64_t& wavefronts,
                  uint64_t& conflicts) {
  const uint32_t together = bytes <= 4 ? 32 : 128 / bytes;
  for (uint32_t first = 0; first < 32; first += together) {
    const uint32_t served = lanes & static_cast<uint32_t>(((uint64_t{1} << together) - 1) << first);
    if (served == 0) continue;
    const uint64_t needed = passes(address, served, bytes);
    wavefronts += needed;
    conflicts += needed - 1;
  }
}

}  // namespace

WarpAccounting::Place& WarpAccounting::place_of(Access access, uint32_t bytes, Site site) {
  const auto is_it = [&](const Place& place) {
    return place.site.line == site.line && place.site.file == site.file && place.access == access &&
           place.bytes == bytes;
  };
  if (recent_ < places_.size() && is_it(places_[recent_])) return places_[recent_];
  for (uint32_t i = 0; i < places_.size(); ++i) {
    if (is_it(places_[i])) {
      recent_ = i;
      return places_[i];
    }
  }
  recent_ = places_.size();
  Place& place = places_.push();
  place.site = site;
  place.access = access;
  place.bytes = bytes;
  place.first = place.last = kNone;
  for (uint32_t& latest : place.latest) latest = kNone;
  return place;
}

void WarpAccounting::add(Access access, uintptr_t address, uint32_t bytes, int lane, Site site) {
  Place& place = place_of(access, bytes, site);
  uint32_t& latest = place.latest[lane];
  uint32_t index = latest == kNone ? place.first : requests_[latest].next;
  if (index == kNone) {  // no lane came here that often
    index = requests_.size();
    Request& request = requests_.push();
    request.access = access;
    request.bytes = bytes;
    request.lanes = 0;
    request.next = kNone;
    (place.first == kNone ? place.first : requests_[place.last].next) = index;
    place.last = index;
  }
  latest = index;
  requests_[index].lanes |= uint32_t{1} << lane;
  requests_[index].address[lane] = address;
}

void WarpAccounting::close(Counters& counters) {
  for (Request& request : requests_) {
    switch (request.access) {
      case Access::kGlobalRead:
        ++counters.global_read_requests;
        counters.global_read_sectors += sectors(request.address, request.lanes);
        break;
      case Access::kGlobalWrite:
        ++counters.global_write_requests;
        counters.global_write_sectors += sectors(request.address, request.lanes);
        break;
      case Access::kSharedRead:
        ++counters.shared_read_requests;
        count_shared(request.address, request.lanes, request.bytes, counters.shared_read_wavefronts,
                     counters.bank_conflicts);
        break;
      case Access::kSharedCopy:
        ++counters.cp_async;
        [[fallthrough]];
      case Access::kSharedWrite:
        ++counters.shared_write_requests;
        count_shared(request.address, request.lanes, request.bytes, counters.shared_write_wavefronts,
                     counters.bank_conflicts);
        break;
    }
  }
  requests_.clear();
  places_.clear();
}

}  // namespace simt
