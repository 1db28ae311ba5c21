// What every kernel file includes: the switch between CUDA and the emulator, and the helpers kernels share.
//
// How to add an operation, say `distill`:
//   1. csrc/distill.h                 a plain struct of arguments and `extern "C" int compt_distill(const Distill*, int
//                                     sms, void* stream)`, which launches and returns LAST_ERROR(); no torch in it.
//   2. csrc/distill.cu                the kernels. Include device.h only (no CUDA header, no std type on the device).
//                                     Launch with LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, args...);
//                                     a kernel with commas in its template arguments goes in parentheses.
//   3. csrc/distill_registration.cpp  includes registration.h; takes torch::stable::Tensor, checks, allocates, calls 1;
//                                     ends with STABLE_TORCH_LIBRARY_IMPL(compt_kernels, COMPT_DISPATCH_KEY, m).
//   4. ops/distill.py                 torch.library schema, fake kernel, autograd.Function. C++ never defines a schema.
// build.py takes every csrc/*.cu and csrc/*_registration.cpp; there is no list to extend.
//
// What the emulator has: threadIdx, blockIdx, blockDim, gridDim, __syncthreads, __syncwarp, __shfl_sync,
// __shfl_xor_sync, __shfl_down_sync (all 32 lanes, 4 and 8 byte types), __shared__, DYNAMIC_SHARED(type, name),
// integer atomicAdd, __threadfence, fp32 math by its C names (expf, logf, sqrtf, fmaxf, fmaf) and the conversions
// below. Every thread must reach every barrier of its block; a warp shuffles with all its lanes or not at all.
//
// 16-bit floats are held as their bits (uint16_t) with a dtype code beside the pointer: a kernel branches on the code
// around its loops, so that one instantiation serves all dtypes.
#pragma once
#include "rows.h"

#ifdef COMPT_EMULATED
#include "../emulator/emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<(grid), (block), (shared), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define LAST_ERROR() static_cast<int>(cudaGetLastError())
#define DYNAMIC_SHARED(type, name)                                   \
  extern __shared__ __align__(16) unsigned char name##_bytes[];      \
  type* name = reinterpret_cast<type*>(name##_bytes)
#endif

namespace compt {

#ifdef COMPT_EMULATED
inline float bf16_to_float(uint16_t bits) { return emulator::from_bf16(bits); }
inline uint16_t float_to_bf16(float x) { return emulator::to_bf16(x); }
inline float f16_to_float(uint16_t bits) { return emulator::from_f16(bits); }
inline uint16_t float_to_f16(float x) { return emulator::to_f16(x); }
inline uint32_t float_bits(float x) { return emulator::bit_cast<uint32_t>(x); }
inline float bits_float(uint32_t bits) { return emulator::bit_cast<float>(bits); }
inline float mul_rn(float a, float b) { return a * b; }
template <class T> inline T load_shared_by_blocks(const T* p) { return *p; }
#else
__device__ inline float bf16_to_float(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
__device__ inline uint16_t float_to_bf16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ inline float f16_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ inline uint16_t float_to_f16(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ inline uint32_t float_bits(float x) { return __float_as_uint(x); }
__device__ inline float bits_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline float mul_rn(float a, float b) { return __fmul_rn(a, b); }  // never fused into an FMA
template <class T> __device__ inline T load_shared_by_blocks(const T* p) { return __ldcg(p); }  // past L1, which may be stale
#endif

// One element; `index` in elements.
__device__ inline float load(const void* data, int64_t index, int dtype) {
  if (dtype == F32) return static_cast<const float*>(data)[index];
  if (dtype == BF16) return bf16_to_float(static_cast<const uint16_t*>(data)[index]);
  if (dtype == F16) return f16_to_float(static_cast<const uint16_t*>(data)[index]);
  return static_cast<const uint8_t*>(data)[index] != 0 ? 1.f : 0.f;
}

__device__ inline void store(void* data, int64_t index, int dtype, float x) {
  if (dtype == F32) static_cast<float*>(data)[index] = x;
  else if (dtype == BF16) static_cast<uint16_t*>(data)[index] = float_to_bf16(x);
  else static_cast<uint16_t*>(data)[index] = float_to_f16(x);
}

__device__ inline int element_size(int dtype) { return dtype == F32 ? 4 : dtype == U8 ? 1 : 2; }

// Which of outer x inner rows: one division a row, and none where there is one outer row.
struct RowIndex {
  int64_t outer, inner;
};

__device__ inline RowIndex row_index(int64_t row, int64_t outer_rows, int64_t inner_rows) {
  if (outer_rows == 1) return {0, row};
  if (((row | inner_rows) >> 32) == 0) {
    const uint32_t outer = static_cast<uint32_t>(row) / static_cast<uint32_t>(inner_rows);
    return {outer, row - static_cast<int64_t>(outer) * inner_rows};
  }
  const int64_t outer = row / inner_rows;
  return {outer, row - outer * inner_rows};
}

// Where a row starts, in elements.
__device__ inline int64_t row_offset(const Rows& rows, RowIndex index) {
  return index.outer * rows.outer + index.inner * rows.inner;
}

// Eight elements at a 16-byte aligned address, as bits: 16-bit floats fill x[0..3], fp32 fills x[0..7]. Loading and
// converting apart keeps many loads in flight.
__device__ inline void load8_bits(const void* data, int64_t index, int dtype, float (&x)[8]) {
  const uint4* p = reinterpret_cast<const uint4*>(static_cast<const char*>(data) + index * (dtype == F32 ? 4 : 2));
  const uint4 a = p[0];
  x[0] = bits_float(a.x), x[1] = bits_float(a.y), x[2] = bits_float(a.z), x[3] = bits_float(a.w);
  if (dtype == F32) {
    const uint4 b = p[1];
    x[4] = bits_float(b.x), x[5] = bits_float(b.y), x[6] = bits_float(b.z), x[7] = bits_float(b.w);
  }
}

__device__ inline void convert8(int dtype, float (&x)[8]) {
  if (dtype == F32) return;
#pragma unroll
  for (int i = 3; i >= 0; --i) {
    const uint32_t pair = float_bits(x[i]);
    const uint16_t low = static_cast<uint16_t>(pair), high = static_cast<uint16_t>(pair >> 16);
    x[2 * i] = dtype == BF16 ? bf16_to_float(low) : f16_to_float(low);
    x[2 * i + 1] = dtype == BF16 ? bf16_to_float(high) : f16_to_float(high);
  }
}

__device__ inline void store8(void* data, int64_t index, int dtype, const float (&x)[8]) {
  uint4* p = reinterpret_cast<uint4*>(static_cast<char*>(data) + index * (dtype == F32 ? 4 : 2));
  uint32_t w[8];
  if (dtype == F32) {
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = float_bits(x[i]);
    p[1] = make_uint4(w[4], w[5], w[6], w[7]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = dtype == BF16 ? float_to_bf16(x[2 * i]) : float_to_f16(x[2 * i]);
      const uint32_t high = dtype == BF16 ? float_to_bf16(x[2 * i + 1]) : float_to_f16(x[2 * i + 1]);
      w[i] = low | high << 16;
    }
  }
  p[0] = make_uint4(w[0], w[1], w[2], w[3]);
}

constexpr unsigned ALL_LANES = 0xffffffffu;

// Sums K numbers over a warp; every lane gets the same bits.
template <class T, int K> __device__ inline void warp_sum(T (&x)[K]) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1)
#pragma unroll
    for (int k = 0; k < K; ++k) x[k] += __shfl_xor_sync(ALL_LANES, x[k], offset);
}

// Sums K numbers over the THREADS threads of a block (one warp: no barrier); every thread gets the same bits, whatever
// the schedule. `scratch` is shared memory for K * THREADS / 32 numbers.
template <int THREADS, class T, int K> __device__ inline void block_sum(T (&x)[K], T* scratch) {
  warp_sum(x);
  if constexpr (THREADS > 32) {
    constexpr int WARPS = THREADS / 32;
    __syncthreads();  // scratch may still be read from the last sum
    if (threadIdx.x % 32 == 0)
#pragma unroll
      for (int k = 0; k < K; ++k) scratch[k * WARPS + threadIdx.x / 32] = x[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) {
      T sum = 0;
      for (int warp = 0; warp < WARPS; ++warp) sum += scratch[k * WARPS + warp];
      x[k] = sum;
    }
  }
}

}  // namespace compt
