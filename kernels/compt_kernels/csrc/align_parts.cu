// The alignment loss where each rank holds a part of the features: its sums over them, and its part of the gradient.
// A warp a row; any strides.
#include "align_math.h"

namespace compt {
namespace {

constexpr int BLOCK = 128, ROWS_A_BLOCK = BLOCK / 32;

enum Pass { TOTALS, SQUARES, DISTANCE, GRADIENT };

__device__ inline Affine affine_of(const AlignPartArgs& a, int64_t row, int64_t rows, int side) {
  return {a.affine[2 * side * rows + row], a.affine[(2 * side + 1) * rows + row], a.affine[4 * rows + row] != 0.f};
}

template <Pass PASS> __global__ void __launch_bounds__(BLOCK) align_part(AlignPartArgs a) {
  const int lane = threadIdx.x % 32;
  const int64_t rows = a.outer_rows * a.inner_rows;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * ROWS_A_BLOCK + threadIdx.x / 32;
  if (row >= rows) return;  // a whole warp; no barrier of the block follows
  const RowIndex index = row_index(row, a.outer_rows, a.inner_rows);
  const int64_t s0 = row_offset(a.student, index), t0 = row_offset(a.teacher, index);
  auto student = [&](int64_t c) { return load(a.student.data, s0 + c * a.student.column, a.student.dtype); };
  auto teacher = [&](int64_t c) { return load(a.teacher.data, t0 + c * a.teacher.column, a.teacher.dtype); };

  if constexpr (PASS == TOTALS) {
    double sums[2] = {0, 0};  // fp64: the mean of a constant row must be exact
    for (int64_t c = lane; c < a.features; c += 32) sums[0] += student(c), sums[1] += teacher(c);
    warp_sum(sums);
    if (lane == 0) a.sums[row] = sums[0], a.sums[rows + row] = sums[1];
  } else if constexpr (PASS == SQUARES) {
    const float s_mean = a.means ? a.means[row] : 0.f, t_mean = a.means ? a.means[rows + row] : 0.f;
    float sums[2] = {0.f, 0.f};
    for (int64_t c = lane; c < a.features; c += 32) {
      const float s = student(c) - s_mean, t = teacher(c) - t_mean;
      sums[0] += s * s, sums[1] += t * t;
    }
    warp_sum(sums);
    if (lane == 0) a.sums[row] = sums[0], a.sums[rows + row] = sums[1];
  } else {
    const Affine as = affine_of(a, row, rows, 0), at = affine_of(a, row, rows, 1);
    const float offset = offset_of(as, at);
    auto slope_at = [&](int64_t c, float& part) {
      const float e = difference(student(c), as, teacher(c), at, offset);
      float slope;
      part = a.distance == SMOOTH_L1 ? share<true>(e, a.beta, slope) : share<false>(e, a.beta, slope);
      return slope;
    };
    if constexpr (PASS == DISTANCE) {
      float sums[3] = {0.f, 0.f, 0.f};
      if (as.live)
        for (int64_t c = lane; c < a.features; c += 32) {
          float part;
          const float slope = slope_at(c, part);
          sums[0] += part, sums[1] += slope * ((student(c) - as.mean) * as.scale), sums[2] += slope;
        }
      warp_sum(sums);
      if (lane == 0)
        for (int k = 0; k < 3; ++k) a.sums[k * rows + row] = sums[k];
    } else {
      const float factor = a.through[row], mean = a.through[rows + row], along = a.through[2 * rows + row];
      for (int64_t c = lane; c < a.features; c += 32) {
        float part, g = 0.f;
        if (as.live) {
          const float slope = slope_at(c, part);
          g = factor * (slope - mean - (student(c) - as.mean) * as.scale * along);
        }
        store(a.gradient, row * a.features + c, a.student.dtype, g);
      }
    }
  }
}

template <Pass PASS> int run(const AlignPartArgs& a, void* stream) {
  const int64_t rows = a.outer_rows * a.inner_rows;
  if (rows == 0) return 0;
  const dim3 grid(static_cast<unsigned>((rows + ROWS_A_BLOCK - 1) / ROWS_A_BLOCK));
  LAUNCH(align_part<PASS>, grid, dim3(BLOCK), 0, stream, a);
  return LAST_ERROR();
}

}  // namespace
}  // namespace compt

using namespace compt;

extern "C" int compt_align_totals(const AlignPartArgs* args, void* stream) { return run<TOTALS>(*args, stream); }
extern "C" int compt_align_squares(const AlignPartArgs* args, void* stream) { return run<SQUARES>(*args, stream); }
extern "C" int compt_align_distance(const AlignPartArgs* args, void* stream) { return run<DISTANCE>(*args, stream); }
extern "C" int compt_align_gradient(const AlignPartArgs* args, void* stream) { return run<GRADIENT>(*args, stream); }
