// Runs the .cu sources on the CPU, for tests: included by csrc/device.h in place of the CUDA headers.
//
// Blocks run one after another. A block's threads are fibers that run until they meet a barrier, in an order that
// `compt_emulator_seed` shuffles (0: in order); with EMULATOR_THREADS each is an OS thread, so that ThreadSanitizer
// sees what CUDA's memory model calls a race. A barrier that not all threads of the block reach ends the process.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {

template <class To, class From> To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

float from_bf16(uint16_t bits);
uint16_t to_bf16(float x);  // to nearest, ties to even
float from_f16(uint16_t bits);
uint16_t to_f16(float x);  // to nearest, ties to even

struct Thread {
  dim3 thread, block, block_dim, grid_dim;
  int linear;           // index in the block
  unsigned shuffles;    // how many it took part in
};
extern thread_local Thread* current;

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);
void sync_block();
void sync_warp();
uint64_t shuffle(uint64_t value, int source_lane);
void* dynamic_shared();
int lane();
int warp_size_here();  // 32, less in the last warp of a block that is no multiple of 32
void require_all_lanes(unsigned mask);

template <class T> T shuffle_as(unsigned mask, T value, int source_lane) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  require_all_lanes(mask);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = shuffle(bits, source_lane);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static  // one block runs at a time
#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(emulator::dynamic_shared())
#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::current->block)
#define blockDim (emulator::current->block_dim)
#define gridDim (emulator::current->grid_dim)
#define LAUNCH(kernel, grid, block, shared, stream, ...) \
  emulator::launch((grid), (block), (shared), [=] { kernel(__VA_ARGS__); })
#define LAST_ERROR() 0

inline void __syncthreads() { emulator::sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulator::require_all_lanes(mask);
  emulator::sync_warp();
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <class T> T __shfl_sync(unsigned mask, T value, int source) {
  return emulator::shuffle_as(mask, value, source & 31);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulator::shuffle_as(mask, value, emulator::lane() ^ bits);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, int offset) {
  const int source = emulator::lane() + offset;
  return emulator::shuffle_as(mask, value, source < 32 ? source : emulator::lane());
}
template <class T> T atomicAdd(T* address, T value) {
  static_assert(static_cast<T>(0.5) == 0, "atomics on floats have no fixed order");
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}

inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
