// The contrastive and the distillation kernels on the emulator against fp64 loops, without torch: what the sanitizers
// run. Buffers are exactly as long as their strides need; gaps between rows and rows of weight 0 are NaN. Prints each
// case that is wrong; the exit status says whether any was.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "../../kernels/compt_kernels/csrc/contrastive.h"
#include "../../kernels/compt_kernels/csrc/device.h"
#include "../../kernels/compt_kernels/csrc/distill.h"

using namespace compt;

namespace {

std::mt19937 engine(1);

float normal() { return std::normal_distribution<float>()(engine); }

// A matrix whose memory ends with its last element, so that AddressSanitizer sees one byte too far.
struct Matrix {
  int64_t rows, columns, stride;
  int dtype;
  std::unique_ptr<char[]> data;
  Matrix(int64_t rows, int64_t columns, int64_t gap, int dtype = F32)
      : rows(rows), columns(columns), stride(columns + gap), dtype(dtype) {
    const int64_t size = (rows - 1) * stride + columns;
    data.reset(new char[size * element_size(dtype)]);
    for (int64_t i = 0; i < size; ++i) store(data.get(), i, dtype, NAN);
  }
  float* floats() { return reinterpret_cast<float*>(data.get()); }
  double at(int64_t row, int64_t column) const { return load(data.get(), row * stride + column, dtype); }
  void set(int64_t row, int64_t column, float x) { store(data.get(), row * stride + column, dtype, x); }
  template <class F> void fill(F&& f) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) set(i, j, f(i, j));
  }
};

struct Comparison {
  double error = 0, size = 0;
  void add(double got, double want) { error += (got - want) * (got - want), size += want * want; }
  bool within(double most, const char* what, const char* of) const {
    const double relative = std::sqrt(error / (size > 0 ? size : 1));
    if (relative <= most) return true;
    printf("wrong %s, %.1e: %s\n", what, relative, of);
    return false;
  }
};

double rounding(int dtype) { return dtype == BF16 ? 4e-3 : dtype == F16 ? 6e-4 : 1e-5; }

struct TileCase {
  int rows, columns, gap;
  int64_t diagonal;
  bool labels;
  int out;  // -1: in the place of the dots
};

struct Tile {
  TileCase c;
  Matrix dots;
  std::vector<int64_t> row_labels, column_labels;
  float scale = 0.8f;
  char name[96];
  explicit Tile(const TileCase& c) : c(c), dots(c.rows, c.columns, c.gap) {
    dots.fill([](int64_t, int64_t) { return normal(); });
    for (int i = 0; i < c.rows; ++i) row_labels.push_back(engine() % 5);
    for (int j = 0; j < c.columns; ++j) column_labels.push_back(engine() % 5);
    snprintf(name, sizeof name, "[%d, %d] gap %d diagonal %d labels %d out %d", c.rows, c.columns, c.gap,
             int(c.diagonal), c.labels, c.out);
  }
  TileArgs args(int multiprocessors) {
    return {dots.floats(), dots.stride, c.rows, c.columns, c.diagonal, c.labels ? row_labels.data() : nullptr,
            c.labels ? column_labels.data() : nullptr, &scale, multiprocessors};
  }
  bool own(int i, int j) const { return i + c.diagonal == j; }
  bool same(int i, int j) const { return c.labels && row_labels[i] == column_labels[j]; }
};

bool statistics(Tile& tile, int multiprocessors) {
  const TileCase& c = tile.c;
  const TileArgs args = tile.args(multiprocessors);
  Matrix rows(5, c.rows, 3), columns(4, c.columns, 1);
  rows.fill([](int64_t number, int64_t) { return number == 0 ? -1e30f : 0.f; });
  columns.fill([](int64_t number, int64_t) { return number == 0 ? -1e30f : 0.f; });
  const State of_rows{rows.floats(), rows.stride}, of_columns{columns.floats(), columns.stride};
  std::vector<float> workspace(compt_nce_workspace(&args), NAN);
  if (compt_nce_statistics(&args, &of_rows, &of_columns, workspace.data(), nullptr)) return false;
  Comparison sums, positives, owns;
  for (int side = 0; side < 2; ++side) {
    const Matrix& state = side ? columns : rows;
    for (int a = 0; a < (side ? c.columns : c.rows); ++a) {
      double sum = 0, positive = 0, count = 0;
      for (int b = 0; b < (side ? c.rows : c.columns); ++b) {
        const int i = side ? b : a, j = side ? a : b;
        if (tile.own(i, j)) {
          if (!side) owns.add(state.at(4, i), tile.dots.at(i, j));
          continue;
        }
        sum += std::exp(tile.scale * tile.dots.at(i, j));
        if (tile.same(i, j)) positive += tile.dots.at(i, j), count += 1;
      }
      sums.add(std::exp(state.at(0, a)) * state.at(1, a), sum);
      positives.add(state.at(2, a), positive), positives.add(state.at(3, a), count);
    }
  }
  return sums.within(1e-5, "sums", tile.name) & positives.within(1e-5, "positives", tile.name) &
         owns.within(0, "own pairs", tile.name);
}

bool gradient(const TileCase& c, int multiprocessors, bool sigmoid) {
  Tile tile(c);
  const TileArgs args = tile.args(multiprocessors);
  Matrix rows(4, c.rows, 2), columns(3, c.columns, c.gap), out(c.rows, c.columns, 2 * c.gap, c.out < 0 ? int(F32) : c.out);
  rows.fill([](int64_t, int64_t) { return normal(); });
  columns.fill([](int64_t, int64_t) { return normal(); });
  const float bias = -1.f, gain = 2.f;
  std::vector<double> want(c.rows * c.columns), want_sums(3 * c.rows);
  for (int i = 0; i < c.rows; ++i)
    for (int j = 0; j < c.columns; ++j) {
      const double x = tile.dots.at(i, j), z = tile.scale * x;
      double g;
      if (sigmoid) {
        const double sign = tile.own(i, j) || tile.same(i, j) ? -1 : 1;
        want_sums[i] += std::log1p(std::exp(sign * (z + bias)));
        g = sign / (1 + std::exp(-sign * (z + bias)));
        want_sums[c.rows + i] += g * x, want_sums[2 * c.rows + i] += g;
      } else {
        g = rows.at(1, i) * std::exp(z - rows.at(0, i)) + columns.at(1, j) * std::exp(z - columns.at(0, j));
        if (tile.same(i, j)) g -= rows.at(2, i) + columns.at(2, j);
        if (tile.own(i, j)) g = rows.at(3, i);
        want_sums[i] += g * x;
      }
      want[i * c.columns + j] = gain * g;
    }
  const SlopeArgs slope = c.out < 0 ? SlopeArgs{tile.dots.floats(), tile.dots.stride, F32, gain}
                                    : SlopeArgs{out.data.get(), out.stride, c.out, gain};
  const State of_rows{rows.floats(), rows.stride}, of_columns{columns.floats(), columns.stride};
  std::vector<float> sums((sigmoid ? 3 : 1) * c.rows, NAN);
  std::vector<float> workspace(sigmoid ? compt_sigmoid_workspace(&args) : compt_nce_gradient_workspace(&args), NAN);
  const int code = sigmoid ? compt_sigmoid_tile(&args, &bias, &slope, sums.data(), workspace.data(), nullptr)
                           : compt_nce_gradient(&args, &of_rows, &of_columns, &slope, sums.data(), workspace.data(), nullptr);
  Comparison slopes, totals;
  const Matrix& got = c.out < 0 ? tile.dots : out;
  for (int i = 0; i < c.rows; ++i)
    for (int j = 0; j < c.columns; ++j) slopes.add(got.at(i, j), want[i * c.columns + j]);
  for (size_t i = 0; i < sums.size(); ++i) totals.add(sums[i], want_sums[i]);
  return code == 0 & slopes.within(rounding(got.dtype), sigmoid ? "sigmoid slopes" : "slopes", tile.name) &
         totals.within(1e-5, sigmoid ? "sigmoid sums" : "totals", tile.name);
}

bool distill(int64_t rows, int64_t columns, int64_t gap, bool bounded, int out_dtype) {
  Matrix student(rows, columns, gap), teacher(rows, columns, 2 * gap);
  Matrix out(rows, columns, gap, out_dtype < 0 ? int(F32) : out_dtype);
  std::vector<float> weight(rows), bound(rows, 0.3f), statistics(4 * rows, NAN), loss(rows, NAN);
  std::vector<double> want(rows * columns), want_loss(rows);
  const double temperature = 1.5;
  for (int64_t i = 0; i < rows; ++i) {
    weight[i] = i % 3 == 1 ? 0 : 0.5f + i;
    if (weight[i] == 0) continue;  // its logits stay NaN
    double sum[2] = {0, 0};
    for (int64_t j = 0; j < columns; ++j) {
      student.set(i, j, 3 * normal()), teacher.set(i, j, j == 0 ? 1.f : 3 * normal());
      sum[0] += std::exp(student.at(i, j) / temperature);
      if (!bounded || teacher.at(i, j) >= bound[i]) sum[1] += std::exp(teacher.at(i, j) / temperature);
    }
    for (int64_t j = 0; j < columns; ++j) {
      const double p = std::exp(student.at(i, j) / temperature) / sum[0];
      const double q = !bounded || teacher.at(i, j) >= bound[i] ? std::exp(teacher.at(i, j) / temperature) / sum[1] : 0;
      if (q > 0) want_loss[i] += q * std::log(q / p);
      want[i * columns + j] = weight[i] * (p - q);
    }
  }
  const DistillArgs args{student.floats(), teacher.floats(), student.stride, teacher.stride, rows, columns,
                         bounded ? bound.data() : nullptr, static_cast<float>(1 / temperature)};
  const Matrix& got = out_dtype < 0 ? student : out;
  const DistillGradientArgs gradient{statistics.data(), weight.data(), got.data.get(), got.stride, got.dtype, loss.data()};
  const int code = compt_distill_statistics(&args, statistics.data(), nullptr) |
                   compt_distill_gradient(&args, &gradient, nullptr);
  char name[96];
  snprintf(name, sizeof name, "distill [%d, %d] gap %d bounded %d out %d", int(rows), int(columns), int(gap), bounded,
           out_dtype);
  Comparison slopes, losses;
  for (int64_t i = 0; i < rows; ++i) {
    losses.add(loss[i], want_loss[i]);
    for (int64_t j = 0; j < columns; ++j) slopes.add(got.at(i, j), want[i * columns + j]);
  }
  return code == 0 & slopes.within(rounding(got.dtype), "slopes", name) & losses.within(1e-5, "losses", name);
}

}  // namespace

extern "C" void compt_emulator_seed(unsigned seed);

int main(int argc, char** argv) {
  const bool few = argc > 1 && strcmp(argv[1], "few") == 0;  // one OS thread a CUDA thread is slow
  const int repeats = argc > 2 ? atoi(argv[2]) : 1;
  bool right = true;
  if (few) {
    Tile tile({3, 260, 0, 1, false, -1}), labelled({34, 40, 4, 0, true, -1});
    right &= statistics(tile, 0) & statistics(labelled, 0);
    right &= gradient({5, 260, 0, 0, true, BF16}, 1, false) & gradient({3, 260, 0, 0, false, -1}, 1, true);
    right &= distill(1, 4200, 0, true, -1);
  }
  for (int repeat = 0; repeat < (few ? 0 : repeats); ++repeat) {
    compt_emulator_seed(repeat);
    for (int columns : {1, 4, 37, 256, 517, 1100})
      for (int kind = 0; kind < 6; ++kind) {
        const TileCase c{kind % 2 ? 3 : 35, columns, kind % 3 * 4 % 7, kind - 2, kind % 4 > 1, kind % 3 - 1 ? kind % 3 : -1};
        Tile tile(c);
        right &= statistics(tile, kind % 3) & gradient(c, kind % 3, false) & gradient(c, kind % 3, true);
        if (columns != 256) right &= distill(4, columns * 4, c.gap, kind % 2, c.out);
      }
  }
  if (!few) {  // more parts of the columns than a merging block has warps
    Tile tile({290, 37, 0, 20, true, -1});
    right &= statistics(tile, 1) & gradient({290, 37, 0, 20, false, BF16}, 1, false);
  }
  puts(right ? "all right" : "WRONG");
  return right ? 0 : 1;
}
