// What host code and kernels both say about tensors; plain C++.
#pragma once
#include <stdint.h>

namespace compt {

enum DType : int { F32 = 0, BF16 = 1, F16 = 2, U8 = 3 };  // U8: bool masks

// A tensor of rows [outer, inner, columns] by its strides, in elements. data == nullptr: absent.
struct Rows {
  void* data;
  int64_t outer, inner, column;
  int dtype;
};

}  // namespace compt

extern "C" int compt_multiprocessors(int device);  // how many the device has
