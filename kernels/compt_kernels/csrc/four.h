// Four adjacent elements at a time, with a bound: what kernels do whose rows are longer than a block's registers.
#pragma once
#include "device.h"

namespace compt {

// x = data[0..3]; beyond the first `left` elements 0. VECTOR: data is 16-byte aligned.
template <bool VECTOR> __device__ inline void load4(const float* data, int64_t left, float* x) {
  if (VECTOR && left >= 4) {
    const float4 v = *reinterpret_cast<const float4*>(data);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = i < left ? data[i] : 0.f;
  }
}

// data[index..index+3] = x, up to `left` elements. VECTOR: as aligned as four elements are long.
template <bool VECTOR>
__device__ inline void store4(void* data, int64_t index, int dtype, int64_t left, const float* x) {
  if (VECTOR && left >= 4) {
    if (dtype == F32) {
      *reinterpret_cast<float4*>(static_cast<float*>(data) + index) = make_float4(x[0], x[1], x[2], x[3]);
    } else {
      uint32_t h[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) h[i] = dtype == BF16 ? float_to_bf16(x[i]) : float_to_f16(x[i]);
      const uint2 pairs = make_uint2(h[0] | h[1] << 16, h[2] | h[3] << 16);
      *reinterpret_cast<uint2*>(static_cast<uint16_t*>(data) + index) = pairs;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < left) store(data, index + i, dtype, x[i]);
  }
}

inline bool aligned4(const void* data, int64_t stride, int bytes) {
  return reinterpret_cast<uintptr_t>(data) % (4 * bytes) == 0 && stride % 4 == 0;
}

}  // namespace compt
