// Fused multi-layer KL, free of torch: the algebra (shared with CUDA) and the CPU's tiles.
//
// A row is one softmax. Its elements come as logits a = scale * target and b = scale * input (Pair), or as the
// cached p = softmax(a) beside b (Cached). Either algebra is a state that a tile of elements turns into, that
// merges with its neighbour's, and that gives the row's loss and what the gradient needs.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "simd.h"

namespace minexp {

// Maxima further apart than this get a reference each: a shared one would cost digits, then underflow.
constexpr float kFar = 16;

// What the gradient of a row needs: e^(b - top_b) / sum_b - e^(a - top_a) / sum_a.
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

template <class Real>
struct Pair {
  Real top_a, top_b;    // references; equal where one is shared
  Real sum_a, sum_b;    // of e^(a - top_a) and e^(b - top_b)
  Real growth, slope;   // of e^(b - top) - e^(a - top), where shared, and of e^(a - top_a) (b - a)

  MINEXP_BOTH static void references(Real& a, Real& b) {
    if (std::fabs(a - b) <= Real(kFar)) a = b = a > b ? a : b;
  }

  MINEXP_BOTH static Pair about(Real a, Real b) {
    references(a, b);
    return {a, b, 0, 0, 0, 0};
  }

  MINEXP_BOTH bool overflows(const Real* tops, Real rise) const { return tops[0] > top_a + rise || tops[1] > top_b + rise; }

  MINEXP_BOTH void rescale(Real to_a, Real to_b) {
    const bool was_shared = top_a == top_b;
    const Real fa = std::exp(top_a - to_a), fb = std::exp(top_b - to_b);
    sum_a *= fa, sum_b *= fb, slope *= fa;
    growth = was_shared ? growth * fa : sum_b - sum_a;
    top_a = to_a, top_b = to_b;
  }

  MINEXP_BOTH void merge(Pair other) {
    if (top_a == other.top_a && top_b == other.top_b) return add(other);
    align(other);
    add(other);
  }

  // Both get the same references.
  MINEXP_BOTH MINEXP_RARE void align(Pair& other) {
    Real a = top_a > other.top_a ? top_a : other.top_a, b = top_b > other.top_b ? top_b : other.top_b;
    references(a, b);
    rescale(a, b), other.rescale(a, b);
  }

  MINEXP_BOTH void add(const Pair& other) {
    sum_a += other.sum_a, sum_b += other.sum_b, growth += other.growth, slope += other.slope;
  }

  MINEXP_BOTH MINEXP_RARE Real loss(const double*) const {
    const Real ratio = growth / sum_a;
    const bool close = top_a == top_b && std::fabs(ratio) < Real(.5);
    return finite_or_nan((close ? std::log1p(ratio) : top_b - top_a + std::log(sum_b / sum_a)) - slope / sum_a);
  }

  MINEXP_BOTH Saved<double> saved() const { return {double(top_a), double(sum_a), double(top_b), double(sum_b)}; }
};

template <class Real>
struct Cached {
  Real top, sum;       // of e^(b - top)
  Real cross, mass;    // of p b and of p

  MINEXP_BOTH static Cached about(Real, Real b) { return {b, 0, 0, 0}; }

  MINEXP_BOTH bool overflows(const Real* tops, Real rise) const { return tops[1] > top + rise; }

  MINEXP_BOTH void merge(Cached other) {
    if (top != other.top) align(other);
    sum += other.sum, cross += other.cross, mass += other.mass;
  }

  // Both get the same reference.
  MINEXP_BOTH MINEXP_RARE void align(Cached& other) {
    const Real to = top > other.top ? top : other.top;
    sum *= std::exp(top - to), other.sum *= std::exp(other.top - to);
    top = other.top = to;
  }

  // entropy: sum p log p and sum p of the whole row.
  MINEXP_BOTH MINEXP_RARE Real loss(const double* entropy) const {
    return finite_or_nan(Real(entropy[0] - cross + entropy[1] * (top + std::log(sum)) - entropy[1] + 1));
  }

  MINEXP_BOTH Saved<double> saved() const { return {double(top), double(sum), double(top), double(sum)}; }
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

// ---- CPU tiles -------------------------------------------------------------------------------------------------

constexpr int kTile = 512;  // short enough for sums in float, long enough to hide a prefetch

template <class Real>
inline Real top_of(const Real* x, int count) {
  Real top = x[0];
  for (int i = 1; i < count; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// The sums of a tile about the references of `at`, whose own sums are ignored; the tile's maxima go to `tops`.
template <class Real>
MINEXP_INLINE Pair<double> tile_of(const Pair<double>& at, const Real* a, const Real* b, int count, Real scale, double* tops) {
  const Real ref_a = Real(at.top_a), ref_b = Real(at.top_b);
  Real top_a = a[0], top_b = b[0], sum_a = 0, sum_b = 0, growth = 0, slope = 0;
#pragma omp simd reduction(max : top_a, top_b) reduction(+ : sum_a, sum_b, growth, slope)
  for (int i = 0; i < count; ++i) {
    const Real u = a[i] * scale, v = b[i] * scale;
    const Real ea = fast_exp(u - ref_a), eb = fast_exp(v - ref_b);
    top_a = a[i] > top_a ? a[i] : top_a, top_b = b[i] > top_b ? b[i] : top_b;
    sum_a += ea, sum_b += eb, growth += eb - ea, slope += ea * (v - u);
  }
  tops[0] = top_a * scale, tops[1] = top_b * scale;
  return {at.top_a, at.top_b, sum_a, sum_b, growth, slope};
}

template <class Real>
MINEXP_INLINE Cached<double> tile_of(const Cached<double>& at, const Real* p, const Real* b, int count, Real scale, double* tops) {
  const Real ref = Real(at.top);
  Real top = b[0], sum = 0, cross = 0, mass = 0;
#pragma omp simd reduction(max : top) reduction(+ : sum, cross, mass)
  for (int i = 0; i < count; ++i) {
    const Real v = b[i] * scale - ref;
    top = b[i] > top ? b[i] : top;
    sum += fast_exp(v), cross += p[i] * v, mass += p[i];
  }
  tops[0] = tops[1] = top * scale;
  return {at.top, sum, double(cross) + double(mass) * at.top, mass};
}

template <class Real>
MINEXP_INLINE void gradient_of(Pair<double>*, const Real* a, const Real* b, Real* g, int count, Real scale, Saved<Real> s, Real c) {
  const Real ca = c / s.sum_a, cb = c / s.sum_b;
#pragma omp simd
  for (int i = 0; i < count; ++i)
    g[i] = fast_exp(b[i] * scale - s.top_b) * cb - fast_exp(a[i] * scale - s.top_a) * ca;
}

template <class Real>
MINEXP_INLINE void gradient_of(Cached<double>*, const Real* p, const Real* b, Real* g, int count, Real scale, Saved<Real> s, Real c) {
  const Real cb = c / s.sum_b;
#pragma omp simd
  for (int i = 0; i < count; ++i) g[i] = fast_exp(b[i] * scale - s.top_b) * cb - p[i] * c;
}

// target_clones takes no templates, so each instance is named once; float is the one worth cloning.
#define MINEXP_TILES(clones, State, Real)                                                                            \
  clones static State tile(const State& at, const Real* t, const Real* x, int count, Real scale, double* tops) {     \
    return tile_of(at, t, x, count, scale, tops);                                                                    \
  }                                                                                                                  \
  clones static void gradient(                                                                                       \
      State* kind, const Real* t, const Real* x, Real* g, int count, Real scale, Saved<Real> s, Real c) {            \
    gradient_of(kind, t, x, g, count, scale, s, c);                                                                  \
  }
MINEXP_TILES(MINEXP_CLONES, Pair<double>, float)
MINEXP_TILES(MINEXP_CLONES, Cached<double>, float)
MINEXP_TILES(inline, Pair<double>, double)
MINEXP_TILES(inline, Cached<double>, double)

// A tile of a row as Real: the memory itself where it is one already, else a converted or gathered copy.
template <class Real, class T>
inline const Real* fetch(const T* from, int64_t step, int count, Real* buffer) {
  if constexpr (std::is_same_v<Real, T>)
    if (step == 1) {
      for (int i = 0; i < kTile; i += 64 / sizeof(T)) prefetch(from + kTile + i);  // the tile after this one
      return from;
    }
  for (int i = 0; i < count; ++i) buffer[i] = static_cast<Real>(from[i * step]);
  return buffer;
}

// The state of elements [begin, end) of one row. The first elements give the references; a tile is done again where
// it turns out to rise so far above them that its sums might overflow.
template <class State, class Real, class P, class T>
State row_state(const P* target, const T* input, int64_t step, Range range, Real scale) {
  constexpr double kRise = 60;
  constexpr int kProbe = 256;
  Real first[kTile], second[kTile];
  State state;
  for (int64_t at = range.begin; at < range.end; at += kTile) {
    const int count = int(range.end - at < kTile ? range.end - at : kTile);
    const Real* t = fetch(target + at * step, step, count, first);
    const Real* x = fetch(input + at * step, step, count, second);
    if (at == range.begin) {
      const int probe = count < kProbe ? count : kProbe;
      state = State::about(double(top_of(t, probe) * scale), double(top_of(x, probe) * scale));
    }
    double tops[2];
    State sums = tile(state, t, x, count, scale, tops);
    if (state.overflows(tops, kRise)) sums = tile(State::about(tops[0], tops[1]), t, x, count, scale, tops);
    state.merge(sums);
  }
  return state;
}

template <class State, class Real, class P, class T>
void row_gradient(
    const P* target, const T* input, T* grad, int64_t step, Range range, Real scale, Saved<Real> saved, Real c) {
  Real first[kTile], second[kTile], out[kTile];
  for (int64_t at = range.begin; at < range.end; at += kTile) {
    const int count = int(range.end - at < kTile ? range.end - at : kTile);
    const Real* t = fetch(target + at * step, step, count, first);
    const Real* x = fetch(input + at * step, step, count, second);
    if constexpr (std::is_same_v<Real, T>)
      if (step == 1) {
        gradient(static_cast<State*>(nullptr), t, x, grad + at, count, scale, saved, c);
        continue;
      }
    gradient(static_cast<State*>(nullptr), t, x, out, count, scale, saved, c);
    for (int i = 0; i < count; ++i) grad[(at + i) * step] = static_cast<T>(out[i]);
  }
}

}  // namespace minexp
