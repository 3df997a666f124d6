// The torch-free cores against plain double arithmetic, under AddressSanitizer and UndefinedBehaviorSanitizer.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>

#include "../../csrc/edges.h"
#include "../../csrc/kl.h"

using namespace minexp;

static std::mt19937 random_engine(0);

static void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

static std::vector<float> normal(size_t count, float spread) {
  std::normal_distribution<float> draw(0, spread);
  std::vector<float> x(count);
  for (float& value : x) value = draw(random_engine);
  return x;
}

static double plain_kl(const std::vector<float>& a, const std::vector<float>& b, double scale) {
  const auto lse = [&](const std::vector<float>& x) {
    const double top = *std::max_element(x.begin(), x.end()) * scale;
    double sum = 0;
    for (float v : x) sum += std::exp(v * scale - top);
    return top + std::log(sum);
  };
  const double la = lse(a), lb = lse(b);
  double kl = 0;
  for (size_t i = 0; i < a.size(); ++i) kl += std::exp(a[i] * scale - la) * ((a[i] * scale - la) - (b[i] * scale - lb));
  return kl;
}

static void test_exp() {
  for (float x = -125; x <= 125; x += 0.01f)
    require(std::fabs(fast_exp2(x) / std::exp2(double(x)) - 1) < 3e-7, "fast_exp2 is exact to 3e-7");
  require(fast_exp2(-1e30f) < 1e-37f && fast_exp2(-1e30f) > 0, "fast_exp2 ends at the smallest");
  require(fast_exp2(1e30f) > 1e38f, "fast_exp2 ends at the largest");
  require(std::isnan(fast_exp2(std::nanf(""))), "fast_exp2 passes NaN");
}

static void test_rows() {
  for (const int count : {1, 2, 15, 511, 512, 513, 5000})
    for (const float spread : {0.1f, 3.f, 300.f}) {
      const auto a = normal(count, spread), b = normal(count, spread);
      const double want = plain_kl(a, b, 0.5), close = 1e-5 * want + 1e-5 + 1e-7 * spread;  // a - b is rounded
      const float scale = 0.5f * float(kLog2e);
      const auto whole = row_state<Pair>(a.data(), b.data(), 1, Range{0, count}, scale);
      require(std::fabs(whole.loss(nullptr) - want) < close, "a row's loss");
      auto merged = row_state<Pair>(a.data(), b.data(), 1, Range{0, (count + 1) / 2}, scale);
      if (count > 1) merged.merge(row_state<Pair>(a.data(), b.data(), 1, Range{(count + 1) / 2, count}, scale));
      require(std::fabs(merged.loss(nullptr) - want) < close, "the merged loss of two pieces");

      std::vector<float> g(count), p(count);
      const Saved<double> s = whole.saved();
      const Saved<float> saved{float(s.top_a), float(s.sum_a), float(s.top_b), float(s.sum_b)};
      row_gradient<Pair>(a.data(), b.data(), g.data(), 1, Range{0, count}, scale, saved, 1.f, false);
      require(std::fabs(std::accumulate(g.begin(), g.end(), 0.0)) < 1e-3, "a gradient's sum is zero");

      double entropy[2] = {0, 0};
      for (int i = 0; i < count; ++i) {
        p[i] = float(std::exp2(a[i] * double(scale) - s.top_a) / s.sum_a);
        entropy[0] += p[i] > 0 ? p[i] * std::log(double(p[i])) : 0, entropy[1] += p[i];
      }
      const auto cached = row_state<Cached>(p.data(), b.data(), 1, Range{0, count}, scale);
      require(std::fabs(cached.loss(entropy) - want) < close, "a row's loss from a cached target");
    }
}

// Vectors by hand against the plain loops, where this machine has them.
static void test_vectors() {
#if defined(MINEXP_AVX512)
  if (!has_avx512()) return;
  const auto close = [](double x, double y, double of) { return std::fabs(x - y) <= 1e-5 * of; };
  for (const int count : {1, 15, 16, 17, 1023, 1024, 3000}) {
    const auto a = normal(count, 3), b = normal(count, 3);
    std::vector<float> p(count, 1.f / count), g(count), h(count);
    const Pair pair = Pair::about(4, 3), x = wide_sums(pair, a.data(), b.data(), count, 1.3f),
               y = sums_of(pair, a.data(), b.data(), count, 1.3f);
    const double all = 10 * (x.sum_a + x.sum_b);  // growth and slope are sums that cancel
    require(close(x.sum_a, y.sum_a, x.sum_a) && close(x.sum_b, y.sum_b, x.sum_b) && close(x.growth, y.growth, all) &&
                close(x.slope, y.slope, all),
            "sums of a pair");
    const Cached cached = Cached::about(0, 3);
    const double sum = sums_of(cached, p.data(), b.data(), count, 1.3f).sum;
    require(close(wide_sums(cached, p.data(), b.data(), count, 1.3f).sum, sum, sum),
            "sums with a cached target");
    const auto same = [&](const Cross& u, const Cross& v) { return close(u.cross, v.cross, 10) && close(u.mass, v.mass, 1); };
    require(same(wide_cross(cached, p.data(), b.data(), count, 1.3f), cross_of(cached, p.data(), b.data(), count, 1.3f)),
            "cross of a cached target");
    const auto equal = [&] {
      return std::equal(g.begin(), g.end(), h.begin(), [](float u, float v) { return std::fabs(u - v) <= 1e-6f + 1e-5f * std::fabs(v); });
    };
    for (const bool stream : {false, true}) {
      wide_gradient(pair, a.data(), b.data(), g.data(), count, 1.3f, 0.2f, 0.3f, stream), drain();
      gradient_of(pair, a.data(), b.data(), h.data(), count, 1.3f, 0.2f, 0.3f);
      require(equal(), "the gradient of a pair");
      const Cross u = wide_gradient(cached, p.data(), b.data(), g.data(), count, 1.3f, 0.2f, 0.3f, stream);
      drain();
      require(same(u, gradient_of(cached, p.data(), b.data(), h.data(), count, 1.3f, 0.2f, 0.3f)) && equal(),
              "the gradient with a cached target");
    }
  }
#endif
}

static void test_strided_rows() {
  const auto a = normal(7 * 600, 2), b = normal(7 * 600, 2);
  for (int row = 0; row < 7; ++row) {
    std::vector<float> u, v;
    for (int i = 0; i < 600; ++i) u.push_back(a[i * 7 + row]), v.push_back(b[i * 7 + row]);
    const auto state = row_state<Pair>(a.data() + row, b.data() + row, 7, Range{0, 600}, float(kLog2e));
    require(std::fabs(state.loss(nullptr) / plain_kl(u, v, 1) - 1) < 1e-5, "an interleaved row");
  }
}

static void test_plan() {
  for (const int64_t width : {1, 49, 16384, 16385, 200704})
    for (const int32_t rows : {1, 2, 64}) {
      Plan plan;
      plan.images = 3;
      Layer layer{};
      layer.rows = rows, layer.width = int32_t(width), layer.weight = 1;
      plan.add(layer, 16384);
      int64_t covered = 0;
      for (int p = 0; p < plan.layers[0].pieces; ++p) {
        const Range range = plan.layers[0].range(p);
        require(range.begin == covered && range.end > range.begin, "pieces follow one another");
        covered = range.end;
      }
      require(covered == (rows == 1 ? width : rows), "pieces cover the layer");
    }
}

static void test_largest() {
  for (const int64_t width : {1, 5, 16, 17, 300, 2048})
    for (const bool ties : {false, true}) {
      auto strength = normal(width, 1), energy = normal(width, 1);
      if (ties)
        for (int64_t i = 0; i < width; ++i) strength[i] = std::round(strength[i]), energy[i] = std::round(energy[i]);
      std::vector<int64_t> order(width);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
        return std::fabs(strength[i] * energy[i]) > std::fabs(strength[j] * energy[j]);
      });
      const Row<float> row{strength.data(), energy.data(), nullptr, 1.f, width, 0, true};
      Scratch<float> scratch(width);
      for (const int64_t k : {int64_t(1), (width + 1) / 2, width}) {
        std::vector<int32_t> out(k);
        const auto top = row_keys(row, 1.f, scratch.keys.data());
        require(largest(scratch, top, width, k, out.data()) == k, "k are found");
        for (int64_t i = 0; i < k; ++i) require(out[i] == order[i], "the largest, ties by place");
      }
    }
}

static void test_unfold() {
  Geometry g{{3, 2}, {5, 4}, {2, 1}, {1, 0}, {1, 2}};
  const auto image = normal(20, 1);
  std::vector<float> patch(g.taps() * g.positions());
  unfold(g, image.data(), patch.data(), g.positions());
  for (int64_t t = 0; t < g.taps(); ++t)
    for (int64_t p = 0; p < g.positions(); ++p) {
      const int64_t y = p / g.out(1) * 2 - 1 + t / 2, x = p % g.out(1) + t % 2 * 2;
      const float want = y < 0 || y >= 5 || x < 0 || x >= 4 ? 0 : image[y * 4 + x];
      require(patch[t * g.positions() + p] == want, "a patch's element");
    }
}

int main() {
  test_exp();
  test_rows();
  test_vectors();
  test_strided_rows();
  test_plan();
  test_largest();
  test_unfold();
  std::puts("cores: ok");
}
