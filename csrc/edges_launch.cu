// Launches of edge scoring. Only edge_threshold has to wait: its result's size is data.
#include "cuda.h"
#include "edges.cuh"

namespace minexp {
namespace {

template <class Real>
DeviceRows<Real> rows_of(
    const Tensor& strength, const Tensor& energy, const Maybe& gradient, const Maybe& source_mask,
    const Maybe& target_mask, int64_t groups) {
  return {data<Real>(strength), data<Real>(energy), data<Real>(gradient), data<bool>(source_mask), data<bool>(target_mask),
          energy.size(0), strength.size(0), strength.size(1), energy.size(1), groups};
}

// Above 48 KB a kernel has to ask.
template <class Kernel>
void allow(Kernel kernel, int64_t bytes) {
  if (bytes <= 48 * 1024) return;
  const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "minexp: a target of so many sources needs ", bytes, " bytes of shared memory");
}

unsigned blocks(int64_t rows, int64_t each) { return unsigned((rows + each - 1) / each); }

}  // namespace

std::tuple<Tensor, Tensor> edge_topk_cuda(
    Tensor strength, Tensor energy, int64_t k, Maybe gradient, Maybe source_mask, Maybe target_mask, int64_t groups) {
  const torch::stable::accelerator::DeviceGuard guard(energy.get_device());
  check_edges(strength, energy, gradient, source_mask, target_mask, groups);
  auto [values, indices] = topk_outputs(strength, energy, k);
  with_real(energy, [&, &values = values, &indices = indices](auto zero) {
    using Real = decltype(zero);
    const auto rows = rows_of<Real>(strength, energy, gradient, source_mask, target_mask, groups);
    if (rows.images == 0) return;
    const int64_t bytes = topk_bytes<Real>(rows.width), warps = std::clamp<int64_t>(48 * 1024 / bytes, 1, 8);
    allow(edge_topk_kernel<Real>, warps * bytes);
    edge_topk_kernel<<<blocks(rows.images * rows.targets, warps), unsigned(warps * 32), warps * bytes, current_stream(energy)>>>(
        rows, k, data<Real>(values), data<int64_t>(indices));
    check_launch("edge_topk");
  });
  return {values, indices};
}

std::tuple<Tensor, Tensor, Tensor> edge_threshold_cuda(
    Tensor strength, Tensor energy, double threshold, Maybe gradient, Maybe source_mask, Maybe target_mask,
    int64_t groups) {
  const torch::stable::accelerator::DeviceGuard guard(energy.get_device());
  check_edges(strength, energy, gradient, source_mask, target_mask, groups);
  const int64_t count = energy.size(0) * strength.size(0);
  Tensor counts = torch::stable::new_zeros(energy, {count + 1}, ScalarType::Long);
  Tensor crow = counts;
  Maybe source, values;
  with_real(energy, [&](auto zero) {
    using Real = decltype(zero);
    const auto rows = rows_of<Real>(strength, energy, gradient, source_mask, target_mask, groups);
    const cudaStream_t stream = current_stream(energy);
    const Key<Real> least = key_of(Real(threshold)) + 1;
    if (count > 0)
      edge_threshold_kernel<Real><<<blocks(count, 8), 256, 0, stream>>>(
          rows, least, data<int64_t>(counts) + 1, nullptr, nullptr, nullptr);
    crow = cumulative(counts);
    int64_t total = 0;
    cudaMemcpyAsync(&total, data<int64_t>(crow) + count, sizeof total, cudaMemcpyDeviceToHost, stream);
    cudaStreamSynchronize(stream);
    source = torch::stable::new_empty(energy, {total}, ScalarType::Long);
    values = torch::stable::new_empty(energy, {total});
    if (total > 0)
      edge_threshold_kernel<Real><<<blocks(count, 8), 256, 0, stream>>>(
          rows, least, nullptr, data<int64_t>(crow), data<int64_t>(*source), data<Real>(*values));
    check_launch("edge_threshold");
  });
  return {crow, *source, *values};
}

std::tuple<Tensor, Tensor> edge_select_cuda(
    Tensor strength, Tensor energy, int64_t n, Maybe gradient, Maybe source_mask, Maybe target_mask, int64_t groups) {
  const torch::stable::accelerator::DeviceGuard guard(energy.get_device());
  check_edges(strength, energy, gradient, source_mask, target_mask, groups);
  auto [values, flat] = select_outputs(strength, energy, n);
  with_real(energy, [&, &values = values, &flat = flat](auto zero) {
    using Real = decltype(zero);
    const auto rows = rows_of<Real>(strength, energy, gradient, source_mask, target_mask, groups);
    if (rows.images == 0) return;
    edge_select_kernel<<<unsigned(rows.images), kSelectThreads, kSelectThreads / 32 * 8, current_stream(energy)>>>(
        rows, n, data<Real>(values), data<int64_t>(flat));
    check_launch("edge_select");
  });
  return {values, flat};
}

std::tuple<Tensor, Tensor> edge_position_topk_cuda(
    Tensor weight, Tensor activation, int64_t k, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, Maybe gradient, Maybe source_mask, Maybe target_mask, int64_t groups) {
  const torch::stable::accelerator::DeviceGuard guard(activation.get_device());
  check_edges(weight, activation, gradient, source_mask, target_mask, groups);
  const Geometry geometry = geometry_of(weight, activation, stride, padding, dilation);
  auto [values, indices] = topk_outputs(weight, activation, k);
  with_real(activation, [&, &values = values, &indices = indices](auto zero) {
    using Real = decltype(zero);
    const auto rows = rows_of<Real>(weight, activation, gradient, source_mask, target_mask, groups);
    if (rows.images == 0) return;
    const int64_t group_targets = rows.targets / groups;
    const auto launch = [&](auto together) {
      constexpr int kTogether = decltype(together)::value;
      const int64_t bytes = position_bytes<Real, kTogether>(rows.width);
      const auto kernel = edge_position_kernel<Real, kTogether>;
      allow(kernel, bytes);
      kernel<<<unsigned(rows.images * groups * ((group_targets + kTogether - 1) / kTogether)), kPositionWarps * 32, bytes,
               current_stream(activation)>>>(rows, geometry, k, data<Real>(values), data<int64_t>(indices));
    };
    // Many targets share what is read, as far as their keys fit.
    if (group_targets > 4 && position_bytes<Real, 16>(rows.width) <= 100 * 1024)
      launch(std::integral_constant<int, 16>());
    else
      launch(std::integral_constant<int, 4>());
    check_launch("edge_position_topk");
  });
  return {values, indices};
}

}  // namespace minexp
