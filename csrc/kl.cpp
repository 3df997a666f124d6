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
        channels * positions < (int64_t(1) << 30), "minexp::activation_kl: too many features in an image at layer ", l);
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
constexpr int64_t kStreamed = 16 << 20;  // bytes of gradients that no cache would keep for whoever reads them next

struct Piece {
  size_t layer;
  int64_t image, index, number;  // index: among the image's pieces of the layer; number: among all
};

// Elements of all layers, and of the longest single row.
std::pair<int64_t, int64_t> elements_of(const Plan& plan) {
  int64_t all = 0, longest = 0;
  for (const Layer& layer : plan.layers)
    if (layer.pieces) {
      all += plan.images * layer.features();
      if (layer.rows == 1) longest = std::max<int64_t>(longest, layer.width);
    }
  return {all, longest};
}

// Calls f(piece) in parallel, for the pieces that begin in each thread's share of the elements: equal work, whatever
// the layers. With whole_rows, a single row's first piece stands for all of them.
template <class F>
void for_pieces(const Plan& plan, bool whole_rows, F f) {
  torch::stable::parallel_for(0, elements_of(plan).first, kPiece, [&](int64_t begin, int64_t end) {
    int64_t start = 0;
    for (size_t l = 0; l < plan.layers.size(); ++l) {
      const Layer& layer = plan.layers[l];
      if (layer.pieces == 0) continue;
      const bool whole = whole_rows && layer.rows == 1;
      const int64_t each = whole ? layer.width : int64_t(layer.each) * (layer.rows == 1 ? 1 : layer.width);
      for (int64_t image = 0; image < plan.images; ++image, start += layer.features())
        for (int64_t piece = 0; piece < (whole ? 1 : layer.pieces); ++piece)
          if (start + piece * each >= begin && start + piece * each < end)
            f(Piece{l, image, piece, layer.first_piece + image * layer.pieces + piece});
    }
    drain();
  });
}

// The rows of one call: State is the algebra, P and T what targets and inputs are made of.
template <class State, class P, class T>
struct Rows {
  using Real = Accumulator<T>;

  const Plan& plan;
  double temperature;
  Saved<Real>* saved;
  const double* entropy = nullptr;
  bool gradients = false, stream = false;  // written with the losses; past the caches

  struct Row {
    const Layer& layer;
    int64_t image, row;
    int64_t place;  // in the saved states

    int64_t begin() const { return image * layer.features() + layer.begin(row); }
    int64_t parts() const { return layer.rows == 1 ? layer.pieces : 1; }
    Range part(int64_t p) const { return layer.rows == 1 ? layer.range(p) : Range{0, layer.width}; }
  };

  Row row(const Piece& at, int64_t row = 0) const {
    const Layer& layer = plan.layers[at.layer];
    return {layer, at.image, row, at.image * plan.rows + layer.first_row + row};
  }

  State state(const Row& r, Range part, bool complete) const {
    return row_state<State>(
        static_cast<const P*>(r.layer.target) + r.begin(), static_cast<const T*>(r.layer.input) + r.begin(),
        r.layer.step(), part, Real(kLog2e / temperature), complete);
  }

  Cross gradient(const Row& r, Range part, double slope) const {
    return row_gradient<State>(
        static_cast<const P*>(r.layer.target) + r.begin(), static_cast<const T*>(r.layer.input) + r.begin(),
        static_cast<T*>(r.layer.grad) + r.begin(), r.layer.step(), part, Real(kLog2e / temperature), saved[r.place],
        Real(slope / (temperature * double(r.layer.rows))), stream);
  }

  void save(const Row& r, const State& state, double loss = 0) const {
    saved[r.place] = saved_or_nan<Real>(loss, state.saved());
  }

  // The loss of a row whose state is complete; gradients that were written before a NaN became known are written again.
  double loss(const Row& r, const State& state) const {
    const double loss = state.loss(entropy ? entropy + 2 * r.place : nullptr);
    save(r, state, loss);
    if (loss != loss && gradients)
      for (int64_t p = 0; p < r.parts(); ++p) gradient(r, r.part(p), r.layer.weight);
    return loss;
  }

  // All of a row at once, its gradient while its elements are still in the caches.
  double whole(const Row& r) const {
    State all = state(r, r.part(0), !gradients);
    for (int64_t p = 1; p < r.parts(); ++p) all.merge(state(r, r.part(p), !gradients));
    if (gradients) {
      save(r, all);
      for (int64_t p = 0; p < r.parts(); ++p) all.add(gradient(r, r.part(p), r.layer.weight));
    }
    return loss(r, all);
  }
};

template <class State, class P, class T>
void forward(const Rows<State, P, T>& rows, Tensor& total, Tensor& layers) {
  using Real = Accumulator<T>;
  const Plan& plan = rows.plan;
  std::vector<double> losses(plan.pieces, 0.);
  std::vector<State> parts;
  const auto [elements, longest] = elements_of(plan);
  // A thread that has a row to itself reads it once; but long rows are too few to go round.
  const int64_t threads = torch::stable::get_num_threads();
  const bool whole_rows = rows.gradients && (threads == 1 || 4 * threads * longest <= elements);
  if (!whole_rows) parts.resize(plan.pieces);

  for_pieces(plan, whole_rows, [&](const Piece& at) {
    const Layer& layer = plan.layers[at.layer];
    if (layer.rows == 1 && whole_rows) {
      losses[at.number] = rows.whole(rows.row(at));
    } else if (layer.rows == 1) {
      parts[at.number] = rows.state(rows.row(at), layer.range(at.index), !rows.gradients);
    } else {
      const Range range = layer.range(at.index);
      for (int64_t r = range.begin; r < range.end; ++r) losses[at.number] += rows.whole(rows.row(at, r));
    }
  });
  if (!whole_rows) {
    // Merges, always in the same order, what the pieces of each single row found: f(its first piece, its state).
    const auto for_merged = [&](auto f) {
      for (size_t l = 0; l < plan.layers.size(); ++l)
        for (int64_t image = 0; plan.layers[l].rows == 1 && plan.layers[l].pieces && image < plan.images; ++image) {
          const int64_t first = plan.layers[l].first_piece + image * plan.layers[l].pieces;
          State all = parts[first];
          for (int64_t p = 1; p < plan.layers[l].pieces; ++p) all.merge(parts[first + p]);
          f(Piece{l, image, 0, first}, all);
        }
    };
    if (rows.gradients) {
      for_merged([&](const Piece& at, const State& all) { rows.save(rows.row(at), all); });
      for_pieces(plan, false, [&](const Piece& at) {
        const Layer& layer = plan.layers[at.layer];
        if (layer.rows == 1) parts[at.number].add(rows.gradient(rows.row(at), layer.range(at.index), layer.weight));
      });
    }
    for_merged([&](const Piece& at, const State& all) { losses[at.number] = rows.loss(rows.row(at), all); });
  }

  for (int64_t image = 0; image < plan.images; ++image) {
    double weighted = 0;
    for (size_t l = 0; l < plan.layers.size(); ++l) {
      const Layer& layer = plan.layers[l];
      double loss = 0;
      for (int64_t p = 0; p < layer.pieces; ++p) loss += losses[layer.first_piece + image * layer.pieces + p];
      loss /= double(layer.rows);
      data<Real>(layers)[l * plan.images + image] = Real(loss);
      if (layer.pieces) weighted += layer.weight * loss;
    }
    data<Real>(total)[image] = Real(weighted);
  }
}

template <class State, class P, class T>
void backward(const Rows<State, P, T>& rows, const Maybe& grad_total, const Maybe& grad_layers) {
  using Real = Accumulator<T>;
  const Plan& plan = rows.plan;
  const Real *totals = data<Real>(grad_total), *losses = data<Real>(grad_layers);
  for_pieces(plan, false, [&](const Piece& at) {
    const Layer& layer = plan.layers[at.layer];
    const double slope =
        (totals ? layer.weight * totals[at.image] : 0) + (losses ? losses[at.layer * plan.images + at.image] : 0);
    const Range range = layer.range(at.index);
    if (layer.rows == 1) {
      rows.gradient(rows.row(at), range, slope);
    } else {
      for (int64_t r = range.begin; r < range.end; ++r) rows.gradient(rows.row(at, r), Range{0, layer.width}, slope);
    }
  });
}

// Calls f with Rows of the call's types.
template <class F>
void with_rows(const Plan& plan, ScalarType type, bool cached, Tensor& state, double temperature, F f) {
  with_floating(type, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    using Real = Accumulator<T>;
    auto* saved = reinterpret_cast<Saved<Real>*>(data<Real>(state));
    if (cached)
      f(Rows<Cached, Real, T>{plan, temperature, saved});
    else
      f(Rows<Pair, T, T>{plan, temperature, saved});
  });
}

bool streamed(const Tensors& grads) {
  int64_t bytes = 0;
  for (const Tensor& grad : grads) bytes += grad.numel() * grad.element_size();
  return bytes > kStreamed;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> activation_kl_cpu(
    Tensors targets, Tensors inputs, Maybe entropy, std::vector<double> weights, double temperature, std::string axis) {
  const Plan plan = plan_layers(targets, inputs, nullptr, weights, axis, entropy.has_value(), kPiece);
  auto [total, layers, state] = outputs_for(plan, inputs, entropy);
  with_rows(plan, inputs[0].scalar_type(), entropy.has_value(), state, temperature, [&, &total = total, &layers = layers](auto rows) {
    rows.entropy = data<double>(entropy);
    forward(rows, total, layers);
  });
  return {total, layers, state};
}

std::tuple<Tensor, Tensor, Tensors> activation_kl_gradients_cpu(
    Tensors targets, Tensors inputs, Maybe entropy, std::vector<double> weights, double temperature, std::string axis) {
  Tensors grads = gradients_for(inputs, weights);
  const Plan plan = plan_layers(targets, inputs, &grads, weights, axis, entropy.has_value(), kPiece);
  auto [total, layers, state] = outputs_for(plan, inputs, entropy);
  with_rows(plan, inputs[0].scalar_type(), entropy.has_value(), state, temperature, [&, &total = total, &layers = layers](auto rows) {
    rows.entropy = data<double>(entropy), rows.gradients = true, rows.stream = streamed(grads);
    forward(rows, total, layers);
  });
  return {total, layers, grads};
}

Tensors activation_kl_backward_cpu(
    Tensors targets, Tensors inputs, bool cached, Tensor state, Maybe grad_total, Maybe grad_layers,
    std::vector<double> weights, double temperature, std::string axis) {
  Tensors grads = gradients_for(inputs, weights);
  const Plan plan = plan_layers(targets, inputs, &grads, weights, axis, cached, kPiece);
  check_backward(plan, inputs, state, grad_total, grad_layers);
  with_rows(plan, inputs[0].scalar_type(), cached, state, temperature, [&](auto rows) {
    rows.stream = streamed(grads);
    backward(rows, grad_total, grad_layers);
  });
  return grads;
}

}  // namespace minexp
