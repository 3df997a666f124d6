// What the launchers share.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "ops.h"

// Weak, so that one library also loads beside a CPU build of torch, which lacks it.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));

namespace minexp {

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  STD_TORCH_CHECK(
      aoti_torch_get_current_cuda_stream && aoti_torch_get_current_cuda_stream(x.get_device(), &stream) == 0,
      "minexp: torch gives no CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* what) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "minexp: ", what, ": ", cudaGetErrorString(error));
}

inline Tensor bytes(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count > 0 ? count : 1}, ScalarType::Byte);
}

// The running sum of an int64 vector, by torch itself.
inline Tensor cumulative(const Tensor& x) {
  StableIValue stack[] = {
      torch::stable::detail::from(x), torch::stable::detail::from(int64_t(0)), torch::stable::detail::from(std::nullopt)};
  STD_TORCH_CHECK(torch_call_dispatcher("aten::cumsum", "", stack, TORCH_ABI_VERSION) == 0, "minexp: cumsum failed");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace minexp
