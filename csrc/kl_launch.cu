// Launches of activation_kl: one forward kernel, one backward kernel, no synchronisation.
#include "cuda.h"
#include "kl.cuh"

namespace minexp {
namespace {

template <int Most, class P, class T>
Table<Most> table_of(const Plan& plan, double temperature) {
  const auto at = [](const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  Table<Most> table;
  std::copy(plan.layers.begin(), plan.layers.end(), table.layers);
  table.count = int(plan.layers.size()), table.images = plan.images, table.rows = plan.rows, table.temperature = temperature;
  table.image_pieces = uint32_t(plan.pieces / std::max<int64_t>(1, plan.images));
  table.aligned = std::all_of(plan.layers.begin(), plan.layers.end(), [&](const Layer& l) {
    return at(l.target, 16 / sizeof(T) * sizeof(P)) && at(l.input, 16) && at(l.grad, 16);
  });
  return table;
}

// Calls f with the algebra, the types and the size of the table as template arguments.
template <class F>
void dispatch(const Plan& plan, ScalarType type, bool cached, F f) {
  STD_TORCH_CHECK(plan.layers.size() <= 512, "minexp::activation_kl: more than 512 layers");
  with_floating(type, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    const bool few = plan.layers.size() <= 64;
    if (cached)
      few ? f.template operator()<Cached, Accumulator<T>, T, 64>() : f.template operator()<Cached, Accumulator<T>, T, 512>();
    else
      few ? f.template operator()<Pair, T, T, 64>() : f.template operator()<Pair, T, T, 512>();
  });
}

struct Forward {
  const Plan& plan;
  double temperature;
  const Maybe& entropy;
  Tensor &total, &layers, &state;

  template <class State, class P, class T, int Most>
  void operator()() const {
    using Real = Accumulator<T>;
    const cudaStream_t stream = current_stream(total);
    const int64_t counters = plan.images * sizeof(unsigned), head = (counters + 63) / 64 * 64;
    Tensor workspace = bytes(total, head + plan.pieces * sizeof(Part<State>));
    auto* tickets = data<unsigned>(workspace);
    auto* parts = reinterpret_cast<Part<State>*>(data<char>(workspace) + head);
    cudaMemsetAsync(tickets, 0, counters, stream);
    kl_forward<State, P, T, Real, Most><<<unsigned(plan.pieces), kThreads, shared_bytes, stream>>>(
        table_of<Most, P, T>(plan, temperature), data<double>(entropy), parts, tickets,
        reinterpret_cast<Saved<Real>*>(data<Real>(state)), data<Real>(total), data<Real>(layers));
    check_launch("activation_kl");
  }
};

struct Backward {
  const Plan& plan;
  double temperature;
  const Tensor& state;
  const Maybe &grad_total, &grad_layers;

  template <class State, class P, class T, int Most>
  void operator()() const {
    using Real = Accumulator<T>;
    kl_backward<State, P, T, Real, Most><<<unsigned(plan.pieces), kThreads, 0, current_stream(state)>>>(
        table_of<Most, P, T>(plan, temperature), reinterpret_cast<const Saved<Real>*>(data<Real>(state)),
        data<Real>(grad_total), data<Real>(grad_layers));
    check_launch("activation_kl_backward");
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> activation_kl_cuda(
    Tensors targets, Tensors inputs, Maybe entropy, std::vector<double> weights, double temperature, std::string axis) {
  const torch::stable::accelerator::DeviceGuard guard(inputs.at(0).get_device());
  const Plan plan = plan_layers(targets, inputs, nullptr, weights, axis, entropy.has_value(), kCudaPiece);
  auto [total, layers, state] = outputs_for(plan, inputs, entropy);
  if (plan.pieces == 0) {  // every layer has weight 0
    torch::stable::zero_(total), torch::stable::zero_(layers);
  } else {
    dispatch(plan, inputs[0].scalar_type(), entropy.has_value(), Forward{plan, temperature, entropy, total, layers, state});
  }
  return {total, layers, state};
}

Tensors activation_kl_backward_cuda(
    Tensors targets, Tensors inputs, bool cached, Tensor state, Maybe grad_total, Maybe grad_layers,
    std::vector<double> weights, double temperature, std::string axis) {
  const torch::stable::accelerator::DeviceGuard guard(inputs.at(0).get_device());
  Tensors grads = gradients_for(inputs, weights);
  const Plan plan = plan_layers(targets, inputs, &grads, weights, axis, cached, kCudaPiece);
  check_backward(plan, inputs, state, grad_total, grad_layers);
  if (plan.pieces > 0)
    dispatch(plan, inputs[0].scalar_type(), cached, Backward{plan, temperature, state, grad_total, grad_layers});
  return grads;
}

}  // namespace minexp
