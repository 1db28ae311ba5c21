// The alignment kernels on the emulator against fp64 loops, without torch: what the sanitizers run.
// Buffers are exactly as long as their strides need, the gaps between strided elements are NaN, and so are the rows of
// weight 0. Prints each case that is wrong; the exit status says whether any was.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "../../kernels/compt_kernels/csrc/align.h"
#include "../../kernels/compt_kernels/csrc/device.h"
#include "../../kernels/compt_kernels/csrc/scale.h"

using namespace compt;

namespace {

std::mt19937 engine(1);

double normal() { return std::normal_distribution<double>()(engine); }

// Memory of exactly `bytes`, so that AddressSanitizer sees one byte too far.
struct Buffer {
  std::unique_ptr<char[]> data;
  int dtype = F32;
  Buffer(int64_t elements, int dtype) : data(new char[elements * element_size(dtype) + 1]), dtype(dtype) {
    data.reset(new char[elements * element_size(dtype)]);
    for (int64_t i = 0; i < elements; ++i) set(i, NAN);
  }
  void set(int64_t i, double x) {
    if (dtype == U8) reinterpret_cast<uint8_t*>(data.get())[i] = x > 0.3;
    else store(data.get(), i, dtype, static_cast<float>(x));
  }
  double get(int64_t i) const { return load(data.get(), i, dtype); }
};

struct Case {
  int64_t outer, inner, features;
  int student, teacher, weights;  // dtypes; weights -1: none
  int norm, distance, reduction;
  int64_t gap;     // elements between rows
  int64_t column;  // stride of the features
};

int64_t span(const Case& c, const Rows& rows) {
  return (c.outer - 1) * rows.outer + (c.inner - 1) * rows.inner + (c.features - 1) * rows.column + 1;
}

Rows rows_for(const Case& c, int dtype, int64_t gap) {
  const int64_t inner = c.features * c.column + gap;
  return {nullptr, c.inner * inner + 2 * gap, inner, c.column, dtype};
}

struct Wanted {
  std::vector<double> loss, gradient;
};

// One row by the formulas of reference/align.py, in fp64; the gradient without the reduction's divisor.
double row_by_formula(const Case& c, std::vector<double> s, std::vector<double> t, double beta, double* gradient) {
  const int64_t d = c.features;
  const bool unit = c.norm == NORM_L2 || c.distance == COSINE, centred = c.norm == NORM_LAYER;
  double scale[2] = {1, 1};
  std::vector<double>* sides[2] = {&s, &t};
  for (int side = 0; side < 2; ++side) {
    double mean = 0, squares = 0;
    for (double v : *sides[side]) mean += v / d;
    for (double& v : *sides[side]) v -= centred ? mean : 0;
    for (double v : *sides[side]) squares += v * v;
    if (unit) scale[side] = 1 / std::sqrt(squares);
    else if (centred) scale[side] = 1 / std::sqrt(squares / d + 1e-5);
    for (double& v : *sides[side]) v *= scale[side];
    if ((unit || centred) && std::sqrt(squares) <= 1e-12) return 0;
  }
  double loss = 0, along = 0, sum = 0;
  std::vector<double> slope(d);
  for (int64_t i = 0; i < d; ++i) {
    const double e = s[i] - t[i], size = std::fabs(e);
    if (c.distance == MSE) loss += e * e / d, slope[i] = 2 * e / d;
    else if (c.distance == COSINE) loss += e * e / 2, slope[i] = e;
    else loss += (size < beta ? e * e / 2 / beta : size - beta / 2) / d, slope[i] = std::fmax(-1, std::fmin(1, e / beta)) / d;
    along += slope[i] * s[i], sum += slope[i];
  }
  for (int64_t i = 0; i < d; ++i)
    gradient[i] = scale[0] * (slope[i] - (centred ? sum / d : 0) - s[i] * (unit ? along : centred ? along / d : 0));
  return loss;
}

bool check(const Case& c, const char* what, const std::vector<double>& got, const std::vector<double>& want, double most) {
  double error = 0, size = 0;
  for (size_t i = 0; i < want.size(); ++i) error += std::pow(got[i] - want[i], 2), size += want[i] * want[i];
  error = std::sqrt(error / (size > 0 ? size : 1));
  if (error <= most) return true;
  printf("wrong %s, %.1e: [%d, %d, %d] dtypes %d %d %d norm %d distance %d reduction %d gap %d column %d\n", what, error,
         int(c.outer), int(c.inner), int(c.features), c.student, c.teacher, c.weights, c.norm, c.distance, c.reduction,
         int(c.gap), int(c.column));
  return false;
}

// multiprocessors 0: one block takes all the rows.
bool run(const Case& c, int multiprocessors) {
  const int64_t rows = c.outer * c.inner, d = c.features;
  const float beta = 0.4f;
  AlignArgs a{};
  a.student = rows_for(c, c.student, c.gap), a.teacher = rows_for(c, c.teacher, 2 * c.gap);
  a.outer_rows = c.outer, a.inner_rows = c.inner, a.features = d;
  a.norm = c.norm, a.distance = c.distance, a.reduction = c.reduction, a.beta = beta;
  Buffer student(span(c, a.student), c.student), teacher(span(c, a.teacher), c.teacher);
  Buffer weights(c.weights < 0 ? 0 : rows, c.weights < 0 ? int(F32) : c.weights), gradient(rows * d, c.student);
  std::vector<double> want_loss, want_gradient(rows * d);
  double whole = 0;
  for (int64_t row = 0; row < rows; ++row) {
    double weight = 1;
    if (c.weights >= 0) weights.set(row, row % 3 == 1 ? 0 : std::fabs(normal()) + 0.4), weight = weights.get(row);
    whole += weight;
    std::vector<double> s(d), t(d);
    if (weight == 0) {  // its elements stay NaN
      want_loss.push_back(0);
      continue;
    }
    const int64_t s0 = row / c.inner * a.student.outer + row % c.inner * a.student.inner;
    const int64_t t0 = row / c.inner * a.teacher.outer + row % c.inner * a.teacher.inner;
    for (int64_t i = 0; i < d; ++i) {
      const double base = normal();
      student.set(s0 + i * c.column, row == 3 ? 0 : base + 0.3), s[i] = student.get(s0 + i * c.column);
      teacher.set(t0 + i * c.column, row == 5 ? 0 : base + 0.1 * normal()), t[i] = teacher.get(t0 + i * c.column);
    }
    want_loss.push_back(weight * row_by_formula(c, s, t, beta, &want_gradient[row * d]));
    for (int64_t i = 0; i < d; ++i) want_gradient[row * d + i] *= weight;
  }
  if (c.reduction != REDUCE_NONE) {
    const double divisor = c.reduction == REDUCE_MEAN ? whole : 1;
    double sum = 0;
    for (double loss : want_loss) sum += loss / divisor;
    for (double& g : want_gradient) g /= divisor;
    want_loss = {sum};
  }
  std::vector<float> loss(want_loss.size(), NAN), unit(1, NAN);
  a.student.data = student.data.get(), a.teacher.data = teacher.data.get();
  a.row_weight = c.weights < 0 ? nullptr : weights.data.get(), a.row_weight_dtype = weights.dtype;
  a.gradient = gradient.data.get(), a.loss = loss.data(), a.unit = unit.data();
  std::vector<double> workspace(compt_align_workspace(&a, multiprocessors), NAN);
  a.workspace = workspace.data();
  bool right = compt_align_rows(&a, multiprocessors, nullptr) == 0;
  const float upstream = 2.f / unit[0];  // what fp16 can hold: a loss scale
  compt_scale_rows(gradient.data.get(), c.student, rows, d, &upstream, false, unit.data(), 1, nullptr);
  std::vector<double> got(rows * d);
  for (int64_t i = 0; i < rows * d; ++i) got[i] = gradient.get(i) / upstream;
  right &= check(c, "loss", std::vector<double>(loss.begin(), loss.end()), want_loss, 1e-6);
  return check(c, "gradient", got, want_gradient, c.student == F32 ? 2e-5 : c.student == BF16 ? 5e-3 : 1e-3) && right;
}

}  // namespace

extern "C" void compt_emulator_seed(unsigned seed);

int main(int argc, char** argv) {
  const bool few = argc > 1 && strcmp(argv[1], "few") == 0;  // one OS thread a CUDA thread is slow
  const int repeats = argc > 2 ? atoi(argv[2]) : 1;
  bool right = true;
  if (few) {
    right &= run({1, 2, 1536, F32, F32, U8, NORM_L2, COSINE, REDUCE_MEAN, 0, 1}, 0);
    right &= run({1, 6, 40, BF16, F32, F32, NORM_LAYER, MSE, REDUCE_MEAN, 0, 1}, 0);
    right &= run({1, 1, 1100, F16, BF16, -1, NORM_L2, SMOOTH_L1, REDUCE_SUM, 3, 1}, 0);
  }
  for (int repeat = 0; repeat < (few ? 0 : repeats); ++repeat) {
    compt_emulator_seed(repeat);
    for (int64_t features : {1, 8, 40, 77, 512, 768, 1000, 1100, 1536, 2056, 8192, 8193})
      for (int setting = 0; setting < 9; ++setting) {
        const int kind = static_cast<int>(features) + setting;
        Case c{1, features > 1100 ? 7 : 11, features, kind % 3, (kind / 3 + setting) % 3, kind % 5 - 1, setting % 3,
               setting / 3, kind % 3, 0, 1};
        if (kind % 4 == 1) c.outer = 2, c.inner = 4, c.gap = 8;  // rows apart, still aligned
        if (kind % 4 == 2) c.outer = 1 + setting % 3, c.inner = 3, c.gap = 3;  // no longer aligned
        if (kind % 8 == 3) c.column = 2;
        if (features == 1) c.norm = NORM_NONE, c.distance = setting % 2 * SMOOTH_L1;  // a single feature has no direction
        right &= run(c, setting % 2);
      }
    right &= run({1, 5000, 8, F32, F32, F32, NORM_L2, MSE, REDUCE_MEAN, 0, 1}, 1);  // weights summed by blocks of their own
  }
  puts(right ? "all right" : "WRONG");
  return right ? 0 : 1;
}
