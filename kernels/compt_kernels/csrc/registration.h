// Between torch and the kernels: torch's stable ABI, so that one built library serves torch 2.11 and later.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

#include "rows.h"

#ifdef COMPT_EMULATED
#define COMPT_DISPATCH_KEY CPU
#else
#define COMPT_DISPATCH_KEY CUDA
// A torch without CUDA has no such symbol, and the library must load there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace compt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes the tensor's device current for the life of this object; its stream, and how many multiprocessors it has.
class Device {
 public:
#ifdef COMPT_EMULATED
  explicit Device(const Tensor&) {}
  void* stream() const { return nullptr; }
  int multiprocessors() const { return 2; }
#else
  explicit Device(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "compt_kernels: this torch has no CUDA");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
  }
  void* stream() const { return stream_; }
  int multiprocessors() const { return compt_multiprocessors(index_); }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
#endif
};

inline int dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return F32;
    case ScalarType::BFloat16: return BF16;
    case ScalarType::Half: return F16;
    case ScalarType::Bool: return U8;
    default: STD_TORCH_CHECK(false, "compt_kernels: ", name, " must be float32, bfloat16, float16 or bool");
  }
  return -1;
}

// [outer, inner, columns] (or [outer, inner]: one column) as the kernels see it.
inline Rows rows_of(const Tensor& tensor, const char* name) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.dim() == 3 ? tensor.stride(2) : 0,
          dtype_of(tensor, name)};
}

inline void check_launch(int code, const char* name) {
  STD_TORCH_CHECK(code == 0, "compt_kernels: ", name, " failed with CUDA error ", code);
}

}  // namespace compt
