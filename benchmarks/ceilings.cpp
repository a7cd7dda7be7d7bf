// SPDX-License-Identifier: Apache-2.0
// What this machine can do at most, for the benchmarks: multiply-adds per second in registers, bytes per second from
// and to memory. Compiled when the benchmarks start, for the CPU at hand, and called through ctypes.
//
// Threads are started for each measurement and gone after it: a pool that spins would disturb the kernels that are
// timed next. The clock runs from the first thread's start to the last one's end.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kVectorBytes)));

// Independent chains: more than latency times units of any CPU of today, fewer than its registers.
constexpr int kChains = kVectorBytes == 64 ? 24 : 12;
constexpr int64_t kStepsPerBlock = 20000;

// Runs work(thread) on every thread, all released at once. Returns the seconds it took.
double run_threads(int threads, const std::function<void(int)>& work) {
  std::atomic<int> waiting{threads};
  std::vector<Clock::time_point> start(static_cast<size_t>(threads));
  std::vector<Clock::time_point> end(static_cast<size_t>(threads));
  const auto body = [&](int thread) {
    --waiting;
    while (waiting.load() > 0) {
    }
    start[static_cast<size_t>(thread)] = Clock::now();
    work(thread);
    end[static_cast<size_t>(thread)] = Clock::now();
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(body, thread);
  body(0);
  for (std::thread& other : others) other.join();
  const auto first = *std::min_element(start.begin(), start.end());
  const auto last = *std::max_element(end.begin(), end.end());
  return std::chrono::duration<double>(last - first).count();
}

// Makes the compiler believe that the value is read and changed here.
template <class T>
void keep(T& value) {
  asm volatile("" : "+m"(value) : : "memory");
}

void multiply_add_block() {
  Vector sum[kChains] = {};
  for (Vector& value : sum) keep(value);  // else the chains would be known to be equal, and one would be computed
  Vector scale = {}, shift = {};
  keep(scale);
  keep(shift);
  for (int64_t step = 0; step < kStepsPerBlock; ++step) {
#pragma GCC unroll 24
    for (int chain = 0; chain < kChains; ++chain) sum[chain] = sum[chain] * scale + shift;
  }
  for (Vector& value : sum) keep(value);
}

#if defined(__AVX512BF16__)
void bfloat16_dot_block() {
  __m512 sum[kChains] = {};
  for (__m512& value : sum) keep(value);
  __m512bh a = {}, b = {};
  keep(a);
  keep(b);
  for (int64_t step = 0; step < kStepsPerBlock; ++step) {
#pragma GCC unroll 24
    for (int chain = 0; chain < kChains; ++chain) sum[chain] = _mm512_dpbf16_ps(sum[chain], a, b);
  }
  for (__m512& value : sum) keep(value);
}
#endif

// Operations per second of `block` for about `seconds` on each thread.
double rate_of(void (*block)(), double operations_per_block, int threads, double seconds) {
  const auto start = Clock::now();
  block();
  const double once = std::chrono::duration<double>(Clock::now() - start).count();
  const auto blocks = std::max<int64_t>(1, static_cast<int64_t>(seconds / once));
  const double elapsed = run_threads(threads, [&](int) {
    for (int64_t i = 0; i < blocks; ++i) block();
  });
  return operations_per_block * static_cast<double>(blocks) * threads / elapsed;
}

// Memory that stays mapped, so that no measurement pays for fresh pages.
class Buffer {
 public:
  std::byte* of_size(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      data_ = static_cast<std::byte*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096));
      // Every page different: a hypervisor may keep equal pages once, and then they are read from its cache.
      uint64_t state = 88172645463325252ull;
      for (size_t i = 0; i + sizeof state <= bytes; i += sizeof state) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        std::memcpy(data_ + i, &state, sizeof state);
      }
      size_ = bytes;
    }
    return data_;
  }

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

Buffer source_buffer, target_buffer;

// Sums a part of memory as four streams, as a kernel that reads several rows of weights at once does.
void read_part(const std::byte* data, size_t bytes) {
  constexpr size_t kStreams = 4;
  const size_t stream_bytes = bytes / kStreams / (4 * sizeof(Vector)) * (4 * sizeof(Vector));
  Vector sum[kStreams] = {};
  for (size_t offset = 0; offset < stream_bytes; offset += 4 * sizeof(Vector)) {
    for (size_t stream = 0; stream < kStreams; ++stream) {
      const auto* line = reinterpret_cast<const Vector*>(data + stream * stream_bytes + offset);
      sum[stream] += (line[0] + line[1]) + (line[2] + line[3]);
    }
  }
  for (Vector& value : sum) keep(value);
}

void copy_part(std::byte* target, const std::byte* source, size_t bytes) {
#if defined(__AVX512F__)
  for (size_t offset = 0; offset < bytes; offset += sizeof(Vector)) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + offset), _mm512_load_si512(source + offset));
  }
  _mm_sfence();
#else
  std::memcpy(target, source, bytes);
#endif
}

size_t part_of(size_t bytes, int threads) { return bytes / static_cast<size_t>(threads) / 4096 * 4096; }

}  // namespace

extern "C" {

// float32 operations per second; a multiply and an add count as two.
double multiply_add_rate(int threads, double seconds) {
  const double operations = 2.0 * kStepsPerBlock * kChains * (kVectorBytes / 4);
  return rate_of(multiply_add_block, operations, threads, seconds);
}

// The same for the bfloat16 dot product instruction; 0 where the CPU has none.
double bfloat16_dot_rate([[maybe_unused]] int threads, [[maybe_unused]] double seconds) {
#if defined(__AVX512BF16__)
  const double operations = 2.0 * kStepsPerBlock * kChains * 32;
  return rate_of(bfloat16_dot_block, operations, threads, seconds);
#else
  return 0.0;
#endif
}

// Bytes per second read from a buffer of `bytes`, walked `passes` times; each thread reads its part.
double read_rate(int threads, size_t bytes, int passes) {
  const std::byte* data = source_buffer.of_size(bytes);
  const size_t part = part_of(bytes, threads);
  const double elapsed = run_threads(threads, [&](int thread) {
    for (int pass = 0; pass < passes; ++pass) read_part(data + static_cast<size_t>(thread) * part, part);
  });
  return static_cast<double>(part) * threads * passes / elapsed;
}

// Bytes per second copied, reads and writes counted, with stores that go past the caches.
double copy_rate(int threads, size_t bytes, int passes) {
  const std::byte* source = source_buffer.of_size(bytes);
  std::byte* target = target_buffer.of_size(bytes);
  const size_t part = part_of(bytes, threads);
  const double elapsed = run_threads(threads, [&](int thread) {
    const size_t first = static_cast<size_t>(thread) * part;
    for (int pass = 0; pass < passes; ++pass) copy_part(target + first, source + first, part);
  });
  return 2.0 * static_cast<double>(part) * threads * passes / elapsed;
}

}  // extern "C"
