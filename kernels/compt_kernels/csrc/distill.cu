// Rows of vocabulary logits, one block a row: the sums of both softmaxes, then the KL and the student's gradient.
#include "distill.h"

#include "four.h"

namespace compt {
namespace {

constexpr int THREADS = 512, WARPS = THREADS / 32;
constexpr int STEP = THREADS * 8;  // columns a step: each thread has two times four adjacent ones
constexpr float NOTHING = -1e30f;

__device__ inline void merge(float& high, float& sum, float other_high, float other_sum) {
  const float both = fmaxf(high, other_high);
  sum = sum * expf(high - both) + other_sum * expf(other_high - both);
  high = both;
}

// Where this thread's four columns of a step's half start.
__device__ inline int64_t column_of(int64_t start, int half) { return start + half * (STEP / 2) + threadIdx.x * 4; }

template <bool VECTOR>
__device__ inline void load_step(const float* row, int64_t start, int64_t columns, float (&x)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t column = column_of(start, half);
    load4<VECTOR>(row + column, columns - column, x + half * 4);
  }
}

// Joins eight logits, those that `counts` says, to a maximum and the sum of exponentials below it.
template <class Counts>
__device__ inline void join(const float (&x)[8], float scale, float& high, float& sum, Counts counts) {
  float top = high, added = 0.f;
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (counts(j)) top = fmaxf(top, x[j] * scale);
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (counts(j)) added += expf(fmaf(x[j], scale, -top));
  sum = sum * expf(high - top) + added;
  high = top;
}

template <bool VECTOR>
__global__ void __launch_bounds__(THREADS) distill_statistics(DistillArgs a, float* statistics) {
  __shared__ float shared[4][WARPS];
  const int64_t row = blockIdx.x;
  const float *student = a.student + row * a.student_stride, *teacher = a.teacher + row * a.teacher_stride;
  const float bound = a.bound ? a.bound[row] : 0.f;
  float found[4] = {NOTHING, 0.f, NOTHING, 0.f};
  for (int64_t start = 0; start < a.columns; start += STEP) {
    float s[8], t[8];
    load_step<VECTOR>(student, start, a.columns, s);
    load_step<VECTOR>(teacher, start, a.columns, t);
    const auto there = [&](int j) { return column_of(start, j / 4) + j % 4 < a.columns; };
    join(s, a.inverse_temperature, found[0], found[1], there);
    // not below the bound, rather than at least it: a NaN must stay
    join(t, a.inverse_temperature, found[2], found[3], [&](int j) { return there(j) && !(a.bound && t[j] < bound); });
  }
#pragma unroll
  for (int k = 0; k < 4; k += 2)
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
      const float high = __shfl_xor_sync(ALL_LANES, found[k], offset);
      const float sum = __shfl_xor_sync(ALL_LANES, found[k + 1], offset);
      merge(found[k], found[k + 1], high, sum);
    }
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int k = 0; k < 4; ++k) shared[k][threadIdx.x / 32] = found[k];
  __syncthreads();
  if (threadIdx.x >= 2) return;
  const int k = threadIdx.x * 2;  // thread 0: the student, thread 1: the teacher
  float high = NOTHING, sum = 0.f;
  for (int warp = 0; warp < WARPS; ++warp) merge(high, sum, shared[k][warp], shared[k + 1][warp]);
  statistics[k * a.rows + row] = high;
  statistics[(k + 1) * a.rows + row] = sum;
}

// exp(v) - 1 - v for |v| <= 1/2, by its series: 1e-8 of it.
__device__ inline float exp_less_two_terms(float v) {
  float tail = 1.f + v * (1.f / 9.f);
  tail = fmaf(v * (1.f / 8.f), tail, 1.f);
  tail = fmaf(v * (1.f / 7.f), tail, 1.f);
  tail = fmaf(v * (1.f / 6.f), tail, 1.f);
  tail = fmaf(v * (1.f / 5.f), tail, 1.f);
  tail = fmaf(v * (1.f / 4.f), tail, 1.f);
  tail = fmaf(v * (1.f / 3.f), tail, 1.f);
  return 0.5f * v * v * tail;
}

template <bool VECTOR, bool GRADIENT>
__global__ void __launch_bounds__(THREADS) distill_gradient(DistillArgs a, DistillGradientArgs g) {
  __shared__ float shared[WARPS];
  const int64_t row = blockIdx.x;
  const float weight = g.weight[row];
  if (weight == 0.f) {  // the whole block
    if constexpr (GRADIENT)
      for (int64_t start = 0; start < a.columns; start += STEP) {
        const float zeros[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t column = column_of(start, half);
          store4<VECTOR>(g.slope, row * g.slope_stride + column, g.slope_dtype, a.columns - column, zeros);
        }
      }
    if (threadIdx.x == 0) g.loss[row] = 0.f;
    return;
  }
  const float *student = a.student + row * a.student_stride, *teacher = a.teacher + row * a.teacher_stride;
  const float bound = a.bound ? a.bound[row] : 0.f, scale = a.inverse_temperature;
  const float high_s = g.statistics[row], high_t = g.statistics[2 * a.rows + row];
  const float per_s = 1.f / g.statistics[a.rows + row], per_t = 1.f / g.statistics[3 * a.rows + row];
  const float shift = high_t - high_s + logf(per_s / per_t);  // the difference of the two log-sum-exps
  float sum[1] = {0.f};
  for (int64_t start = 0; start < a.columns; start += STEP) {
    float s[8], t[8];
    load_step<VECTOR>(student, start, a.columns, s);
    load_step<VECTOR>(teacher, start, a.columns, t);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (column_of(start, j / 4) + j % 4 >= a.columns) continue;
      const float p_s = expf(fmaf(s[j], scale, -high_s)) * per_s;
      const float p_t = a.bound && t[j] < bound ? 0.f : expf(fmaf(t[j], scale, -high_t)) * per_t;
      const float v = fmaf(s[j] - t[j], scale, shift);  // log p_s - log p_t
      float term, slope;
      if (fabsf(v) < 0.5f) {
        const float rest = exp_less_two_terms(v);
        term = p_t * rest, slope = p_t * (rest + v);
      } else {
        slope = p_s - p_t, term = slope - p_t * v;
      }
      if (p_t == 0.f) term = p_s, slope = p_s;
      sum[0] += term;
      s[j] = weight * slope;
    }
    if constexpr (GRADIENT)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t column = column_of(start, half);
        store4<VECTOR>(g.slope, row * g.slope_stride + column, g.slope_dtype, a.columns - column, s + half * 4);
      }
  }
  block_sum<THREADS>(sum, shared);
  if (threadIdx.x == 0) g.loss[row] = sum[0];
}

}  // namespace
}  // namespace compt

using namespace compt;

extern "C" int compt_distill_statistics(const DistillArgs* args, float* statistics, void* stream) {
  const DistillArgs a = *args;
  if (a.rows == 0 || a.columns == 0) return 0;
  const bool vector = aligned4(a.student, a.student_stride, 4) && aligned4(a.teacher, a.teacher_stride, 4);
  const dim3 grid(static_cast<unsigned>(a.rows)), block(THREADS);
  if (vector) LAUNCH(distill_statistics<true>, grid, block, 0, stream, a, statistics);
  else LAUNCH(distill_statistics<false>, grid, block, 0, stream, a, statistics);
  return LAST_ERROR();
}

extern "C" int compt_distill_gradient(const DistillArgs* args, const DistillGradientArgs* gradient, void* stream) {
  const DistillArgs a = *args;
  const DistillGradientArgs g = *gradient;
  if (a.rows == 0 || a.columns == 0) return 0;
  const bool vector = aligned4(a.student, a.student_stride, 4) && aligned4(a.teacher, a.teacher_stride, 4) &&
                      (!g.slope || aligned4(g.slope, g.slope_stride, g.slope_dtype == F32 ? 4 : 2));
  const dim3 grid(static_cast<unsigned>(a.rows)), block(THREADS);
  if (g.slope && vector) LAUNCH((distill_gradient<true, true>), grid, block, 0, stream, a, g);
  else if (g.slope) LAUNCH((distill_gradient<false, true>), grid, block, 0, stream, a, g);
  else if (vector) LAUNCH((distill_gradient<true, false>), grid, block, 0, stream, a, g);
  else LAUNCH((distill_gradient<false, false>), grid, block, 0, stream, a, g);
  return LAST_ERROR();
}
