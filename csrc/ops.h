// What module.cpp registers; minexp/_kl.py and minexp/_edges.py say what each operator means.
#pragma once

#include "tensors.h"

#define MINEXP_OPERATORS(device)                                                                               \
  std::tuple<Tensor, Tensor, Tensor> activation_kl_##device(                                                   \
      Tensors targets, Tensors inputs, Maybe entropy, std::vector<double> weights, double temperature,         \
      std::string axis);                                                                                       \
  std::tuple<Tensor, Tensor, Tensors> activation_kl_gradients_##device(                                        \
      Tensors targets, Tensors inputs, Maybe entropy, std::vector<double> weights, double temperature,         \
      std::string axis);                                                                                       \
  Tensors activation_kl_backward_##device(                                                                     \
      Tensors targets, Tensors inputs, bool cached, Tensor state, Maybe grad_total, Maybe grad_layers,         \
      std::vector<double> weights, double temperature, std::string axis);                                      \
  std::tuple<Tensor, Tensor> edge_topk_##device(                                                               \
      Tensor strength, Tensor energy, int64_t k, Maybe gradient, Maybe source_mask, Maybe target_mask,         \
      int64_t groups);                                                                                         \
  std::tuple<Tensor, Tensor, Tensor> edge_threshold_##device(                                                  \
      Tensor strength, Tensor energy, double threshold, Maybe gradient, Maybe source_mask, Maybe target_mask,  \
      int64_t groups);                                                                                         \
  std::tuple<Tensor, Tensor> edge_select_##device(                                                             \
      Tensor strength, Tensor energy, int64_t n, Maybe gradient, Maybe source_mask, Maybe target_mask,         \
      int64_t groups);                                                                                         \
  std::tuple<Tensor, Tensor> edge_position_topk_##device(                                                      \
      Tensor weight, Tensor activation, int64_t k, std::vector<int64_t> stride, std::vector<int64_t> padding,  \
      std::vector<int64_t> dilation, Maybe gradient, Maybe source_mask, Maybe target_mask, int64_t groups);

namespace minexp {

MINEXP_OPERATORS(cpu)
MINEXP_OPERATORS(cuda)

}  // namespace minexp
