// The CUDA kernels on the host, for pytest: memory by address, launched as the .cu files launch them.
#include "emulator.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../csrc/edges.cuh"
#include "../../csrc/kl.cuh"

namespace py = pybind11;
using namespace minexp;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// target, input, gradient (or 0), rows, width, strided, weight
using LayerSpec = std::tuple<uintptr_t, uintptr_t, uintptr_t, int, int, bool, float>;

Plan plan_of(const std::vector<LayerSpec>& specs, int64_t images, int64_t piece) {
  Plan plan;
  plan.images = images;
  for (const auto& [target, input, grad, rows, width, strided, weight] : specs) {
    Layer layer{};
    layer.target = at<void>(target), layer.input = at<void>(input), layer.grad = at<void>(grad);
    layer.rows = rows, layer.width = width, layer.strided = strided, layer.weight = weight;
    plan.add(layer, piece);
  }
  return plan;
}

Table<64> table_of(const Plan& plan, double temperature, bool aligned) {
  Table<64> table{};
  std::copy(plan.layers.begin(), plan.layers.end(), table.layers);
  table.count = int(plan.layers.size()), table.images = plan.images, table.rows = plan.rows;
  table.temperature = temperature, table.aligned = aligned, table.image_pieces = unsigned(plan.pieces / plan.images);
  return table;
}

template <class State, class Real>
void forward(
    const std::vector<LayerSpec>& specs, int64_t images, int64_t piece, double temperature, bool aligned, uintptr_t entropy,
    uintptr_t state, uintptr_t total, uintptr_t losses, bool backwards) {
  const Plan plan = plan_of(specs, images, piece);
  std::vector<Part<State>> parts(plan.pieces);
  std::vector<unsigned> tickets(images, 0);
  emulator::launch(
      kl_forward<State, Real, Real, Real, 64>, unsigned(plan.pieces), kThreads, shared_bytes, backwards,
      table_of(plan, temperature, aligned), at<const double>(entropy), parts.data(), tickets.data(), at<Saved<Real>>(state),
      at<Real>(total), at<Real>(losses));
}

template <class State, class Real>
void backward(
    const std::vector<LayerSpec>& specs, int64_t images, int64_t piece, double temperature, bool aligned, uintptr_t state,
    uintptr_t grad_total, uintptr_t grad_layers, bool backwards) {
  const Plan plan = plan_of(specs, images, piece);
  emulator::launch(
      kl_backward<State, Real, Real, Real, 64>, unsigned(plan.pieces), kThreads, 0, backwards,
      table_of(plan, temperature, aligned), at<const Saved<Real>>(state), at<const Real>(grad_total),
      at<const Real>(grad_layers));
}

// strength, energy, gradient, source mask, target mask; images, targets, width, sources, groups
using RowsSpec = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

template <class Real>
DeviceRows<Real> rows_of(const RowsSpec& s) {
  return {at<Real>(std::get<0>(s)), at<Real>(std::get<1>(s)), at<Real>(std::get<2>(s)), at<bool>(std::get<3>(s)),
          at<bool>(std::get<4>(s)), std::get<5>(s),           std::get<6>(s),           std::get<7>(s),
          std::get<8>(s),           std::get<9>(s)};
}

template <class Real>
void topk(const RowsSpec& spec, int64_t k, uintptr_t values, uintptr_t indices, bool backwards) {
  const auto rows = rows_of<Real>(spec);
  const int64_t bytes = topk_bytes<Real>(rows.width), warps = 4, count = rows.images * rows.targets;
  emulator::launch(
      edge_topk_kernel<Real>, unsigned((count + warps - 1) / warps), unsigned(warps * 32), size_t(warps * bytes), backwards,
      rows, k, at<Real>(values), at<int64_t>(indices));
}

template <class Real>
std::vector<int64_t> threshold(const RowsSpec& spec, Real bound, uintptr_t source, uintptr_t values, bool backwards) {
  const auto rows = rows_of<Real>(spec);
  const int64_t count = rows.images * rows.targets;
  std::vector<int64_t> starts(count + 1, 0);
  const auto run = [&](int64_t* counts, int64_t* to, Real* scores) {
    emulator::launch(
        edge_threshold_kernel<Real>, unsigned((count + 1) / 2), 64, 0, backwards, rows, key_of(bound) + 1, counts,
        static_cast<const int64_t*>(starts.data()), to, scores);
  };
  run(starts.data() + 1, nullptr, nullptr);
  for (int64_t i = 0; i < count; ++i) starts[i + 1] += starts[i];
  run(nullptr, at<int64_t>(source), at<Real>(values));
  return starts;
}

template <class Real>
void select(const RowsSpec& spec, int64_t n, uintptr_t values, uintptr_t flat, bool backwards) {
  const auto rows = rows_of<Real>(spec);
  emulator::launch(
      edge_select_kernel<Real>, unsigned(rows.images), kSelectThreads, kSelectThreads / 32 * 8, backwards, rows, n,
      at<Real>(values), at<int64_t>(flat));
}

template <class Real, int Together>
void position(
    const RowsSpec& spec, const std::vector<int64_t>& numbers, int64_t k, uintptr_t values, uintptr_t indices, bool backwards) {
  const auto rows = rows_of<Real>(spec);
  Geometry g;
  for (int d = 0; d < 2; ++d) {
    g.kernel[d] = numbers[d], g.size[d] = numbers[2 + d], g.stride[d] = numbers[4 + d];
    g.padding[d] = numbers[6 + d], g.dilation[d] = numbers[8 + d];
  }
  const int64_t tiles = (rows.targets / rows.groups + Together - 1) / Together;
  emulator::launch(
      edge_position_kernel<Real, Together>, unsigned(rows.images * rows.groups * tiles), kPositionWarps * 32,
      size_t(position_bytes<Real, Together>(rows.width)), backwards, rows, g, k, at<Real>(values), at<int64_t>(indices));
}

// What the emulator itself must catch.
void overflowing_kernel() { shared_memory[threadIdx.x] = 0; }
void deadlocked_kernel() { threadIdx.x == 32 ? __syncwarp() : __syncthreads(); }
void racing_kernel(double* out) {
  shared_memory[threadIdx.x] = threadIdx.x;  // and no barrier
  out[threadIdx.x] = shared_memory[threadIdx.x ^ 63];
}

}  // namespace

PYBIND11_MODULE(minexp_emulated, m) {
  m.attr("piece") = kCudaPiece;
  m.def("forward_pair", &forward<Pair, float>);
  m.def("forward_cached", &forward<Cached, float>);
  m.def("backward_pair", &backward<Pair, float>);
  m.def("backward_cached", &backward<Cached, float>);
  m.def("forward_pair_double", &forward<Pair, double>);
  m.def("backward_pair_double", &backward<Pair, double>);
  m.def("topk", &topk<float>);
  m.def("topk_double", &topk<double>);
  m.def("threshold", &threshold<float>);
  m.def("select", &select<float>);
  m.def("position", &position<float, 16>);
  m.def("position_few", &position<float, 4>);
  m.def("overflow", [] { emulator::launch(overflowing_kernel, 1, 64, 32 * sizeof(double), false); });
  m.def("deadlock", [] { emulator::launch(deadlocked_kernel, 1, 64, 0, false); });
  m.def("race", [](uintptr_t out) { emulator::launch(racing_kernel, 1, 64, 64 * sizeof(double), false, at<double>(out)); });
}
