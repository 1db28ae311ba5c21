// KL between rows of vocabulary logits; what is computed: ops/distill_rows.py.
#pragma once
#include "rows.h"

namespace compt {

// Columns are adjacent.
struct DistillArgs {
  const float *student, *teacher;  // [rows, columns]
  int64_t student_stride, teacher_stride, rows, columns;
  const float* bound;  // [rows] or nullptr
  float inverse_temperature;
};

struct DistillGradientArgs {
  const float* statistics;  // [4, rows]
  const float* weight;      // [rows]
  void* slope;              // [rows, columns], or nullptr: the loss alone; fp32 may be the place of the student
  int64_t slope_stride;
  int slope_dtype;
  float* loss;  // [rows]
};

}  // namespace compt

extern "C" {
int compt_distill_statistics(const compt::DistillArgs* args, float* statistics, void* stream);
int compt_distill_gradient(const compt::DistillArgs* args, const compt::DistillGradientArgs* gradient, void* stream);
}
