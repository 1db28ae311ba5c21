// The losses between images and texts on one tile of their products; what is computed: ops/tiles.py.
#pragma once
#include "rows.h"

namespace compt {

// dots [rows, columns], columns adjacent. Row i's own pair lies at column i + diagonal, if that is in the tile.
struct TileArgs {
  float* dots;
  int64_t stride;     // elements from row to row
  int rows, columns;  // each below 2^30; an element's offset may be of any size
  int64_t diagonal;
  const int64_t *row_labels, *column_labels;  // both or neither
  const float* scale;
  int multiprocessors;
};

// Numbers of each row or column: number k of row i at data[k * stride + i].
struct State {
  float* data;
  int64_t stride;
};

// Where a gradient goes: [rows, columns]; fp32 may be the place of the dots.
struct SlopeArgs {
  void* data;
  int64_t stride;
  int dtype;
  float gain;
};

}  // namespace compt

// Workspaces are counted in floats. sums: [rows] of gradient times dots; of the sigmoid loss [3, rows].
extern "C" {
int64_t compt_nce_workspace(const compt::TileArgs* tile);
int compt_nce_statistics(const compt::TileArgs* tile, const compt::State* rows, const compt::State* columns,
                         float* workspace, void* stream);
int64_t compt_nce_gradient_workspace(const compt::TileArgs* tile);
int compt_nce_gradient(const compt::TileArgs* tile, const compt::State* rows, const compt::State* columns,
                       const compt::SlopeArgs* slope, float* sums, float* workspace, void* stream);
int64_t compt_sigmoid_workspace(const compt::TileArgs* tile);
int compt_sigmoid_tile(const compt::TileArgs* tile, const float* bias, const compt::SlopeArgs* slope, float* sums,
                       float* workspace, void* stream);  // slope->data == nullptr: the loss alone
}
