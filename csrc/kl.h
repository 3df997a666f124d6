// Fused multi-layer KL, free of torch: the algebra (shared with CUDA) and the CPU's rows.
//
// A row is one softmax. Its elements come as logits a and b to base 2, scale * target and scale * input with
// scale = log2(e) / T (Pair), or as the cached p = softmax(a) beside b (Cached). Either algebra is a state that a
// range of elements turns into, that merges with its neighbour's, and that gives the row's loss and what the gradient
// needs. Sums are about a reference taken from the first elements; where they outgrow it, it is taken anew.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "simd.h"

namespace minexp {

constexpr double kLog2e = 1.44269504088896341;
// Maxima further apart than this get a reference each: a shared one would cost digits, then underflow.
constexpr float kFar = 23;
constexpr float kMost = 0x1p80f;  // sums beyond this are about too low a reference

// What the gradient of a row needs: 2^(b - top_b) / sum_b - 2^(a - top_a) / sum_a.
template <class Real>
struct Saved {
  Real top_a, sum_a, top_b, sum_b;
};

template <class Real>
MINEXP_BOTH inline Real finite_or_nan(Real x) {
  return x - x == Real(0) ? x : std::numeric_limits<Real>::quiet_NaN();
}

// A loss that is not finite must not leave finite gradients behind.
template <class Real>
MINEXP_BOTH inline Saved<Real> saved_or_nan(double loss, Saved<double> s) {
  const double poison = loss == loss ? 1 : loss;
  return {Real(s.top_a * poison), Real(s.sum_a * poison), Real(s.top_b * poison), Real(s.sum_b * poison)};
}

// What a cached row's loss needs beside its sum; a pair has it in its sums already.
struct Cross {
  double cross, mass;  // of p b and of p

  MINEXP_BOTH void add(Cross other) { cross += other.cross, mass += other.mass; }
};

struct Pair {
  double top_a, top_b;   // references; equal where one is shared
  double sum_a, sum_b;   // of 2^(a - top_a) and 2^(b - top_b)
  double growth, slope;  // of 2^(b - top) - 2^(a - top), where shared, and of 2^(a - top_a) (b - a)

  MINEXP_BOTH static void references(double& a, double& b) {
    if (std::fabs(a - b) <= double(kFar)) a = b = a > b ? a : b;
  }

  MINEXP_BOTH static Pair about(double a, double b) {
    references(a, b);
    return {a, b, 0, 0, 0, 0};
  }

  MINEXP_BOTH static Pair resumed(double a, double b) { return {a, b, 0, 0, 0, 0}; }

  MINEXP_BOTH bool outgrown() const { return !(sum_a < double(kMost) && sum_b < double(kMost)); }

  MINEXP_BOTH void rescale(double to_a, double to_b) {
    const bool was_shared = top_a == top_b;
    const double fa = std::exp2(top_a - to_a), fb = std::exp2(top_b - to_b);
    sum_a *= fa, sum_b *= fb, slope *= fa;
    growth = was_shared ? growth * fa : sum_b - sum_a;
    top_a = to_a, top_b = to_b;
  }

  // Of the same references.
  MINEXP_BOTH void add(const Pair& other) {
    sum_a += other.sum_a, sum_b += other.sum_b, growth += other.growth, slope += other.slope;
  }

  MINEXP_BOTH void merge(Pair other) {
    if (top_a != other.top_a || top_b != other.top_b) align(other);
    add(other);
  }

  // Both get the same references.
  MINEXP_BOTH MINEXP_RARE void align(Pair& other) {
    double a = top_a > other.top_a ? top_a : other.top_a, b = top_b > other.top_b ? top_b : other.top_b;
    references(a, b);
    rescale(a, b), other.rescale(a, b);
  }

  MINEXP_BOTH MINEXP_RARE double loss(const double*) const {
    const double ratio = growth / sum_a;
    const bool close = top_a == top_b && std::fabs(ratio) < .5;
    return finite_or_nan(
        (close ? std::log1p(ratio) : kLn2 * (top_b - top_a) + std::log(sum_b / sum_a)) - kLn2 * slope / sum_a);
  }

  MINEXP_BOTH void add(Cross) {}
  MINEXP_BOTH Saved<double> saved() const { return {top_a, sum_a, top_b, sum_b}; }
};

struct Cached {
  double top, sum;  // of 2^(b - top)
  Cross rest;

  MINEXP_BOTH static Cached about(double, double b) { return {b, 0, {0, 0}}; }
  MINEXP_BOTH static Cached resumed(double, double b) { return about(b, b); }

  MINEXP_BOTH bool outgrown() const { return !(sum < double(kMost)); }

  // Of the same reference.
  MINEXP_BOTH void add(const Cached& other) { sum += other.sum, rest.add(other.rest); }

  MINEXP_BOTH void merge(Cached other) {
    if (top != other.top) align(other);
    add(other);
  }

  // Both get the same reference.
  MINEXP_BOTH MINEXP_RARE void align(Cached& other) {
    const double to = top > other.top ? top : other.top;
    sum *= std::exp2(top - to), other.sum *= std::exp2(other.top - to);
    top = other.top = to;
  }

  // entropy: sum p log p and sum p of the whole row.
  MINEXP_BOTH MINEXP_RARE double loss(const double* entropy) const {
    return finite_or_nan(entropy[0] + kLn2 * (entropy[1] * (top + std::log2(sum)) - rest.cross) - entropy[1] + 1);
  }

  MINEXP_BOTH void add(Cross other) { rest.add(other); }
  MINEXP_BOTH Saved<double> saved() const { return {top, sum, top, sum}; }
};

struct Range {
  int64_t begin, end;
};

// One layer: `rows` softmaxes of `width` elements in each image; row r begins at r * (strided ? 1 : width) and
// steps by strided ? rows : 1. An image is cut into `pieces` of `each` elements or rows, numbered from
// `first_piece`.
struct Layer {
  const void *target, *input;
  void* grad;
  int32_t rows, width, first_row, first_piece, pieces, each;
  float weight;
  bool strided;

  MINEXP_BOTH int64_t step() const { return strided ? rows : 1; }
  MINEXP_BOTH int64_t begin(int64_t row) const { return strided ? row : row * width; }
  MINEXP_BOTH int64_t features() const { return int64_t(rows) * width; }

  // A piece's elements where there is one row, else its rows.
  MINEXP_BOTH Range range(int64_t piece) const {
    const int64_t all = rows == 1 ? width : rows, end = (piece + 1) * each;
    return {piece * each, end < all ? end : all};
  }
};

// What the CPU and the CUDA launcher are both given.
struct Plan {
  std::vector<Layer> layers;
  int64_t images = 0, rows = 0, pieces = 0;

  // Appends a layer cut into pieces of about `size` elements: a single row anywhere, several only between two of them.
  void add(Layer layer, int64_t size) {
    const int64_t all = layer.rows == 1 ? layer.width : layer.rows;
    layer.each = int32_t(layer.rows == 1 ? size : size > layer.width ? size / layer.width : 1);
    layer.pieces = layer.weight == 0 ? 0 : int32_t((all + layer.each - 1) / layer.each);
    layer.first_row = int32_t(rows), layer.first_piece = int32_t(pieces);
    rows += layer.rows, pieces += images * layer.pieces;
    layers.push_back(layer);
  }
};

// ---- CPU runs of elements: plain loops, cloned for the x86-64 levels; kl_avx512.h has the same by hand ---------------

constexpr int kTile = 1024;  // elements whose sums are kept in Real; those of tiles add up in double

template <class Real>
inline Real top_of(const Real* x, int64_t count) {
  Real top = x[0];
#pragma omp simd reduction(max : top)
  for (int64_t i = 1; i < count; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// The sums of a run about the references of `at`, whose own sums are ignored. Cached sums are of b alone.
template <class Real>
MINEXP_INLINE Pair sums_of(const Pair& at, const Real* a, const Real* b, int64_t count, Real scale) {
  const Real ref_a = Real(at.top_a), ref_b = Real(at.top_b);
  Pair found = Pair::resumed(at.top_a, at.top_b);
  for (int64_t begin = 0; begin < count; begin += kTile) {
    const int64_t end = begin + kTile < count ? begin + kTile : count;
    Real sum_a = 0, sum_b = 0, growth = 0, slope = 0;
#pragma omp simd reduction(+ : sum_a, sum_b, growth, slope)
    for (int64_t i = begin; i < end; ++i) {
      const Real ea = fast_exp2(a[i] * scale - ref_a), eb = fast_exp2(b[i] * scale - ref_b);
      sum_a += ea, sum_b += eb, growth += eb - ea, slope += ea * (b[i] - a[i]);
    }
    found.sum_a += sum_a, found.sum_b += sum_b, found.growth += growth, found.slope += double(slope) * double(scale);
  }
  return found;
}

template <class Real>
MINEXP_INLINE Cached sums_of(const Cached& at, const Real*, const Real* b, int64_t count, Real scale) {
  const Real ref = Real(at.top);
  Cached found = Cached::about(at.top, at.top);
  for (int64_t begin = 0; begin < count; begin += kTile) {
    const int64_t end = begin + kTile < count ? begin + kTile : count;
    Real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) sum += fast_exp2(b[i] * scale - ref);
    found.sum += sum;
  }
  return found;
}

template <class Real>
MINEXP_INLINE Cross cross_of(const Cached& at, const Real* p, const Real* b, int64_t count, Real scale) {
  const Real ref = Real(at.top);
  Cross found{0, 0};
  for (int64_t begin = 0; begin < count; begin += kTile) {
    const int64_t end = begin + kTile < count ? begin + kTile : count;
    Real cross = 0, mass = 0;
#pragma omp simd reduction(+ : cross, mass)
    for (int64_t i = begin; i < end; ++i) cross += p[i] * (b[i] * scale - ref), mass += p[i];
    found.add({double(cross) + double(mass) * at.top, mass});
  }
  return found;
}

// g = cb * 2^(b - top_b) - ca * 2^(a - top_a), or with p; and cross_of() on the way.
template <class Real>
MINEXP_INLINE Cross gradient_of(
    const Pair& at, const Real* a, const Real* b, Real* g, int64_t count, Real scale, Real ca, Real cb) {
  const Real ref_a = Real(at.top_a), ref_b = Real(at.top_b);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    g[i] = fast_exp2(b[i] * scale - ref_b) * cb - fast_exp2(a[i] * scale - ref_a) * ca;
  return {0, 0};
}

template <class Real>
MINEXP_INLINE Cross gradient_of(
    const Cached& at, const Real* p, const Real* b, Real* g, int64_t count, Real scale, Real c, Real cb) {
  const Real ref = Real(at.top);
  Cross found{0, 0};
  for (int64_t begin = 0; begin < count; begin += kTile) {
    const int64_t end = begin + kTile < count ? begin + kTile : count;
    Real cross = 0, mass = 0;
#pragma omp simd reduction(+ : cross, mass)
    for (int64_t i = begin; i < end; ++i) {
      const Real v = b[i] * scale - ref;
      g[i] = fast_exp2(v) * cb - p[i] * c;
      cross += p[i] * v, mass += p[i];
    }
    found.add({double(cross) + double(mass) * at.top, mass});
  }
  return found;
}

}  // namespace minexp

#include "kl_avx512.h"

namespace minexp {

// target_clones takes no templates, so each instance is named once; float is the one worth cloning.
#define MINEXP_RUNS(clones, State, Real)                                                                            \
  clones static State plain_sums(const State& at, const Real* t, const Real* x, int64_t count, Real scale) {             \
    return sums_of(at, t, x, count, scale);                                                                          \
  }                                                                                                                  \
  clones static Cross plain_gradient(                                                                                \
      const State& at, const Real* t, const Real* x, Real* g, int64_t count, Real scale, Real c, Real cb) {              \
    return gradient_of(at, t, x, g, count, scale, c, cb);                                                            \
  }
MINEXP_RUNS(MINEXP_CLONES, Pair, float)
MINEXP_RUNS(MINEXP_CLONES, Cached, float)
MINEXP_RUNS(inline, Pair, double)
MINEXP_RUNS(inline, Cached, double)
MINEXP_CLONES static Cross plain_cross(const Cached& at, const float* p, const float* b, int64_t count, float scale) {
  return cross_of(at, p, b, count, scale);
}
static inline Cross plain_cross(const Cached& at, const double* p, const double* b, int64_t count, double scale) {
  return cross_of(at, p, b, count, scale);
}

// By hand where the machine has it, else plain.
#if defined(MINEXP_AVX512)
#define MINEXP_WIDE(Real, call)               \
  if constexpr (std::is_same_v<Real, float>) \
    if (has_avx512()) return call;
#else
#define MINEXP_WIDE(Real, call)
#endif

template <class State, class Real>
inline State run_sums(const State& at, const Real* t, const Real* x, int64_t count, Real scale) {
  MINEXP_WIDE(Real, wide_sums(at, t, x, count, scale))
  return plain_sums(at, t, x, count, scale);
}

template <class Real>
inline Cross run_cross(const Cached& at, const Real* p, const Real* x, int64_t count, Real scale) {
  MINEXP_WIDE(Real, wide_cross(at, p, x, count, scale))
  return plain_cross(at, p, x, count, scale);
}

// stream: the gradient passes the caches by, where the machine can.
template <class State, class Real>
inline Cross run_gradient(
    const State& at, const Real* t, const Real* x, Real* g, int64_t count, Real scale, Real c, Real cb, [[maybe_unused]] bool stream) {
  MINEXP_WIDE(Real, wide_gradient(at, t, x, g, count, scale, c, cb, stream))
  return plain_gradient(at, t, x, g, count, scale, c, cb);
}

// ---- CPU rows ------------------------------------------------------------------------------------------------------

// Part of a row as Real: the memory itself where it is one already, else a converted or gathered copy of a tile.
template <class Real, class T>
inline const Real* fetch(const T* from, int64_t step, int64_t count, Real* buffer) {
  if constexpr (std::is_same_v<Real, T>)
    if (step == 1) return from;
  for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<Real>(from[i * step]);
  return buffer;
}

// How much of a row is taken at once: all where both sides are read in place, else what the buffers hold.
template <class Real, class P, class T>
inline int64_t run_length(int64_t step, Range range) {
  const bool in_place = std::is_same_v<Real, P> && std::is_same_v<Real, T> && step == 1;
  return in_place ? std::max<int64_t>(range.end - range.begin, 1) : kTile;
}

// The state of elements [begin, end) of one row, complete or without the Cross that a gradient would find as well.
template <class State, class Real, class P, class T>
State row_state(const P* target, const T* input, int64_t step, Range range, Real scale, bool complete = true) {
  constexpr bool reads_target = std::is_same_v<State, Pair>;  // for the sums
  constexpr int64_t kProbe = 64;
  const int64_t length = run_length<Real, P, T>(step, range);
  Real first[kTile], second[kTile];
  State state;
  for (int64_t at = range.begin; at < range.end; at += length) {
    const int64_t count = std::min(length, range.end - at);
    const Real* t = reads_target || complete ? fetch(target + at * step, step, count, first) : nullptr;
    const Real* x = fetch(input + at * step, step, count, second);
    const auto about_top_of = [&](int64_t some) {
      return State::about(reads_target ? double(top_of(t, some) * scale) : 0, double(top_of(x, some) * scale));
    };
    if (at == range.begin) state = about_top_of(std::min(count, kProbe));
    State sums = run_sums(state, t, x, count, scale);
    if (sums.outgrown()) sums = run_sums(about_top_of(count), t, x, count, scale);
    state.merge(sums);
    if constexpr (!reads_target)
      if (complete) state.add(run_cross(state, t, x, count, scale));
  }
  return state;
}

// c times the gradient of elements [begin, end) of one row whose state was saved.
template <class State, class Real, class P, class T>
Cross row_gradient(
    const P* target, const T* input, T* grad, int64_t step, Range range, Real scale, Saved<Real> saved, Real c, bool stream) {
  const int64_t length = run_length<Real, P, T>(step, range);
  const State about = State::resumed(saved.top_a, saved.top_b);
  const Real ca = std::is_same_v<State, Pair> ? c / saved.sum_a : c, cb = c / saved.sum_b;
  Real first[kTile], second[kTile], out[kTile];
  Cross found{0, 0};
  for (int64_t at = range.begin; at < range.end; at += length) {
    const int64_t count = std::min(length, range.end - at);
    const Real* t = fetch(target + at * step, step, count, first);
    const Real* x = fetch(input + at * step, step, count, second);
    Real* g = out;
    if constexpr (std::is_same_v<Real, T>)
      if (step == 1) g = grad + at;
    found.add(run_gradient(about, t, x, g, count, scale, ca, cb, stream && g != out));
    if (g == out)
      for (int64_t i = 0; i < count; ++i) grad[(at + i) * step] = static_cast<T>(out[i]);
  }
  return found;
}

}  // namespace minexp
