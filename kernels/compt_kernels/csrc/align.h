// The alignment loss on rows, forward and gradient; the formulas: reference/align.py.
#pragma once
#include "rows.h"

namespace compt {

enum Norm : int { NORM_NONE = 0, NORM_L2 = 1, NORM_LAYER = 2 };
enum Distance : int { MSE = 0, COSINE = 1, SMOOTH_L1 = 2 };
enum Reduction : int { REDUCE_NONE = 0, REDUCE_SUM = 1, REDUCE_MEAN = 2 };

struct AlignArgs {
  Rows student, teacher;      // [outer, inner, features]
  const void* row_weight;     // [outer * inner] or nullptr
  int row_weight_dtype;
  void* gradient;             // [outer * inner, features] in the student's dtype, or nullptr
  int64_t outer_rows, inner_rows, features;
  int norm, distance, reduction;
  float beta;
  const float* denominator;  // what `mean` divides by; nullptr: the sum of the weights, the number of rows without
  float* loss;               // [outer * inner] for REDUCE_NONE, else one number
  float* unit;               // one number: what the gradient must be multiplied with to be the gradient
  double* workspace;         // align_workspace() doubles
};

// One pass of the form whose features are split over ranks; `rows` is outer_rows * inner_rows.
struct AlignPartArgs {
  Rows student, teacher;  // [outer, inner, this rank's features]
  void* gradient;         // [rows, features] in the student's dtype
  int64_t outer_rows, inner_rows, features;
  int distance;
  float beta;
  const float* means;     // [2, rows]: subtracted from student and teacher before they are squared, or nullptr
  const float* affine;    // [5, rows]: mean and scale of the student and of the teacher; 1 where the row counts, or 0
  const float* through;   // [3, rows], f, m, a: gradient = f * (slope - m - a * the student's normalised feature)
  double* sums;           // [2 or 3, rows]: over this rank's features
};

}  // namespace compt

extern "C" {
int64_t compt_align_workspace(const compt::AlignArgs* args, int multiprocessors);
int compt_align_rows(const compt::AlignArgs* args, int multiprocessors, void* stream);
int compt_align_totals(const compt::AlignPartArgs* args, void* stream);    // sums [2]: of the features
int compt_align_squares(const compt::AlignPartArgs* args, void* stream);   // sums [2]: of the squares around shift
int compt_align_distance(const compt::AlignPartArgs* args, void* stream);  // sums [3]: loss, slope along student, slope
int compt_align_gradient(const compt::AlignPartArgs* args, void* stream);
}
