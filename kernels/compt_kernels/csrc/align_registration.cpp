#include "align.h"

#include "registration.h"

namespace compt {
namespace {

void check_rows(const Tensor& student, const Tensor& teacher) {
  STD_TORCH_CHECK(student.dim() == 3 && teacher.dim() == 3, "align: student and teacher must be [outer, inner, features]");
  for (int64_t i = 0; i < 3; ++i)
    STD_TORCH_CHECK(student.size(i) == teacher.size(i), "align: student and teacher differ in size ", i);
}

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

std::tuple<Tensor, Tensor, Tensor> align_rows(Tensor student, Tensor teacher, std::optional<Tensor> row_weight,
                                              std::optional<Tensor> denominator, int64_t norm, int64_t distance,
                                              int64_t reduction, double beta, bool with_gradient) {
  check_rows(student, teacher);
  const int64_t outer = student.size(0), inner = student.size(1), features = student.size(2), rows = outer * inner;
  if (row_weight)
    STD_TORCH_CHECK(row_weight->numel() == rows && row_weight->is_contiguous(), "align: row_weight must be [rows]");
  if (denominator) STD_TORCH_CHECK(denominator->scalar_type() == ScalarType::Float, "align: denominator must be float32");
  const Device device(student);
  const auto fp32 = std::make_optional(ScalarType::Float), fp64 = std::make_optional(ScalarType::Double);
  Tensor loss = reduction == REDUCE_NONE ? torch::stable::new_empty(student, {rows}, fp32)
                                         : torch::stable::new_empty(student, {}, fp32);
  Tensor gradient = torch::stable::new_empty(student, {with_gradient ? rows : 0, features});
  Tensor unit = torch::stable::new_empty(student, {}, fp32);

  AlignArgs a{};
  a.student = rows_of(student, "student");
  a.teacher = rows_of(teacher, "teacher");
  a.row_weight = row_weight ? row_weight->data_ptr() : nullptr;
  a.row_weight_dtype = row_weight ? dtype_of(*row_weight, "row_weight") : F32;
  a.gradient = with_gradient && rows > 0 ? gradient.data_ptr() : nullptr;
  a.outer_rows = outer, a.inner_rows = inner, a.features = features;
  a.norm = static_cast<int>(norm), a.distance = static_cast<int>(distance), a.reduction = static_cast<int>(reduction);
  a.beta = static_cast<float>(beta);
  a.denominator = denominator ? floats(*denominator) : nullptr;
  a.loss = floats(loss), a.unit = floats(unit);
  Tensor workspace = torch::stable::new_empty(student, {compt_align_workspace(&a, device.multiprocessors())}, fp64);
  a.workspace = static_cast<double*>(workspace.data_ptr());
  check_launch(compt_align_rows(&a, device.multiprocessors(), device.stream()), "align_rows");
  return {loss, gradient, unit};
}

AlignPartArgs part(const Tensor& student, const Tensor& teacher) {
  check_rows(student, teacher);
  AlignPartArgs a{};
  a.student = rows_of(student, "student");
  a.teacher = rows_of(teacher, "teacher");
  a.outer_rows = student.size(0), a.inner_rows = student.size(1), a.features = student.size(2);
  return a;
}

const float* per_row(const Tensor& tensor, int64_t numbers, const AlignPartArgs& a, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() &&
                      tensor.numel() == numbers * a.outer_rows * a.inner_rows,
                  "align: ", name, " must be float32 [", numbers, ", rows]");
  return floats(tensor);
}

Tensor sums_of(int64_t numbers, AlignPartArgs& a, const Tensor& like) {
  Tensor sums = torch::stable::new_empty(like, {numbers, a.outer_rows * a.inner_rows}, ScalarType::Double);
  a.sums = static_cast<double*>(sums.data_ptr());
  return sums;
}

Tensor align_totals(Tensor student, Tensor teacher) {
  AlignPartArgs a = part(student, teacher);
  const Device device(student);
  Tensor sums = sums_of(2, a, student);
  check_launch(compt_align_totals(&a, device.stream()), "align_totals");
  return sums;
}

Tensor align_squares(Tensor student, Tensor teacher, std::optional<Tensor> means) {
  AlignPartArgs a = part(student, teacher);
  const Device device(student);
  Tensor sums = sums_of(2, a, student);
  a.means = means ? per_row(*means, 2, a, "means") : nullptr;
  check_launch(compt_align_squares(&a, device.stream()), "align_squares");
  return sums;
}

Tensor align_distance(Tensor student, Tensor teacher, Tensor affine, int64_t distance, double beta) {
  AlignPartArgs a = part(student, teacher);
  const Device device(student);
  Tensor sums = sums_of(3, a, student);
  a.affine = per_row(affine, 5, a, "affine");
  a.distance = static_cast<int>(distance), a.beta = static_cast<float>(beta);
  check_launch(compt_align_distance(&a, device.stream()), "align_distance");
  return sums;
}

Tensor align_gradient(Tensor student, Tensor teacher, Tensor affine, Tensor through, int64_t distance, double beta) {
  AlignPartArgs a = part(student, teacher);
  const Device device(student);
  Tensor gradient = torch::stable::new_empty(student, {a.outer_rows * a.inner_rows, a.features});
  a.gradient = gradient.data_ptr();
  a.affine = per_row(affine, 5, a, "affine");
  a.through = per_row(through, 3, a, "through");
  a.distance = static_cast<int>(distance), a.beta = static_cast<float>(beta);
  check_launch(compt_align_gradient(&a, device.stream()), "align_gradient");
  return gradient;
}

}  // namespace
}  // namespace compt

STABLE_TORCH_LIBRARY_IMPL(compt_kernels, COMPT_DISPATCH_KEY, m) {
  m.impl("align_rows", TORCH_BOX(&compt::align_rows));
  m.impl("align_totals", TORCH_BOX(&compt::align_totals));
  m.impl("align_squares", TORCH_BOX(&compt::align_squares));
  m.impl("align_distance", TORCH_BOX(&compt::align_distance));
  m.impl("align_gradient", TORCH_BOX(&compt::align_gradient));
}
