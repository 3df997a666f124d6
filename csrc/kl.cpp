// activation_kl on the CPU: pieces of all layers in parallel, merged in a fixed order.
#include "ops.h"

namespace minexp {

static bool same_shape(const Tensor& x, const Tensor& y) {
  bool same = x.dim() == y.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = x.size(d) == y.size(d);
  return same;
}

Plan plan_layers(
    const Tensors& targets, const Tensors& inputs, const Tensors* grads, const std::vector<double>& weights,
    const std::string& axis, bool cached, int64_t piece) {
  STD_TORCH_CHECK(
      !inputs.empty() && targets.size() == inputs.size() && weights.size() == inputs.size(),
      "minexp::activation_kl: expected as many targets and weights as inputs");
  Plan plan;
  plan.images = inputs[0].size(0);
  for (size_t l = 0; l < inputs.size(); ++l) {
    const Tensor &target = targets[l], &x = inputs[l];
    const auto expected = cached ? accumulator(x) : x.scalar_type();
    STD_TORCH_CHECK(
        same_shape(target, x) && target.is_contiguous() == x.is_contiguous() &&
            target.scalar_type() == expected && x.scalar_type() == inputs[0].scalar_type() &&
            target.is_cuda() == x.is_cuda() && x.dim() >= 2 && x.size(0) == plan.images,
        "minexp::activation_kl: targets and inputs differ in shape, dtype, device or memory format at layer ", l);
    int64_t inner = x.size(1);  // dense means channels outermost or innermost: the wrapper sees to it
    if (!x.is_contiguous()) {
      bool dense = x.stride(1) == 1;
      for (int64_t d = x.dim() - 1; d >= 2; --d) {
        dense &= x.size(d) == 1 || x.stride(d) == inner;
        inner *= x.size(d);
      }
      dense &= x.size(0) == 1 || x.stride(0) == inner;
      STD_TORCH_CHECK(dense, "minexp::activation_kl: expected a dense image at layer ", l);
    }
    const int64_t channels = x.size(1);
    int64_t positions = 1;
    for (int64_t d = 2; d < x.dim(); ++d) positions *= x.size(d);
    STD_TORCH_CHECK(channels * positions > 0, "minexp::activation_kl: no features at layer ", l);
    Layer layer{};
    layer.target = target.const_data_ptr(), layer.input = x.const_data_ptr();
    layer.grad = grads ? data<void>((*grads)[l]) : nullptr;
    const int64_t rows = axis == "all" ? 1 : axis == "spatial" ? channels : positions;
    STD_TORCH_CHECK(
        channels * positions < (int64_t(1) << 31), "minexp::activation_kl: too many features in an image at layer ", l);
    layer.rows = int32_t(rows), layer.width = int32_t(channels * positions / rows);
    layer.strided = axis != "all" && x.is_contiguous() == (axis == "channel") && rows > 1;
    layer.weight = float(weights[l]);
    plan.add(layer, piece);
    STD_TORCH_CHECK(plan.pieces < (int64_t(1) << 31), "minexp::activation_kl: too many features in all");
  }
  return plan;
}

std::tuple<Tensor, Tensor, Tensor> outputs_for(const Plan& plan, const Tensors& inputs, const Maybe& entropy) {
  STD_TORCH_CHECK(
      !entropy || (entropy->numel() == plan.images * plan.rows * 2 && entropy->is_contiguous() &&
                   entropy->scalar_type() == ScalarType::Double),
      "minexp::activation_kl: entropy does not fit the layers");
  const auto type = accumulator(inputs[0]);
  return {
      torch::stable::new_empty(inputs[0], {plan.images}, type),
      torch::stable::new_empty(inputs[0], {int64_t(inputs.size()), plan.images}, type),
      torch::stable::new_empty(inputs[0], {plan.images, plan.rows, 4}, type)};
}

Tensors gradients_for(const Tensors& inputs, const std::vector<double>& weights) {
  Tensors grads;
  for (size_t l = 0; l < inputs.size(); ++l) {
    grads.push_back(torch::stable::empty_like(inputs[l]));
    if (weights.at(l) == 0) torch::stable::zero_(grads[l]);
  }
  return grads;
}

void check_backward(
    const Plan& plan, const Tensors& inputs, const Tensor& state, const Maybe& grad_total, const Maybe& grad_layers) {
  const auto fits = [&](const Maybe& grad, int64_t count) {
    return !grad || (grad->numel() == count && grad->is_contiguous() && grad->scalar_type() == accumulator(inputs[0]));
  };
  STD_TORCH_CHECK(
      fits(state, plan.images * plan.rows * 4) && fits(grad_total, plan.images) &&
          fits(grad_layers, plan.images * int64_t(inputs.size())),
      "minexp::activation_kl_backward: state or gradients do not fit the layers");
}

namespace {

constexpr int64_t kPiece = 16384;

// Calls f(layer, image, piece, number) for every piece, in parallel.
template <class F>
void for_pieces(const Plan& plan, F f) {
  torch::stable::parallel_for(0, plan.pieces, 1, [&](int64_t begin, int64_t end) {
    size_t l = 0;
    for (int64_t number = begin; number < end; ++number) {
      while (number >= plan.layers[l].first_piece + plan.images * plan.layers[l].pieces) ++l;
      const int64_t local = number - plan.layers[l].first_piece;
      f(l, local / plan.layers[l].pieces, local % plan.layers[l].pieces, number);
    }
  });
}

template <template <class> class Algebra, class P, class T>
void forward(const Plan& plan, const double* entropy, double temperature, Tensor& total, Tensor& layers, Tensor& state) {
  using Real = Accumulator<T>;
  using State = Algebra<double>;
  const Real scale = Real(1 / temperature);
  auto* saved = reinterpret_cast<Saved<Real>*>(data<Real>(state));
  std::vector<State> parts(plan.pieces);      // of the single row of a layer
  std::vector<double> sums(plan.pieces, 0.);  // of the losses of several rows
  const auto finish = [&](const State& row, int64_t at) {
    const double loss = row.loss(entropy ? entropy + 2 * at : nullptr);
    saved[at] = saved_or_nan<Real>(loss, row.saved());
    return loss;
  };
  for_pieces(plan, [&](size_t l, int64_t image, int64_t piece, int64_t number) {
    const Layer& layer = plan.layers[l];
    const int64_t offset = image * layer.features(), step = layer.step();
    const P* target = static_cast<const P*>(layer.target) + offset;
    const T* input = static_cast<const T*>(layer.input) + offset;
    if (layer.rows == 1) {
      parts[number] = row_state<State>(target, input, 1, layer.range(piece), scale);
      return;
    }
    const Range rows = layer.range(piece);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const int64_t begin = layer.begin(r);
      const State row = row_state<State>(target + begin, input + begin, step, Range{0, layer.width}, scale);
      sums[number] += finish(row, image * plan.rows + layer.first_row + r);
    }
  });
  Real *losses = data<Real>(layers), *totals = data<Real>(total);
  for (int64_t image = 0; image < plan.images; ++image) {
    double weighted = 0;
    for (size_t l = 0; l < plan.layers.size(); ++l) {
      const Layer& layer = plan.layers[l];
      const int64_t first = layer.first_piece + image * layer.pieces;
      double loss = 0;
      if (layer.pieces && layer.rows == 1) {
        State row = parts[first];
        for (int64_t p = 1; p < layer.pieces; ++p) row.merge(parts[first + p]);
        loss = finish(row, image * plan.rows + layer.first_row);
      } else {
        for (int64_t p = 0; p < layer.pieces; ++p) loss += sums[first + p];
      }
      loss /= double(layer.rows);
      losses[l * plan.images + image] = Real(loss);
      if (layer.pieces) weighted += layer.weight * loss;
    }
    totals[image] = Real(weighted);
  }
}

template <template <class> class Algebra, class P, class T>
void backward(const Plan& plan, const Tensor& state, const Maybe& grad_total, const Maybe& grad_layers, double temperature) {
  using Real = Accumulator<T>;
  const auto* saved = reinterpret_cast<const Saved<Real>*>(data<Real>(state));
  const Real *totals = data<Real>(grad_total), *losses = data<Real>(grad_layers);
  for_pieces(plan, [&](size_t l, int64_t image, int64_t piece, int64_t) {
    const Layer& layer = plan.layers[l];
    const int64_t offset = image * layer.features(), step = layer.step();
    const P* target = static_cast<const P*>(layer.target) + offset;
    const T* input = static_cast<const T*>(layer.input) + offset;
    T* grad = static_cast<T*>(layer.grad) + offset;
    const Saved<Real>* rows = saved + image * plan.rows + layer.first_row;
    const Real slope = (totals ? layer.weight * totals[image] : 0) + (losses ? losses[l * plan.images + image] : 0);
    const Real c = Real(slope / (temperature * double(layer.rows))), scale = Real(1 / temperature);
    if (layer.rows == 1) {
      const Range range = layer.range(piece);
      row_gradient<Algebra<double>>(target, input, grad, 1, range, scale, rows[0], c);
      return;
    }
    const Range range = layer.range(piece);
    for (int64_t r = range.begin; r < range.end; ++r) {
      const int64_t begin = layer.begin(r);
      row_gradient<Algebra<double>>(
          target + begin, input + begin, grad + begin, step, Range{0, layer.width}, scale, rows[r], c);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> activation_kl_cpu(
    Tensors targets, Tensors inputs, Maybe entropy, std::vector<double> weights, double temperature, std::string axis) {
  const Plan plan = plan_layers(targets, inputs, nullptr, weights, axis, entropy.has_value(), kPiece);
  auto [total, layers, state] = outputs_for(plan, inputs, entropy);
  with_floating(inputs[0].scalar_type(), [&, &total = total, &layers = layers, &state = state](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    if (entropy)
      forward<Cached, Accumulator<T>, T>(plan, data<double>(*entropy), temperature, total, layers, state);
    else
      forward<Pair, T, T>(plan, nullptr, temperature, total, layers, state);
  });
  return {total, layers, state};
}

Tensors activation_kl_backward_cpu(
    Tensors targets, Tensors inputs, bool cached, Tensor state, Maybe grad_total, Maybe grad_layers,
    std::vector<double> weights, double temperature, std::string axis) {
  Tensors grads = gradients_for(inputs, weights);
  const Plan plan = plan_layers(targets, inputs, &grads, weights, axis, cached, kPiece);
  check_backward(plan, inputs, state, grad_total, grad_layers);
  with_floating(inputs[0].scalar_type(), [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    if (cached)
      backward<Cached, Accumulator<T>, T>(plan, state, grad_total, grad_layers, temperature);
    else
      backward<Pair, T, T>(plan, state, grad_total, grad_layers, temperature);
  });
  return grads;
}

}  // namespace minexp
