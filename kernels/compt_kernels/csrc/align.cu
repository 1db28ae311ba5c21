// The alignment loss on rows [N, features], in one pass: a row of student and teacher is read once into registers and
// the gradient is written once. Losses are summed in fp64, by rows in a block and then by blocks, each in a fixed order:
// the block that ends last adds them up, whichever it is.
#include <atomic>

#include "align_math.h"

namespace compt {
namespace {

constexpr int MAX_WEIGHT_PARTS = 256;
constexpr int64_t DIRECT_WEIGHTS = 4096;  // up to so many weights each block sums for itself
constexpr int WEIGHT_THREADS = 256;

// Workspace: partial sums of the weights, then each block's sum of losses.
constexpr int WEIGHT_PARTS = 0, LOSS_PARTS = MAX_WEIGHT_PARTS;

// Where the blocks of a launch count themselves; all zero between launches. Each launch has the next one, so that two
// that run at once, in streams or graphs, meet only if 65,535 others were launched between them.
constexpr unsigned TICKETS = 1 << 16;
__device__ unsigned tickets[TICKETS];

struct Plan {
  AlignArgs a;
  int weight_parts;  // 0: sum the weights themselves
  unsigned ticket;
};

__device__ inline float weight_of(const AlignArgs& a, int64_t row) {
  return a.row_weight ? load(a.row_weight, row, a.row_weight_dtype) : 1.f;
}

__device__ inline int64_t row_count(const AlignArgs& a) { return a.outer_rows * a.inner_rows; }

// This thread's share of the sum of the weights. The dtype is asked once, so that the loads overlap.
__device__ inline double weights_from(const AlignArgs& a, int64_t first, int64_t step) {
  const int64_t rows = row_count(a);
  float sum = 0.f;
  double total = 0;
  auto add = [&](auto at) {
    int count = 0;
#pragma unroll 8
    for (int64_t row = first; row < rows; row += step) {
      sum += at(row);
      if (++count % 64 == 0) total += sum, sum = 0.f;
    }
  };
  const void* data = a.row_weight;
  if (a.row_weight_dtype == F32) add([=](int64_t i) { return static_cast<const float*>(data)[i]; });
  else if (a.row_weight_dtype == U8) add([=](int64_t i) { return static_cast<const uint8_t*>(data)[i] ? 1.f : 0.f; });
  else add([=](int64_t i) { return load(data, i, a.row_weight_dtype); });
  return total + sum;
}

__global__ void __launch_bounds__(WEIGHT_THREADS) weight_sums(AlignArgs a) {
  __shared__ double scratch[WEIGHT_THREADS / 32];
  double sum[1] = {weights_from(a, static_cast<int64_t>(blockIdx.x) * WEIGHT_THREADS + threadIdx.x,
                                static_cast<int64_t>(gridDim.x) * WEIGHT_THREADS)};
  block_sum<WEIGHT_THREADS>(sum, scratch);
  if (threadIdx.x == 0) a.workspace[WEIGHT_PARTS + blockIdx.x] = sum[0];
}

// What the losses are divided by; the same bits in every block.
template <int THREADS> __device__ inline double whole_of(const Plan& p, double* scratch) {
  const AlignArgs& a = p.a;
  double whole[1] = {1};
  if (a.reduction == REDUCE_MEAN) {
    if (a.denominator) {
      whole[0] = *a.denominator;
    } else if (!a.row_weight) {
      whole[0] = static_cast<double>(row_count(a));
    } else {
      whole[0] = 0;
      if (p.weight_parts)
        for (int i = threadIdx.x; i < p.weight_parts; i += THREADS) whole[0] += a.workspace[WEIGHT_PARTS + i];
      else
        whole[0] = weights_from(a, threadIdx.x, THREADS);
      block_sum<THREADS>(whole, scratch);
    }
  }
  return whole[0] > 0 ? whole[0] : whole[0] <= 0 ? 1. : whole[0];  // no weight at all: 1; NaN stays
}

// What a row's loss and gradient are multiplied with. fp16 gradients of a mean would vanish (1e-8 of a row, say): they
// are held times a power of two, and `unit` undoes it exactly. Slope times scale is about 1/features for unit rows, and
// about 1 else; held, the gradient lies in the middle of fp16's range.
struct Factors {
  double loss, slope, unit;
};

__device__ inline Factors factors(const AlignArgs& a, double whole) {
  const double loss = loss_factor(a.distance, a.features), slope = slope_factor(a.distance, a.features) / whole;
  if (a.student.dtype != F16 || !(slope > 0.)) return {loss, slope, 1.};
  const bool unit_rows = a.norm == NORM_L2 || a.distance == COSINE;
  const double unit = ldexp(1., ilogb(slope) - (unit_rows && a.features > 8 ? ilogb(double(a.features)) - 3 : 0));
  return {loss, slope / unit, unit};
}

// The end of every row kernel: unit by block 0, this block's sum of losses, and by the last block the sum of those.
template <int THREADS> __device__ inline void end_rows(const Plan& p, double whole, double unit, double loss,
                                                       double* scratch) {
  __shared__ bool last;
  const AlignArgs& a = p.a;
  if (blockIdx.x == 0 && threadIdx.x == 0) *a.unit = static_cast<float>(unit);
  if (a.reduction == REDUCE_NONE) return;
  double sum[1] = {loss};
  block_sum<THREADS>(sum, scratch);
  if (threadIdx.x == 0) {
    a.workspace[LOSS_PARTS + blockIdx.x] = sum[0];
    __threadfence();
    last = atomicAdd(&tickets[p.ticket], 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  sum[0] = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += THREADS)
    sum[0] += load_shared_by_blocks(&a.workspace[LOSS_PARTS + i]);
  block_sum<THREADS>(sum, scratch);
  if (threadIdx.x == 0) {
    *a.loss = static_cast<float>(sum[0] / whole);
    tickets[p.ticket] = 0;
  }
}

// A row in the registers of THREADS threads, VECTORS times eight features each.
template <int THREADS, int VECTORS> struct Held {
  float s[VECTORS][8], t[VECTORS][8];
};

template <int THREADS, int VECTORS, class F> __device__ inline void each(int lane, int64_t features, F&& f) {
#pragma unroll
  for (int v = 0; v < VECTORS; ++v)
    if ((v * THREADS + lane) * 8 < features)
#pragma unroll
      for (int i = 0; i < 8; ++i) f(v, i);
}

// Replaces the student's features by its normalised ones, the teacher's by the slope; sums: loss, slope along the
// student, slope.
template <bool SMOOTH, int THREADS, int VECTORS>
__device__ inline void compare(Held<THREADS, VECTORS>& row, const Affine& as, const Affine& at, int lane,
                               const AlignArgs& a, float (&sums)[3]) {
  const float offset = offset_of(as, at);
  each<THREADS, VECTORS>(lane, a.features, [&](int v, int i) {
    const float e = difference(row.s[v][i], as, row.t[v][i], at, offset);
    const float x = (row.s[v][i] - as.mean) * as.scale;
    float slope;
    sums[0] += share<SMOOTH>(e, a.beta, slope);
    sums[1] += slope * x;
    sums[2] += slope;
    row.s[v][i] = x;
    row.t[v][i] = slope;
  });
}

// Blocks that a multiprocessor must be able to hold: left to itself the compiler spills for the sake of more.
constexpr int least_blocks(int threads) { return threads == 32 ? 4 : threads == 128 ? 6 : threads == 256 ? 3 : 1; }

template <int THREADS, int VECTORS>
__global__ void __launch_bounds__(THREADS == 32 ? 128 : THREADS, least_blocks(THREADS)) align_held(Plan p) {
  constexpr int BLOCK = THREADS == 32 ? 128 : THREADS, ROWS = BLOCK / THREADS;
  __shared__ double wide[BLOCK / 32];
  __shared__ float scratch[3 * BLOCK / 32];
  const AlignArgs& a = p.a;
  const double whole = whole_of<BLOCK>(p, wide);
  const Factors factor = factors(a, whole);
  const int lane = threadIdx.x % THREADS;
  double loss = 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * ROWS + threadIdx.x / THREADS; row < row_count(a);
       row += static_cast<int64_t>(gridDim.x) * ROWS) {
    const float weight = weight_of(a, row);
    float scale = 0.f, row_loss = 0.f;
    Projection through = {0.f, 0.f};
    Held<THREADS, VECTORS> held;
    if (weight != 0.f) {
      const RowIndex index = row_index(row, a.outer_rows, a.inner_rows);
      const int64_t s0 = row_offset(a.student, index), t0 = row_offset(a.teacher, index);
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        const int64_t column = (v * THREADS + lane) * 8;
        if (column < a.features) load8_bits(a.student.data, s0 + column, a.student.dtype, held.s[v]);
      }
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        const int64_t column = (v * THREADS + lane) * 8;
        if (column < a.features) load8_bits(a.teacher.data, t0 + column, a.teacher.dtype, held.t[v]);
      }
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) convert8(a.student.dtype, held.s[v]), convert8(a.teacher.dtype, held.t[v]);
      float s_mean = 0.f, t_mean = 0.f;
      if (a.norm == NORM_LAYER) {  // around the first feature, so that a constant row is exactly constant
        const float s_first = load(a.student.data, s0, a.student.dtype);
        const float t_first = load(a.teacher.data, t0, a.teacher.dtype);
        float sums[2] = {0.f, 0.f};
        each<THREADS, VECTORS>(lane, a.features, [&](int v, int i) {
          sums[0] += held.s[v][i] - s_first;
          sums[1] += held.t[v][i] - t_first;
        });
        block_sum<THREADS>(sums, scratch);
        s_mean = s_first + sums[0] / static_cast<float>(a.features);
        t_mean = t_first + sums[1] / static_cast<float>(a.features);
      }
      float squares[2] = {0.f, 0.f};
      if (a.norm != NORM_NONE || a.distance == COSINE) {
        each<THREADS, VECTORS>(lane, a.features, [&](int v, int i) {
          squares[0] += (held.s[v][i] - s_mean) * (held.s[v][i] - s_mean);
          squares[1] += (held.t[v][i] - t_mean) * (held.t[v][i] - t_mean);
        });
        block_sum<THREADS>(squares, scratch);
      }
      const Affine as = affine_from(s_mean, squares[0], a.features, a.norm, a.distance);
      const Affine at = affine_from(t_mean, squares[1], a.features, a.norm, a.distance);
      if (as.live && at.live) {
        float sums[3] = {0.f, 0.f, 0.f};
        if (a.distance == SMOOTH_L1) compare<true>(held, as, at, lane, a, sums);
        else compare<false>(held, as, at, lane, a, sums);
        block_sum<THREADS>(sums, scratch);
        row_loss = static_cast<float>(factor.loss * weight) * sums[0];
        through = projection(sums[1], sums[2], a.features, a.norm, a.distance);
        scale = static_cast<float>(factor.slope * weight) * as.scale;
      }
    }
    if (lane == 0) {
      if (a.reduction == REDUCE_NONE) a.loss[row] = row_loss;
      else loss += row_loss;
    }
    if (a.gradient) {
      const int64_t g0 = row * a.features;
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        const int64_t column = (v * THREADS + lane) * 8;
        if (column < a.features) {
          float g[8];
#pragma unroll
          for (int i = 0; i < 8; ++i)
            g[i] = scale == 0.f ? 0.f
                                : scale * (held.t[v][i] - through.slope_mean - held.s[v][i] * through.slope_along);
          store8(a.gradient, g0 + column, a.student.dtype, g);
        }
      }
    }
  }
  end_rows<BLOCK>(p, whole, factor.unit, loss, wide);
}

// Any width, any strides: the row is read again for each of its sums, from the caches where it fits.
// The bounds let the compiler have registers for two loads in flight; it would rather spill to seat more blocks.
template <int THREADS>
__global__ void __launch_bounds__(THREADS == 32 ? 128 : THREADS, THREADS == 32 ? 4 : 2) align_streamed(Plan p) {
  constexpr int BLOCK = THREADS == 32 ? 128 : THREADS, ROWS = BLOCK / THREADS;
  __shared__ double wide[BLOCK / 32];
  __shared__ float scratch[3 * BLOCK / 32];
  const AlignArgs& a = p.a;
  const double whole = whole_of<BLOCK>(p, wide);
  const Factors factor = factors(a, whole);
  const int lane = threadIdx.x % THREADS;
  double loss = 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * ROWS + threadIdx.x / THREADS; row < row_count(a);
       row += static_cast<int64_t>(gridDim.x) * ROWS) {
    const RowIndex index = row_index(row, a.outer_rows, a.inner_rows);
    const int64_t s0 = row_offset(a.student, index), t0 = row_offset(a.teacher, index);
    auto student = [&](int64_t c) { return load(a.student.data, s0 + c * a.student.column, a.student.dtype); };
    auto teacher = [&](int64_t c) { return load(a.teacher.data, t0 + c * a.teacher.column, a.teacher.dtype); };
    const float weight = weight_of(a, row);
    float scale = 0.f, row_loss = 0.f;
    Projection through = {0.f, 0.f};
    Affine as = {0.f, 1.f, true}, at = as;
    float offset = 0.f;
    auto slope_at = [&](int64_t c, float& part) {
      const float e = difference(student(c), as, teacher(c), at, offset);
      float slope;
      part = a.distance == SMOOTH_L1 ? share<true>(e, a.beta, slope) : share<false>(e, a.beta, slope);
      return slope;
    };
    if (weight != 0.f) {
      float s_mean = 0.f, t_mean = 0.f, squares[2] = {0.f, 0.f};
      if (a.norm == NORM_LAYER) {
        const float s_first = student(0), t_first = teacher(0);
        float sums[2] = {0.f, 0.f};
#pragma unroll 2
        for (int64_t c = lane; c < a.features; c += THREADS)
          sums[0] += student(c) - s_first, sums[1] += teacher(c) - t_first;
        block_sum<THREADS>(sums, scratch);
        s_mean = s_first + sums[0] / static_cast<float>(a.features);
        t_mean = t_first + sums[1] / static_cast<float>(a.features);
      }
      if (a.norm != NORM_NONE || a.distance == COSINE) {
#pragma unroll 2
        for (int64_t c = lane; c < a.features; c += THREADS) {
          const float s = student(c) - s_mean, t = teacher(c) - t_mean;
          squares[0] += s * s, squares[1] += t * t;
        }
        block_sum<THREADS>(squares, scratch);
      }
      as = affine_from(s_mean, squares[0], a.features, a.norm, a.distance);
      at = affine_from(t_mean, squares[1], a.features, a.norm, a.distance);
      offset = offset_of(as, at);
      if (as.live && at.live) {
        float sums[3] = {0.f, 0.f, 0.f};
#pragma unroll 2
        for (int64_t c = lane; c < a.features; c += THREADS) {
          float part;
          const float slope = slope_at(c, part);
          sums[0] += part, sums[1] += slope * ((student(c) - as.mean) * as.scale), sums[2] += slope;
        }
        block_sum<THREADS>(sums, scratch);
        row_loss = static_cast<float>(factor.loss * weight) * sums[0];
        through = projection(sums[1], sums[2], a.features, a.norm, a.distance);
        scale = static_cast<float>(factor.slope * weight) * as.scale;
      }
    }
    if (lane == 0) {
      if (a.reduction == REDUCE_NONE) a.loss[row] = row_loss;
      else loss += row_loss;
    }
    if (a.gradient) {
      const int64_t g0 = row * a.features;
#pragma unroll 2
      for (int64_t c = lane; c < a.features; c += THREADS) {
        float part, g = 0.f;
        if (scale != 0.f) {
          const float slope = slope_at(c, part);
          g = scale * (slope - through.slope_mean - (student(c) - as.mean) * as.scale * through.slope_along);
        }
        store(a.gradient, g0 + c, a.student.dtype, g);
      }
    }
  }
  end_rows<BLOCK>(p, whole, factor.unit, loss, wide);
}

bool vector_rows(const Rows& rows, const AlignArgs& a) {
  const int64_t size = rows.dtype == F32 ? 4 : 2;
  return rows.column == 1 && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 &&
         (a.outer_rows == 1 || rows.outer * size % 16 == 0) && (a.inner_rows == 1 || rows.inner * size % 16 == 0);
}

// How the rows are dealt: a kernel by width, and blocks enough to balance, few enough for their sums to be added fast.
struct Shape {
  int threads, vectors;  // of a row; vectors == 0: streamed
  int blocks;
};

constexpr int64_t BLOCKS_A_MULTIPROCESSOR = 32;

Shape shape_of(const AlignArgs& a, int multiprocessors) {
  const int64_t d = a.features;
  const bool held = d % 8 == 0 && d <= 8192 && vector_rows(a.student, a) && vector_rows(a.teacher, a) &&
                    reinterpret_cast<uintptr_t>(a.gradient) % 16 == 0;
  const int threads = d <= 1024 ? 32 : !held || (d > 2048 && d <= 4096) ? 256 : d <= 2048 ? 128 : 512;
  const int vectors = !held ? 0 : d > 1024 || d <= 512 ? 2 : d <= 768 ? 3 : 4;
  const int64_t rows = a.outer_rows * a.inner_rows, rows_a_block = threads == 32 ? 4 : 1;
  const int64_t wanted = (rows + rows_a_block - 1) / rows_a_block, most = multiprocessors * BLOCKS_A_MULTIPROCESSOR;
  const int64_t blocks = wanted < most ? wanted : most;
  return {threads, vectors, static_cast<int>(blocks > 0 ? blocks : 1)};  // no rows: one block writes the zeros
}

}  // namespace
}  // namespace compt

using namespace compt;

extern "C" int64_t compt_align_workspace(const AlignArgs* args, int multiprocessors) {
  return LOSS_PARTS + shape_of(*args, multiprocessors).blocks;
}

extern "C" int compt_align_rows(const AlignArgs* args, int multiprocessors, void* stream) {
  static std::atomic<unsigned> launches{0};
  Plan p{*args, 0, launches++ % TICKETS};
  const AlignArgs& a = p.a;
  const Shape shape = shape_of(a, multiprocessors);
  const int64_t rows = a.outer_rows * a.inner_rows;
  if (a.reduction == REDUCE_MEAN && a.row_weight && !a.denominator && rows > DIRECT_WEIGHTS) {
    const int64_t parts = (rows + DIRECT_WEIGHTS - 1) / DIRECT_WEIGHTS;
    p.weight_parts = static_cast<int>(parts < MAX_WEIGHT_PARTS ? parts : MAX_WEIGHT_PARTS);
    LAUNCH(weight_sums, dim3(p.weight_parts), dim3(WEIGHT_THREADS), 0, stream, a);
  }
  const dim3 grid(shape.blocks), block(shape.threads == 32 ? 128 : shape.threads);
  switch (shape.threads * 8 + shape.vectors) {
    case 32 * 8 + 2: LAUNCH((align_held<32, 2>), grid, block, 0, stream, p); break;
    case 32 * 8 + 3: LAUNCH((align_held<32, 3>), grid, block, 0, stream, p); break;
    case 32 * 8 + 4: LAUNCH((align_held<32, 4>), grid, block, 0, stream, p); break;
    case 128 * 8 + 2: LAUNCH((align_held<128, 2>), grid, block, 0, stream, p); break;
    case 256 * 8 + 2: LAUNCH((align_held<256, 2>), grid, block, 0, stream, p); break;
    case 512 * 8 + 2: LAUNCH((align_held<512, 2>), grid, block, 0, stream, p); break;
    case 32 * 8: LAUNCH(align_streamed<32>, grid, block, 0, stream, p); break;
    default: LAUNCH(align_streamed<256>, grid, block, 0, stream, p); break;
  }
  return LAST_ERROR();
}
