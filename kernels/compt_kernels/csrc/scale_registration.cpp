#include "registration.h"
#include "scale.h"

namespace compt {
namespace {

void scale_rows(Tensor gradient, Tensor factor, std::optional<Tensor> unit) {
  STD_TORCH_CHECK(gradient.dim() == 2 && gradient.is_contiguous(), "scale_rows: gradient must be [rows, features]");
  STD_TORCH_CHECK(factor.scalar_type() == ScalarType::Float && factor.is_contiguous(),
                  "scale_rows: factor must be float32 and contiguous");
  STD_TORCH_CHECK(factor.numel() == 1 || factor.numel() == gradient.size(0), "scale_rows: one factor, or one a row");
  const Device device(gradient);
  const bool factor_a_row = factor.dim() > 0 && gradient.size(0) != 1;
  check_launch(compt_scale_rows(gradient.data_ptr(), dtype_of(gradient, "gradient"), gradient.size(0), gradient.size(1),
                                static_cast<const float*>(factor.data_ptr()), factor_a_row,
                                unit ? static_cast<const float*>(unit->data_ptr()) : nullptr,
                                device.multiprocessors(), device.stream()),
               "scale_rows");
}

}  // namespace
}  // namespace compt

STABLE_TORCH_LIBRARY_IMPL(compt_kernels, COMPT_DISPATCH_KEY, m) { m.impl("scale_rows", TORCH_BOX(&compt::scale_rows)); }
