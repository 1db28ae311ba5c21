#include "contrastive.h"

#include "registration.h"

namespace compt {
namespace {

constexpr int64_t MOST = int64_t{1} << 30;

float* floats(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, "compt_kernels: ", name, " must be float32");
  return static_cast<float*>(tensor.data_ptr());
}

const float* number(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == 1, "compt_kernels: ", name, " must be one number");
  return floats(tensor, name);
}

const int64_t* labels_of(const std::optional<Tensor>& labels, int64_t size, const char* name) {
  if (!labels) return nullptr;
  STD_TORCH_CHECK(labels->scalar_type() == ScalarType::Long && labels->dim() == 1 && labels->size(0) == size &&
                      (size < 2 || labels->stride(0) == 1),
                  "compt_kernels: ", name, " must be int64 [", size, "] and contiguous");
  return static_cast<const int64_t*>(labels->data_ptr());
}

TileArgs tile_of(const Tensor& dots, const Tensor& scale, int64_t diagonal, const std::optional<Tensor>& row_labels,
                 const std::optional<Tensor>& column_labels, const Device& device) {
  STD_TORCH_CHECK(dots.dim() == 2 && (dots.size(1) < 2 || dots.stride(1) == 1),
                  "compt_kernels: dots must be [rows, columns] with adjacent columns");
  STD_TORCH_CHECK(dots.size(0) < MOST && dots.size(1) < MOST, "compt_kernels: a tile has less than 2^30 rows or columns");
  STD_TORCH_CHECK(row_labels.has_value() == column_labels.has_value(), "compt_kernels: labels of both sides or none");
  TileArgs a{};
  a.dots = floats(dots, "dots");
  a.stride = dots.stride(0), a.diagonal = diagonal;
  a.rows = static_cast<int>(dots.size(0)), a.columns = static_cast<int>(dots.size(1));
  a.row_labels = labels_of(row_labels, a.rows, "row_labels");
  a.column_labels = labels_of(column_labels, a.columns, "column_labels");
  a.scale = number(scale, "scale");
  a.multiprocessors = device.multiprocessors();
  return a;
}

State state_of(const Tensor& state, int64_t numbers, int64_t width, const char* name) {
  STD_TORCH_CHECK(state.dim() == 2 && state.size(0) == numbers && state.size(1) == width &&
                      (width < 2 || state.stride(1) == 1),
                  "compt_kernels: ", name, " must be [", numbers, ", ", width, "] with adjacent numbers");
  return {floats(state, name), state.stride(0)};
}

SlopeArgs slope_of(const TileArgs& tile, const std::optional<Tensor>& out, double gain) {
  if (!out) return {tile.dots, tile.stride, F32, static_cast<float>(gain)};
  STD_TORCH_CHECK(out->dim() == 2 && out->size(0) == tile.rows && out->size(1) == tile.columns &&
                      (tile.columns < 2 || out->stride(1) == 1),
                  "compt_kernels: out must be as large as dots, with adjacent columns");
  return {out->data_ptr(), out->stride(0), dtype_of(*out, "out"), static_cast<float>(gain)};
}

Tensor empty_floats(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

void nce_statistics(Tensor dots, Tensor scale, Tensor rows, Tensor columns, int64_t diagonal,
                    std::optional<Tensor> row_labels, std::optional<Tensor> column_labels) {
  const Device device(dots);
  const TileArgs tile = tile_of(dots, scale, diagonal, row_labels, column_labels, device);
  const State of_rows = state_of(rows, 5, tile.rows, "rows");
  const State of_columns = state_of(columns, 4, tile.columns, "columns");
  const Tensor workspace = empty_floats(dots, {compt_nce_workspace(&tile)});
  check_launch(compt_nce_statistics(&tile, &of_rows, &of_columns, floats(workspace, "workspace"), device.stream()),
               "nce_statistics_");
}

Tensor nce_gradient(Tensor dots, Tensor scale, Tensor rows, Tensor columns, int64_t diagonal,
                    std::optional<Tensor> row_labels, std::optional<Tensor> column_labels, std::optional<Tensor> out,
                    double gain) {
  const Device device(dots);
  const TileArgs tile = tile_of(dots, scale, diagonal, row_labels, column_labels, device);
  const State of_rows = state_of(rows, 4, tile.rows, "rows");
  const State of_columns = state_of(columns, 3, tile.columns, "columns");
  const SlopeArgs slope = slope_of(tile, out, gain);
  const Tensor sums = empty_floats(dots, {tile.rows});
  const Tensor workspace = empty_floats(dots, {compt_nce_gradient_workspace(&tile)});
  check_launch(compt_nce_gradient(&tile, &of_rows, &of_columns, &slope, floats(sums, "sums"),
                                  floats(workspace, "workspace"), device.stream()),
               "nce_gradient_");
  return sums;
}

Tensor sigmoid_tile(Tensor dots, Tensor scale, Tensor bias, int64_t diagonal, std::optional<Tensor> row_labels,
                    std::optional<Tensor> column_labels, std::optional<Tensor> out, double gain, bool gradient) {
  const Device device(dots);
  const TileArgs tile = tile_of(dots, scale, diagonal, row_labels, column_labels, device);
  SlopeArgs slope = slope_of(tile, out, gain);
  if (!gradient) slope.data = nullptr;
  const Tensor sums = empty_floats(dots, {3, tile.rows});
  const Tensor workspace = empty_floats(dots, {compt_sigmoid_workspace(&tile)});
  check_launch(compt_sigmoid_tile(&tile, number(bias, "bias"), &slope, floats(sums, "sums"),
                                  floats(workspace, "workspace"), device.stream()),
               "sigmoid_tile_");
  return sums;
}

}  // namespace
}  // namespace compt

STABLE_TORCH_LIBRARY_IMPL(compt_kernels, COMPT_DISPATCH_KEY, m) {
  m.impl("nce_statistics_", TORCH_BOX(&compt::nce_statistics));
  m.impl("nce_gradient_", TORCH_BOX(&compt::nce_gradient));
  m.impl("sigmoid_tile_", TORCH_BOX(&compt::sigmoid_tile));
}
