// Tiles of image-text products, as they leave the matrix product. A block of eight warps walks some rows along some
// columns; what it finds for rows and columns goes to partial results that are merged in a fixed order: no atomics.
#include "contrastive.h"

#include "four.h"

namespace compt {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int STEP = 256;          // columns a step: each lane has two times four adjacent ones
constexpr int MERGED = 32;         // rows or columns that a merging block completes
constexpr int ROWS = 4;            // of a warp; with more, registers spill
constexpr float NOTHING = -1e30f;  // the maximum of no numbers: finite, so that two of them can be subtracted


// The column of a lane's element j < 8 in the step at `start`.
__device__ inline int column_of(int start, int j, int lane) { return start + j / 4 * 128 + lane * 4 + j % 4; }

// Which of a lane's eight columns are there, as bits.
__device__ inline unsigned columns_there(int start, int columns, int lane) {
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (column_of(start, j, lane) < columns) bits |= 1u << j;
  return bits;
}

// The own column of row 0 of the tile, where that could be in any step; else far away.
__device__ inline int own_column(int64_t row, int64_t diagonal) {
  const int64_t column = row + diagonal, far = 1 << 30;
  return static_cast<int>(column > far ? far : column < -far ? -far : column);
}

// The bit of column `own` in the step at `start`, or none.
__device__ inline unsigned own_bit(int own, int start, int lane) {
  const int column = own - start;
  if (column < 0 || column >= STEP || column % 128 / 4 != lane) return 0;
  return 1u << (column / 128 * 4 + column % 4);
}

template <bool VECTOR>
__device__ inline void load_row(const TileArgs& a, int row, int start, int lane, float (&x)[8]) {
  const float* from = a.dots + row * a.stride;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column = column_of(start, half * 4, lane);
    load4<VECTOR>(from + column, row < a.rows ? a.columns - column : 0, x + half * 4);
  }
}

__device__ inline void load_labels(const int64_t* labels, int start, unsigned there, int lane, int64_t (&x)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) x[j] = there >> j & 1 ? labels[column_of(start, j, lane)] : 0;
}

__device__ inline unsigned equal_bits(int64_t label, const int64_t (&others)[8]) {
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) bits |= (others[j] == label ? 1u : 0u) << j;
  return bits;
}

// A maximum and the sum of exponentials below it, joined with another.
__device__ inline void merge(float& high, float& sum, float other_high, float other_sum) {
  const float both = fmaxf(high, other_high);
  sum = sum * __expf(high - both) + other_sum * __expf(other_high - both);
  high = both;
}

struct Parts {
  float *rows, *columns;  // [spans, numbers, rows] and [row blocks, numbers, columns]
};

template <bool LABELS, bool VECTOR>
__global__ void __launch_bounds__(THREADS, LABELS || !VECTOR ? 1 : 2)
    nce_statistics(TileArgs a, State rows, int span, Parts parts) {
  constexpr int NUMBERS = LABELS ? 4 : 2;
  __shared__ float4 shared[NUMBERS][WARPS][STEP / 4];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = (static_cast<int>(blockIdx.x) * WARPS + warp) * ROWS;
  const int begin = blockIdx.y * span, end = begin + span < a.columns ? begin + span : a.columns;
  const int own_first = own_column(first, a.diagonal);
  const float scale = *a.scale;
  float high[ROWS], sum[ROWS], positive[ROWS], count[ROWS];
  int64_t label[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    high[r] = NOTHING, sum[r] = positive[r] = count[r] = 0.f;
    if constexpr (LABELS) label[r] = first + r < a.rows ? a.row_labels[first + r] : 0;
  }

  for (int start = begin; start < end; start += STEP) {
    float x[ROWS][8];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) load_row<VECTOR>(a, first + r, start, lane, x[r]);
    const unsigned there = columns_there(start, end, lane);
    unsigned others = 0, same = 0;  // eight bits a row: the pairs of other texts, and which of them are positive
    int64_t column_label[8];
    if constexpr (LABELS) load_labels(a.column_labels, start, there, lane, column_label);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const unsigned own = own_bit(own_first + r, start, lane) & there;
      const unsigned rest = first + r < a.rows ? there & ~own : 0;
      others |= rest << r * 8;
      if constexpr (LABELS) same |= (equal_bits(label[r], column_label) & rest) << r * 8;
      if (own && first + r < a.rows)
#pragma unroll
        for (int j = 0; j < 8; ++j)
          if (own >> j & 1) rows.data[4 * rows.stride + first + r] = x[r][j];

      float top = high[r], added = 0.f;
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (others >> (r * 8 + j) & 1) top = fmaxf(top, x[r][j] * scale);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (others >> (r * 8 + j) & 1) added += __expf(fmaf(x[r][j], scale, -top));
        if (LABELS && same >> (r * 8 + j) & 1) positive[r] += x[r][j], count[r] += 1.f;
      }
      sum[r] = sum[r] * __expf(high[r] - top) + added;
      high[r] = top;
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float found[NUMBERS][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = half * 4 + i;
        float top = NOTHING, added = 0.f, kept = 0.f, number = 0.f;
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
          if (others >> (r * 8 + j) & 1) top = fmaxf(top, x[r][j] * scale);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          if (others >> (r * 8 + j) & 1) added += __expf(fmaf(x[r][j], scale, -top));
          if (LABELS && same >> (r * 8 + j) & 1) kept += x[r][j], number += 1.f;
        }
        found[0][i] = top, found[1][i] = added;
        if constexpr (LABELS) found[2][i] = kept, found[3][i] = number;
      }
#pragma unroll
      for (int k = 0; k < NUMBERS; ++k)
        shared[k][warp][half * 32 + lane] = make_float4(found[k][0], found[k][1], found[k][2], found[k][3]);
    }
    __syncthreads();
    if (start + static_cast<int>(threadIdx.x) < end) {
      float merged[NUMBERS] = {NOTHING};
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        merge(merged[0], merged[1], reinterpret_cast<const float*>(shared[0][w])[threadIdx.x],
              reinterpret_cast<const float*>(shared[1][w])[threadIdx.x]);
#pragma unroll
        for (int k = 2; k < NUMBERS; ++k) merged[k] += reinterpret_cast<const float*>(shared[k][w])[threadIdx.x];
      }
#pragma unroll
      for (int k = 0; k < NUMBERS; ++k)
        parts.columns[(static_cast<int64_t>(blockIdx.x) * NUMBERS + k) * a.columns + start + threadIdx.x] = merged[k];
    }
    __syncthreads();  // the next step writes where this one was read
  }

#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    float top = high[r];
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, offset));
    float found[3] = {sum[r] * __expf(high[r] - top), positive[r], count[r]};
    warp_sum(found);
    if (lane == 0 && first + r < a.rows) {
      float* out = parts.rows + static_cast<int64_t>(blockIdx.y) * NUMBERS * a.rows + first + r;
      out[0] = top, out[a.rows] = found[0];
      if constexpr (LABELS) out[2 * a.rows] = found[1], out[3 * a.rows] = found[2];
    }
  }
}

struct Merge {
  const float* parts;  // [count, numbers, width]
  int64_t count, width;
  State state;
};

// Joins the parts of 32 rows or columns (blockIdx.y) to their state: eight warps take every eighth part, the first
// takes what they have.
template <int NUMBERS> __global__ void __launch_bounds__(THREADS) merge_parts(Merge of_rows, Merge of_columns) {
  __shared__ float shared[NUMBERS][WARPS][MERGED];
  Merge m = of_rows;
  if (blockIdx.y) m = of_columns;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * MERGED + lane;
  float found[NUMBERS] = {NOTHING};
  if (item < m.width)
    for (int64_t part = warp; part < m.count; part += WARPS) {
      const float* from = m.parts + part * NUMBERS * m.width + item;
      merge(found[0], found[1], from[0], from[m.width]);
#pragma unroll
      for (int k = 2; k < NUMBERS; ++k) found[k] += from[k * m.width];
    }
#pragma unroll
  for (int k = 0; k < NUMBERS; ++k) shared[k][warp][lane] = found[k];
  __syncthreads();
  if (warp != 0 || item >= m.width) return;
  float* to = m.state.data + item;
#pragma unroll
  for (int k = 0; k < NUMBERS; ++k) found[k] = to[k * m.state.stride];
  for (int w = 0; w < WARPS; ++w) {
    merge(found[0], found[1], shared[0][w][lane], shared[1][w][lane]);
#pragma unroll
    for (int k = 2; k < NUMBERS; ++k) found[k] += shared[k][w][lane];
  }
#pragma unroll
  for (int k = 0; k < NUMBERS; ++k) to[k * m.state.stride] = found[k];
}

template <bool VECTOR>
__device__ inline void load_numbers(const State& state, int number, int start, int columns, int lane,
                                    float (&x)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column = column_of(start, half * 4, lane);
    load4<VECTOR>(state.data + number * state.stride + column, columns - column, x + half * 4);
  }
}

template <bool LABELS, bool VECTOR>
__global__ void __launch_bounds__(THREADS, LABELS ? 1 : 2)
    nce_gradient(TileArgs a, State rows, State columns, SlopeArgs slope, int span, float* sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = (static_cast<int>(blockIdx.x) * WARPS + warp) * ROWS;
  const int begin = blockIdx.y * span, end = begin + span < a.columns ? begin + span : a.columns;
  const int own_first = own_column(first, a.diagonal);
  const float scale = *a.scale;
  float reference[ROWS], weight[ROWS], own_slope[ROWS], target[ROWS], sum[ROWS];
  int64_t label[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int row = first + r < a.rows ? first + r : 0;
    reference[r] = rows.data[row], weight[r] = rows.data[rows.stride + row];
    own_slope[r] = rows.data[3 * rows.stride + row], sum[r] = 0.f;
    if constexpr (LABELS) target[r] = rows.data[2 * rows.stride + row], label[r] = a.row_labels[row];
  }
  for (int start = begin; start < end; start += STEP) {
    float x[ROWS][8], column_reference[8], column_weight[8], column_target[8];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) load_row<VECTOR>(a, first + r, start, lane, x[r]);
    load_numbers<VECTOR>(columns, 0, start, a.columns, lane, column_reference);
    load_numbers<VECTOR>(columns, 1, start, a.columns, lane, column_weight);
    const unsigned there = columns_there(start, end, lane);
    int64_t column_label[8];
    if constexpr (LABELS) {
      load_numbers<VECTOR>(columns, 2, start, a.columns, lane, column_target);
      load_labels(a.column_labels, start, there, lane, column_label);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int row = first + r;
      if (row >= a.rows) continue;
      const unsigned own = own_bit(own_first + r, start, lane);
      const unsigned same = LABELS ? equal_bits(label[r], column_label) : 0;
      float out[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float g = weight[r] * __expf(fmaf(x[r][j], scale, -reference[r]));
        g = fmaf(column_weight[j], __expf(fmaf(x[r][j], scale, -column_reference[j])), g);
        if (LABELS && same >> j & 1) g -= target[r] + column_target[j];
        if (own >> j & 1) g = own_slope[r];
        if (there >> j & 1) sum[r] = fmaf(g, x[r][j], sum[r]);
        out[j] = g * slope.gain;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = column_of(start, half * 4, lane);
        store4<VECTOR>(slope.data, row * slope.stride + column, slope.dtype, end - column, out + half * 4);
      }
    }
  }
  warp_sum(sum);
  if (lane == 0)
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
      if (first + r < a.rows) sums[blockIdx.y * a.rows + first + r] = sum[r];
}

// One warp a row: the logarithm makes the code long, so that it is not unrolled over rows.
template <bool LABELS, bool VECTOR, bool GRADIENT>
__global__ void __launch_bounds__(THREADS) sigmoid_tile(TileArgs a, const float* bias, SlopeArgs slope, int span,
                                                        float* sums) {
  const int lane = threadIdx.x % 32;
  const int row = blockIdx.x * WARPS + threadIdx.x / 32;
  if (row >= a.rows) return;  // a whole warp
  const int begin = blockIdx.y * span, end = begin + span < a.columns ? begin + span : a.columns;
  const int own = own_column(row, a.diagonal);
  const float scale = *a.scale, shift = *bias;
  const int64_t label = LABELS ? a.row_labels[row] : 0;
  float sum[3] = {0.f, 0.f, 0.f};
  for (int start = begin; start < end; start += STEP) {
    float x[8], out[8];
    load_row<VECTOR>(a, row, start, lane, x);
    const unsigned there = columns_there(start, end, lane);
    unsigned positive = own_bit(own, start, lane);
    if constexpr (LABELS) {
      int64_t column_label[8];
      load_labels(a.column_labels, start, there, lane, column_label);
      positive |= equal_bits(label, column_label);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float logit = fmaf(x[j], scale, shift), sign = positive >> j & 1 ? -1.f : 1.f, z = sign * logit;
      const float e = expf(-fabsf(z));  // the loss is log(1 + exp(z)), its slope 1 / (1 + exp(-z))
      if (!(there >> j & 1)) continue;
      sum[0] += fmaxf(z, 0.f) + log1pf(e);
      if constexpr (GRADIENT) {
        const float g = sign * (z >= 0.f ? 1.f : e) / (1.f + e);
        sum[1] = fmaf(g, x[j], sum[1]);
        sum[2] += g;
        out[j] = g * slope.gain;
      }
    }
    if constexpr (GRADIENT)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = column_of(start, half * 4, lane);
        store4<VECTOR>(slope.data, row * slope.stride + column, slope.dtype, end - column, out + half * 4);
      }
  }
  warp_sum(sum);
  if (lane == 0)
#pragma unroll
    for (int k = 0; k < 3; ++k) sums[(static_cast<int64_t>(blockIdx.y) * 3 + k) * a.rows + row] = sum[k];
}

// out[i] = the sum of parts[0..count][i], in order.
__global__ void __launch_bounds__(THREADS) sum_parts(const float* parts, int64_t count, int64_t width, float* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= width) return;
  float sum = 0.f;
  for (int64_t part = 0; part < count; ++part) sum += parts[part * width + i];
  out[i] = sum;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows by blocks of `block_rows`, columns by spans, so that every multiprocessor has about four blocks.
struct Cut {
  int64_t row_blocks, span, spans;
};

Cut cut(const TileArgs& a, int block_rows) {
  const int64_t row_blocks = divide_up(a.rows, block_rows), steps = divide_up(a.columns, STEP);
  int64_t spans = divide_up(4 * int64_t{a.multiprocessors}, row_blocks);
  spans = spans < 1 ? 1 : spans > steps ? steps : spans;
  const int64_t span = divide_up(steps, spans) * STEP;
  return {row_blocks, span, divide_up(a.columns, span)};
}

dim3 grid_of(const Cut& c) { return dim3(static_cast<unsigned>(c.row_blocks), static_cast<unsigned>(c.spans)); }

}  // namespace
}  // namespace compt

using namespace compt;

extern "C" int64_t compt_nce_workspace(const TileArgs* tile) {
  const Cut c = cut(*tile, WARPS * ROWS);
  return (c.spans * tile->rows + c.row_blocks * tile->columns) * (tile->row_labels ? 4 : 2);
}

extern "C" int compt_nce_statistics(const TileArgs* tile, const State* rows, const State* columns, float* workspace,
                                    void* stream) {
  const TileArgs a = *tile;
  if (a.rows == 0 || a.columns == 0) return 0;
  const bool labels = a.row_labels, vector = aligned4(a.dots, a.stride, 4);
  const Cut c = cut(a, WARPS * ROWS);
  const int span = static_cast<int>(c.span);
  const State state = *rows;
  const Parts parts{workspace, workspace + c.spans * a.rows * (labels ? 4 : 2)};
  const dim3 block(THREADS);
  if (labels && vector) LAUNCH((nce_statistics<true, true>), grid_of(c), block, 0, stream, a, state, span, parts);
  else if (labels) LAUNCH((nce_statistics<true, false>), grid_of(c), block, 0, stream, a, state, span, parts);
  else if (vector) LAUNCH((nce_statistics<false, true>), grid_of(c), block, 0, stream, a, state, span, parts);
  else LAUNCH((nce_statistics<false, false>), grid_of(c), block, 0, stream, a, state, span, parts);
  const Merge of_rows{parts.rows, c.spans, a.rows, *rows}, of_columns{parts.columns, c.row_blocks, a.columns, *columns};
  const int64_t widest = a.rows > a.columns ? a.rows : a.columns;
  const dim3 grid(static_cast<unsigned>(divide_up(widest, MERGED)), 2);
  if (labels) LAUNCH(merge_parts<4>, grid, block, 0, stream, of_rows, of_columns);
  else LAUNCH(merge_parts<2>, grid, block, 0, stream, of_rows, of_columns);
  return LAST_ERROR();
}

namespace {

int finish_sums(const float* parts, int64_t count, int64_t width, float* out, void* stream) {
  if (parts == out) return LAST_ERROR();
  const dim3 grid(static_cast<unsigned>(divide_up(width, THREADS)));
  LAUNCH(sum_parts, grid, dim3(THREADS), 0, stream, parts, count, width, out);
  return LAST_ERROR();
}

}  // namespace

extern "C" int64_t compt_nce_gradient_workspace(const TileArgs* tile) {
  const Cut c = cut(*tile, WARPS * ROWS);
  return c.spans > 1 ? c.spans * tile->rows : 0;
}

extern "C" int64_t compt_sigmoid_workspace(const TileArgs* tile) {
  const Cut c = cut(*tile, WARPS);
  return c.spans > 1 ? c.spans * 3 * tile->rows : 0;
}

extern "C" int compt_nce_gradient(const TileArgs* tile, const State* rows, const State* columns, const SlopeArgs* slope,
                                  float* sums, float* workspace, void* stream) {
  const TileArgs a = *tile;
  if (a.rows == 0 || a.columns == 0) return 0;
  const bool labels = a.row_labels;
  const bool vector = aligned4(a.dots, a.stride, 4) && aligned4(columns->data, columns->stride, 4) &&
                      aligned4(slope->data, slope->stride, slope->dtype == F32 ? 4 : 2);
  const Cut c = cut(a, WARPS * ROWS);
  const int span = static_cast<int>(c.span);
  const State r = *rows, q = *columns;
  const SlopeArgs s = *slope;
  float* out = c.spans > 1 ? workspace : sums;
  const dim3 block(THREADS);
  if (labels && vector) LAUNCH((nce_gradient<true, true>), grid_of(c), block, 0, stream, a, r, q, s, span, out);
  else if (labels) LAUNCH((nce_gradient<true, false>), grid_of(c), block, 0, stream, a, r, q, s, span, out);
  else if (vector) LAUNCH((nce_gradient<false, true>), grid_of(c), block, 0, stream, a, r, q, s, span, out);
  else LAUNCH((nce_gradient<false, false>), grid_of(c), block, 0, stream, a, r, q, s, span, out);
  return finish_sums(out, c.spans, a.rows, sums, stream);
}

extern "C" int compt_sigmoid_tile(const TileArgs* tile, const float* bias, const SlopeArgs* slope, float* sums,
                                  float* workspace, void* stream) {
  const TileArgs a = *tile;
  if (a.rows == 0 || a.columns == 0) return 0;
  const bool labels = a.row_labels, gradient = slope->data;
  const bool vector = aligned4(a.dots, a.stride, 4) &&
                      (!gradient || aligned4(slope->data, slope->stride, slope->dtype == F32 ? 4 : 2));
  const Cut c = cut(a, WARPS);
  const int span = static_cast<int>(c.span);
  const SlopeArgs s = *slope;
  float* out = c.spans > 1 ? workspace : sums;
  const dim3 block(THREADS), grid = grid_of(c);
  const int choice = (labels ? 4 : 0) + (vector ? 2 : 0) + (gradient ? 1 : 0);
  switch (choice) {
    case 0: LAUNCH((sigmoid_tile<false, false, false>), grid, block, 0, stream, a, bias, s, span, out); break;
    case 1: LAUNCH((sigmoid_tile<false, false, true>), grid, block, 0, stream, a, bias, s, span, out); break;
    case 2: LAUNCH((sigmoid_tile<false, true, false>), grid, block, 0, stream, a, bias, s, span, out); break;
    case 3: LAUNCH((sigmoid_tile<false, true, true>), grid, block, 0, stream, a, bias, s, span, out); break;
    case 4: LAUNCH((sigmoid_tile<true, false, false>), grid, block, 0, stream, a, bias, s, span, out); break;
    case 5: LAUNCH((sigmoid_tile<true, false, true>), grid, block, 0, stream, a, bias, s, span, out); break;
    case 6: LAUNCH((sigmoid_tile<true, true, false>), grid, block, 0, stream, a, bias, s, span, out); break;
    default: LAUNCH((sigmoid_tile<true, true, true>), grid, block, 0, stream, a, bias, s, span, out);
  }
  return finish_sums(out, c.spans, 3 * a.rows, sums, stream);
}
