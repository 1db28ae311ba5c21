#include "scale.h"

#include "device.h"

namespace compt {
namespace {

constexpr int THREADS = 256;

struct ScaleArgs {
  void* gradient;
  int dtype;
  int64_t rows, features;
  const float *factor, *unit;
  bool factor_a_row;
};

// VECTOR: eight elements a thread, all of one row.
template <bool VECTOR> __global__ void __launch_bounds__(THREADS) scale_rows(ScaleArgs a) {
  constexpr int WIDTH = VECTOR ? 8 : 1;
  const float unit = a.unit ? *a.unit : 1.f;
  if (!a.factor_a_row && *a.factor * unit == 1.f) return;
  const int64_t count = a.rows * a.features / WIDTH;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * THREADS) {
    const float factor = (a.factor_a_row ? a.factor[i * WIDTH / a.features] : *a.factor) * unit;
    if (factor == 1.f) continue;
    if constexpr (VECTOR) {
      float x[8];
      load8_bits(a.gradient, i * 8, a.dtype, x);
      convert8(a.dtype, x);
#pragma unroll
      for (int k = 0; k < 8; ++k) x[k] *= factor;
      store8(a.gradient, i * 8, a.dtype, x);
    } else {
      store(a.gradient, i, a.dtype, load(a.gradient, i, a.dtype) * factor);
    }
  }
}

}  // namespace
}  // namespace compt

using namespace compt;

extern "C" int compt_scale_rows(void* gradient, int dtype, int64_t rows, int64_t features, const float* factor,
                                bool factor_a_row, const float* unit, int multiprocessors, void* stream) {
  const int64_t count = rows * features;
  if (count == 0) return 0;
  const bool vector = reinterpret_cast<uintptr_t>(gradient) % 16 == 0 &&
                      (factor_a_row ? features % 8 == 0 : count % 8 == 0);
  const int64_t wanted = (count / (vector ? 8 : 1) + THREADS - 1) / THREADS, most = multiprocessors * int64_t{16};
  const dim3 grid(static_cast<unsigned>(wanted < most ? wanted : most));
  const ScaleArgs a{gradient, dtype, rows, features, factor, unit, factor_a_row};
  if (vector) LAUNCH(scale_rows<true>, grid, dim3(THREADS), 0, stream, a);
  else LAUNCH(scale_rows<false>, grid, dim3(THREADS), 0, stream, a);
  return LAST_ERROR();
}
