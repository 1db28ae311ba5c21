// The upstream gradient, applied to a gradient that was computed in the forward pass.
#pragma once
#include "rows.h"

// gradient [rows, features], contiguous, times factor[row] (or factor[0]) and unit[0], in place. The factors are read
// on the device; where their product is 1 nothing is read or written. unit: nullptr for 1.
extern "C" int compt_scale_rows(void* gradient, int dtype, int64_t rows, int64_t features, const float* factor,
                                bool factor_a_row, const float* unit, int multiprocessors, void* stream);
