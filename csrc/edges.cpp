// Edge scoring on the CPU: rows (image, target) in parallel.
#include "edges.h"

#include "ops.h"

namespace minexp {

void check_edges(
    const Tensor& strength, const Tensor& energy, const Maybe& gradient, const Maybe& source_mask,
    const Maybe& target_mask, int64_t groups) {
  const int64_t images = energy.size(0), targets = strength.size(0), sources = energy.size(1);
  const auto fits = [](const Maybe& x, int64_t count, ScalarType type) {
    return !x || (x->is_contiguous() && x->numel() == count && x->scalar_type() == type);
  };
  STD_TORCH_CHECK(
      groups >= 1 && targets % groups == 0 && strength.size(1) * groups == sources && strength.is_contiguous() &&
          energy.is_contiguous() && strength.scalar_type() == energy.scalar_type() &&
          energy.scalar_type() == accumulator(energy) && fits(gradient, images * targets, energy.scalar_type()) &&
          fits(source_mask, images * sources, ScalarType::Bool) && fits(target_mask, images * targets, ScalarType::Bool),
      "minexp: expected contiguous strength [O, I/groups] and energy [B, I] of one dtype, gradient and target_mask "
      "[B, O], source_mask [B, I]");
}

std::tuple<Tensor, Tensor> topk_outputs(const Tensor& strength, const Tensor& energy, int64_t k) {
  STD_TORCH_CHECK(k >= 1 && k <= strength.size(1), "minexp::edge_topk: k is ", k, ", expected 1 to ", strength.size(1));
  const auto shape = {energy.size(0), strength.size(0), k};
  return {torch::stable::new_empty(energy, shape), torch::stable::new_empty(energy, shape, ScalarType::Long)};
}

std::tuple<Tensor, Tensor> select_outputs(const Tensor& strength, const Tensor& energy, int64_t n) {
  const int64_t most = strength.size(0) * strength.size(1);
  STD_TORCH_CHECK(n >= 1 && n <= most, "minexp::edge_select: n is ", n, ", expected 1 to ", most);
  const auto shape = {energy.size(0), n};
  return {torch::stable::new_empty(energy, shape), torch::stable::new_empty(energy, shape, ScalarType::Long)};
}

Geometry geometry_of(
    const Tensor& weight, const Tensor& activation, const std::vector<int64_t>& stride,
    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  STD_TORCH_CHECK(
      weight.dim() == 4 && activation.dim() == 4 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
      "minexp::edge_position_topk: expected weight [O, I/groups, h, w] and activation [B, I, H, W]");
  Geometry g;
  for (int d = 0; d < 2; ++d) {
    g.kernel[d] = weight.size(2 + d), g.size[d] = activation.size(2 + d);
    g.stride[d] = stride[d], g.padding[d] = padding[d], g.dilation[d] = dilation[d];
    STD_TORCH_CHECK(g.stride[d] > 0 && g.out(d) > 0, "minexp::edge_position_topk: the kernel does not fit the image");
  }
  return g;
}

namespace {

// The rows of a call; strength may be null where the caller scores by itself.
template <class Real>
struct Rows {
  const Real *strength, *energy, *gradient;
  const bool *source_mask, *target_mask;
  int64_t images, targets, width, sources, groups;

  Rows(const Tensor& strength, const Tensor& energy, const Maybe& gradient, const Maybe& source_mask,
       const Maybe& target_mask, int64_t groups)
      : strength(data<Real>(strength)), energy(data<Real>(energy)), gradient(data<Real>(gradient)),
        source_mask(data<bool>(source_mask)), target_mask(data<bool>(target_mask)), images(energy.size(0)),
        targets(strength.size(0)), width(strength.size(1)), sources(energy.size(1)), groups(groups) {}

  int64_t count() const { return images * targets; }

  Row<Real> operator[](int64_t at) const {
    const int64_t image = at / targets, target = at % targets, first = target / (targets / groups) * width;
    return {strength + target * width,
            energy + image * sources + first,
            source_mask ? source_mask + image * sources + first : nullptr,
            gradient ? gradient[at] : Real(1),
            width,
            first,
            !target_mask || target_mask[at]};
  }
};

// The k largest of a row whose keys are in scratch; `score(i)` is the value before the gradient.
template <class Real, class Score>
void write_topk(
    Scratch<Real>& scratch, Key<Real> top, const Row<Real>& row, int64_t k, int32_t* order, Real* values, int64_t* indices,
    Score score) {
  const int64_t found = largest(scratch, top, row.width, k, order);
  for (int64_t i = 0; i < k; ++i) {
    const bool some = i < found;
    values[i] = some ? score(order[i]) * row.gradient : Real(0);
    indices[i] = some ? order[i] + row.first_source : -1;
  }
}

}  // namespace

std::tuple<Tensor, Tensor> edge_topk_cpu(
    Tensor strength, Tensor energy, int64_t k, Maybe gradient, Maybe source_mask, Maybe target_mask, int64_t groups) {
  check_edges(strength, energy, gradient, source_mask, target_mask, groups);
  auto [values, indices] = topk_outputs(strength, energy, k);
  with_real(energy, [&, &values = values, &indices = indices](auto zero) {
    using Real = decltype(zero);
    const Rows<Real> rows(strength, energy, gradient, source_mask, target_mask, groups);
    torch::stable::parallel_for(0, rows.count(), 64, [&](int64_t begin, int64_t end) {
      Scratch<Real> scratch(rows.width);
      std::vector<int32_t> order(k);
      for (int64_t at = begin; at < end; ++at) {
        const Row<Real> row = rows[at];
        const auto top = row_keys(row, Real(1), scratch.keys.data());
        write_topk(scratch, top, row, k, order.data(), data<Real>(values) + at * k, data<int64_t>(indices) + at * k,
                   [&](int64_t i) { return row.score(i); });
      }
    });
  });
  return {values, indices};
}

std::tuple<Tensor, Tensor, Tensor> edge_threshold_cpu(
    Tensor strength, Tensor energy, double threshold, Maybe gradient, Maybe source_mask, Maybe target_mask,
    int64_t groups) {
  check_edges(strength, energy, gradient, source_mask, target_mask, groups);
  Tensor crow = torch::stable::new_empty(energy, {energy.size(0) * strength.size(0) + 1}, ScalarType::Long);
  Maybe source, values;
  with_real(energy, [&](auto zero) {
    using Real = decltype(zero);
    const Rows<Real> rows(strength, energy, gradient, source_mask, target_mask, groups);
    int64_t* starts = data<int64_t>(crow);
    const Key<Real> least = key_of(Real(threshold)) + 1;  // strictly above; NaN is above everything
    const auto each_row = [&](auto f) {
      torch::stable::parallel_for(0, rows.count(), 64, [&](int64_t begin, int64_t end) {
        Scratch<Real> scratch(rows.width);
        for (int64_t at = begin; at < end; ++at) {
          const Row<Real> row = rows[at];
          row_keys(row, row.gradient, scratch.keys.data());
          f(at, row, scratch);
        }
      });
    };
    each_row([&](int64_t at, const Row<Real>& row, Scratch<Real>& scratch) {
      starts[at + 1] = count(scratch.keys.data(), row.width, least);
    });
    starts[0] = 0;
    for (int64_t at = 0; at < rows.count(); ++at) starts[at + 1] += starts[at];
    source = torch::stable::new_empty(energy, {starts[rows.count()]}, ScalarType::Long);
    values = torch::stable::new_empty(energy, {starts[rows.count()]});
    each_row([&](int64_t at, const Row<Real>& row, Scratch<Real>& scratch) {
      const int64_t found = compact(scratch.keys.data(), row.width, least, scratch.places.data());
      for (int64_t j = 0; j < found; ++j) {
        const int64_t i = scratch.places[j];
        data<int64_t>(source)[starts[at] + j] = i + row.first_source;
        data<Real>(values)[starts[at] + j] = row.score(i) * row.gradient;
      }
    });
  });
  return {crow, *source, *values};
}

std::tuple<Tensor, Tensor> edge_select_cpu(
    Tensor strength, Tensor energy, int64_t n, Maybe gradient, Maybe source_mask, Maybe target_mask, int64_t groups) {
  check_edges(strength, energy, gradient, source_mask, target_mask, groups);
  auto [values, flat] = select_outputs(strength, energy, n);
  with_real(energy, [&, &values = values, &flat = flat](auto zero) {
    using Real = decltype(zero);
    using K = Key<Real>;
    const Rows<Real> rows(strength, energy, gradient, source_mask, target_mask, groups);
    torch::stable::parallel_for(0, rows.images, 1, [&](int64_t begin, int64_t end) {
      Scratch<Real> scratch(rows.width);
      for (int64_t image = begin; image < end; ++image) {
        const auto each_row = [&](auto f) {
          for (int64_t target = 0; target < rows.targets; ++target) {
            const Row<Real> row = rows[image * rows.targets + target];
            f(row, target * rows.width, row_keys(row, row.gradient, scratch.keys.data()));
          }
        };
        K top = 0;
        each_row([&](const Row<Real>&, int64_t, K largest) { top = std::max(top, largest); });
        const K* keys = scratch.keys.data();
        const auto at_least = [&](K least) {
          int64_t found = 0;
          each_row([&](const Row<Real>& row, int64_t, K largest) {
            if (largest >= least) found += count(keys, row.width, least);
          });
          return found;
        };
        std::vector<std::pair<K, int64_t>> kept;  // at least the n largest, in order of place
        if (top > 0) {
          const K least = lower_bound_of_top(top, n, n / 4 + 64, at_least);
          int64_t ties = n - at_least(least + 1);  // of the n-th itself, only as many as are needed
          each_row([&](const Row<Real>& row, int64_t first, K largest) {
            if (largest < least) return;
            const int64_t found = compact(keys, row.width, least, scratch.places.data());
            for (int64_t j = 0; j < found; ++j) {
              const int64_t i = scratch.places[j];
              if (keys[i] > least || ties-- > 0) kept.emplace_back(keys[i], first + i);
            }
          });
        }
        const auto larger = [](const auto& x, const auto& y) { return x.first != y.first ? x.first > y.first : x.second < y.second; };
        const int64_t found = std::min<int64_t>(n, kept.size());
        std::nth_element(kept.begin(), kept.begin() + found, kept.end(), larger);
        std::sort(kept.begin(), kept.begin() + found, [](const auto& x, const auto& y) { return x.second < y.second; });
        for (int64_t j = 0; j < n; ++j) {
          const bool some = j < found;
          const int64_t place = some ? kept[j].second : -1;
          const Row<Real> row = rows[image * rows.targets + (some ? place / rows.width : 0)];
          data<int64_t>(flat)[image * n + j] = place;
          data<Real>(values)[image * n + j] = some ? row.score(place % rows.width) * row.gradient : Real(0);
        }
      }
    });
  });
  return {values, flat};
}

std::tuple<Tensor, Tensor> edge_position_topk_cpu(
    Tensor weight, Tensor activation, int64_t k, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, Maybe gradient, Maybe source_mask, Maybe target_mask, int64_t groups) {
  check_edges(weight, activation, gradient, source_mask, target_mask, groups);
  const Geometry geometry = geometry_of(weight, activation, stride, padding, dilation);
  auto [values, indices] = topk_outputs(weight, activation, k);
  with_real(activation, [&, &values = values, &indices = indices](auto zero) {
    using Real = decltype(zero);
    const Rows<Real> rows(weight, activation, gradient, source_mask, target_mask, groups);
    const int64_t taps = geometry.taps(), pixels = geometry.size[0] * geometry.size[1];
    const int64_t together = rows.targets / groups, padded = (together + kLanes - 1) / kLanes * kLanes;
    const int64_t pitch = (geometry.positions() + 7) / 8 * 8;
    // [group, source, tap, target]: the targets, side by side, are what a vector holds.
    std::vector<Real> kernel(groups * rows.width * taps * padded);
    for (int64_t o = 0; o < rows.targets; ++o)
      for (int64_t i = 0; i < rows.width * taps; ++i)
        kernel[(o / together * rows.width * taps + i) * padded + o % together] = data<Real>(weight)[o * rows.width * taps + i];
    torch::stable::parallel_for(0, rows.images * groups, 1, [&](int64_t begin, int64_t end) {
      Scratch<Real> scratch(rows.width);
      std::vector<Real> patch(taps * pitch), scores(together * rows.width), ones(rows.width, Real(1));
      std::vector<int32_t> order(k);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / groups, group = task % groups, first = image * rows.sources + group * rows.width;
        for (int64_t i = 0; i < rows.width; ++i) {
          unfold(geometry, data<Real>(activation) + (first + i) * pixels, patch.data(), pitch);
          const Real* w = kernel.data() + (group * rows.width + i) * taps * padded;
          for (int64_t o = 0; o < together; o += kLanes) {
            Real lanes[kLanes];
            position_scores(w + o, taps, padded, patch.data(), pitch, lanes);
            for (int64_t j = o; j < std::min(o + kLanes, together); ++j) scores[j * rows.width + i] = lanes[j - o];
          }
        }
        for (int64_t o = 0; o < together; ++o) {
          const int64_t at = image * rows.targets + group * together + o;
          Row<Real> row = rows[at];
          row.strength = scores.data() + o * rows.width, row.energy = ones.data();
          const auto top = row_keys(row, Real(1), scratch.keys.data());
          write_topk(scratch, top, row, k, order.data(), data<Real>(values) + at * k, data<int64_t>(indices) + at * k,
                     [&](int64_t i) { return row.strength[i]; });
        }
      }
    });
  });
  return {values, indices};
}

}  // namespace minexp
