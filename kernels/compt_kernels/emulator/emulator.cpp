#include "emulator.h"

#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

namespace emulator {

thread_local Thread* current = nullptr;

namespace {

constexpr int MAX_THREADS = 1024;

unsigned seed = 0;
uint64_t slots[2][MAX_THREADS];  // the values of a shuffle; two, so that one barrier a shuffle is enough
std::vector<uint64_t> dynamic_words;
std::mutex one_launch;
int block_threads = 0;

[[noreturn]] void fail(const char* what, int a, int b) {
  fprintf(stderr, "emulator: ");
  fprintf(stderr, what, a, b);
  fprintf(stderr, "\n");
  abort();
}

void place(Thread& thread, int linear, unsigned block, dim3 grid, dim3 dim) {
  thread.linear = linear;
  thread.shuffles = 0;
  thread.thread = dim3(linear % dim.x, linear / dim.x % dim.y, linear / (dim.x * dim.y));
  thread.block = dim3(block % grid.x, block / grid.x % grid.y, block / (grid.x * grid.y));
  thread.block_dim = dim;
  thread.grid_dim = grid;
}

void run_blocks(dim3 grid, dim3 dim, const std::function<void()>& body, std::mt19937& random);

}  // namespace

int lane() { return current->linear % 32; }

int warp_size_here() { return std::min(32, block_threads - current->linear / 32 * 32); }

void require_all_lanes(unsigned mask) {
  if (mask != 0xffffffffu) fail("a warp operation with mask %x: only whole warps are emulated (%d)", int(mask), 0);
}

void* dynamic_shared() { return dynamic_words.data(); }

uint64_t shuffle(uint64_t value, int source_lane) {
  Thread& me = *current;
  const int warp = me.linear / 32 * 32;
  if (source_lane >= warp_size_here()) fail("lane %d of %d asked for a lane that is not there", lane(), warp_size_here());
  uint64_t* slot = slots[me.shuffles++ % 2];
  slot[me.linear] = value;
  sync_warp();
  return slot[warp + source_lane];
}

void launch(dim3 grid, dim3 dim, size_t shared_bytes, const std::function<void()>& body) {
  const int64_t threads = int64_t(dim.x) * dim.y * dim.z;
  if (threads < 1 || threads > MAX_THREADS || grid.x < 1 || grid.y > 65535 || grid.z > 65535)
    fail("CUDA has no launch of %d blocks with %d threads", int(grid.x), int(threads));
  if (shared_bytes > 227 * 1024) fail("%d bytes of shared memory, a block has at most %d", int(shared_bytes), 227 * 1024);
  std::lock_guard<std::mutex> lock(one_launch);
  std::mt19937 random(seed);
  dynamic_words = std::vector<uint64_t>((shared_bytes + 7) / 8, 0x7ff8dead7fc0dead);  // NaN, as fp64 and as fp32
  block_threads = static_cast<int>(threads);
  run_blocks(grid, dim, body, random);
}

float from_bf16(uint16_t bits) { return bit_cast<float>(uint32_t(bits) << 16); }

uint16_t to_bf16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_f16(uint16_t bits) {
  const float sign = bits & 0x8000 ? -1.f : 1.f;
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24));
}

uint16_t to_f16(float x) {
  const uint16_t sign = bit_cast<uint32_t>(x) >> 16 & 0x8000;
  const float size = fabsf(x);
  if (x != x) return 0x7fff;
  if (size >= 65520.f) return sign | 0x7c00;
  if (size < 6.103515625e-5f) return sign | static_cast<uint16_t>(nearbyintf(size * 16777216.f));  // subnormal: 2^-24
  const uint32_t bits = bit_cast<uint32_t>(size);
  const uint32_t rounded = bits + 0xfff + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded - (112u << 23)) >> 13);
}

}  // namespace emulator

extern "C" __attribute__((visibility("default"))) void compt_emulator_seed(unsigned seed) { emulator::seed = seed; }

#ifndef EMULATOR_THREADS
#include "fibers.inc"
#else
#include "threads.inc"
#endif
