// The door between torch's stable C++ interface and the torch-free cores.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "kl.h"

namespace minexp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Maybe = std::optional<Tensor>;

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(const_cast<void*>(x.const_data_ptr()));
}

template <class T>
T* data(const Maybe& x) {
  return x ? data<T>(*x) : nullptr;
}

inline ScalarType accumulator(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f with a null pointer of the tensor's element type.
template <class F>
void with_floating(ScalarType type, F f) {
  switch (type) {
    case ScalarType::Double: return f(static_cast<double*>(nullptr));
    case ScalarType::Float: return f(static_cast<float*>(nullptr));
    case ScalarType::Half: return f(static_cast<torch::headeronly::Half*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<torch::headeronly::BFloat16*>(nullptr));
    default: STD_TORCH_CHECK(false, "minexp: expected a floating dtype");
  }
}

// ---- activation_kl ---------------------------------------------------------------------------------------------

// What the CPU and the CUDA launcher are both given: the layers, cut into pieces of about `piece` elements.
struct Plan {
  std::vector<Layer> layers;
  int64_t images = 0, rows = 0, pieces = 0, elements = 0;
};

Plan plan_layers(
    const Tensors& targets, const Tensors& inputs, const Tensors* grads, const std::vector<double>& weights,
    const std::string& axis, bool cached, int64_t piece);

}  // namespace minexp
