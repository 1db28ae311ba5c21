#include "distill.h"

#include "registration.h"

namespace compt {
namespace {

float* floats(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, "compt_kernels: ", name, " must be float32");
  return static_cast<float*>(tensor.data_ptr());
}

const float* per_row(const Tensor& tensor, int64_t rows, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == rows && tensor.is_contiguous(), "compt_kernels: ", name, " must be [", rows, "]");
  return floats(tensor, name);
}

DistillArgs logits_of(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& bound,
                      double temperature) {
  STD_TORCH_CHECK(student.dim() == 2 && teacher.dim() == 2 && student.size(0) == teacher.size(0) &&
                      student.size(1) == teacher.size(1),
                  "compt_kernels: student and teacher must be logits [rows, columns] alike");
  STD_TORCH_CHECK(student.size(1) < 2 || (student.stride(1) == 1 && teacher.stride(1) == 1),
                  "compt_kernels: the columns of logits must be adjacent");
  DistillArgs a{};
  a.student = floats(student, "student"), a.teacher = floats(teacher, "teacher");
  a.student_stride = student.stride(0), a.teacher_stride = teacher.stride(0);
  a.rows = student.size(0), a.columns = student.size(1);
  a.bound = bound ? per_row(*bound, a.rows, "bound") : nullptr;
  a.inverse_temperature = static_cast<float>(1 / temperature);
  return a;
}

Tensor distill_statistics(Tensor student, Tensor teacher, std::optional<Tensor> bound, double temperature) {
  const DistillArgs a = logits_of(student, teacher, bound, temperature);
  const Device device(student);
  const Tensor statistics = torch::stable::new_empty(student, {4, a.rows}, ScalarType::Float);
  check_launch(compt_distill_statistics(&a, floats(statistics, "statistics"), device.stream()), "distill_statistics");
  return statistics;
}

Tensor distill_gradient(Tensor student, Tensor teacher, Tensor statistics, Tensor weight, std::optional<Tensor> bound,
                        double temperature, std::optional<Tensor> out, bool gradient) {
  const DistillArgs a = logits_of(student, teacher, bound, temperature);
  const Device device(student);
  const Tensor loss = torch::stable::new_empty(student, {a.rows}, ScalarType::Float);
  DistillGradientArgs g{};
  g.statistics = per_row(statistics, 4 * a.rows, "statistics");
  g.weight = per_row(weight, a.rows, "weight");
  g.loss = floats(loss, "loss");
  if (gradient) {
    const Tensor& slope = out ? *out : student;
    STD_TORCH_CHECK(slope.dim() == 2 && slope.size(0) == a.rows && slope.size(1) == a.columns &&
                        (a.columns < 2 || slope.stride(1) == 1),
                    "compt_kernels: out must be as large as the logits, with adjacent columns");
    g.slope = slope.data_ptr(), g.slope_stride = slope.stride(0), g.slope_dtype = dtype_of(slope, "out");
  }
  check_launch(compt_distill_gradient(&a, &g, device.stream()), "distill_gradient_");
  return loss;
}

}  // namespace
}  // namespace compt

STABLE_TORCH_LIBRARY_IMPL(compt_kernels, COMPT_DISPATCH_KEY, m) {
  m.impl("distill_statistics", TORCH_BOX(&compt::distill_statistics));
  m.impl("distill_gradient_", TORCH_BOX(&compt::distill_gradient));
}
