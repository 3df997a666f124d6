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

#include "edges.h"
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

// The layers of a call, cut into pieces of about `piece` elements; checks that they fit together.
Plan plan_layers(
    const Tensors& targets, const Tensors& inputs, const Tensors* grads, const std::vector<double>& weights,
    const std::string& axis, bool cached, int64_t piece);
std::tuple<Tensor, Tensor, Tensor> outputs_for(const Plan& plan, const Tensors& inputs, const Maybe& entropy);
Tensors gradients_for(const Tensors& inputs, const std::vector<double>& weights);
void check_backward(
    const Plan& plan, const Tensors& inputs, const Tensor& state, const Maybe& grad_total, const Maybe& grad_layers);

// ---- edges -----------------------------------------------------------------------------------------------------

template <class F>
void with_real(const Tensor& x, F f) {
  if (x.scalar_type() == ScalarType::Double)
    f(double());
  else
    f(float());
}

void check_edges(
    const Tensor& strength, const Tensor& energy, const Maybe& gradient, const Maybe& source_mask,
    const Maybe& target_mask, int64_t groups);
std::tuple<Tensor, Tensor> topk_outputs(const Tensor& strength, const Tensor& energy, int64_t k);
std::tuple<Tensor, Tensor> select_outputs(const Tensor& strength, const Tensor& energy, int64_t n);
Geometry geometry_of(
    const Tensor& weight, const Tensor& activation, const std::vector<int64_t>& stride,
    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation);

}  // namespace minexp
