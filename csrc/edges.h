// Sparse edge scoring, free of torch: one row of scores at a time, never the dense [B, O, I].
//
// A score's key orders magnitudes as integers: the bits of |score| plus one; 0 is an entry masked out. NaN lies
// above infinity. The k largest are found by bisection on the key's range, counting; then compacted and ranked.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace minexp {

template <class Real>
using Key = std::conditional_t<sizeof(Real) == 8, uint64_t, uint32_t>;

template <class Real>
MINEXP_INLINE Key<Real> key_of(Real score) {
  Key<Real> bits;
  std::memcpy(&bits, &score, sizeof bits);
  return (bits & (~Key<Real>(0) >> 1)) + 1;
}

// The edges into one target of one image: score[i] = strength[i] * energy[i], times the target's gradient.
template <class Real>
struct Row {
  const Real *strength, *energy;
  const bool* mask;  // of the sources; null: all
  Real gradient;
  int64_t width, first_source;
  bool active;  // the target itself

  MINEXP_BOTH Real score(int64_t i) const { return strength[i] * energy[i]; }
  MINEXP_BOTH bool has(int64_t i) const { return active && (!mask || mask[i]); }
};

// ---- Passes over a row: plain loops, cloned for each x86-64 level ------------------------------------------------

template <class Real>
MINEXP_INLINE Key<Real> keys_into(const Real* strength, const Real* energy, Real factor, int64_t n, Key<Real>* keys) {
  Key<Real> top = 0;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; ++i) {
    const Key<Real> key = key_of(strength[i] * energy[i] * factor);
    keys[i] = key;
    top = key > top ? key : top;
  }
  return top;
}

template <class K>
MINEXP_INLINE int64_t count_from(const K* keys, int64_t n, K least) {
  K count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) count += keys[i] >= least;
  return int64_t(count);
}

MINEXP_CLONES static uint32_t fill_keys(const float* s, const float* e, float factor, int64_t n, uint32_t* keys) {
  return keys_into(s, e, factor, n, keys);
}
MINEXP_CLONES static int64_t count(const uint32_t* keys, int64_t n, uint32_t least) { return count_from(keys, n, least); }
static inline uint64_t fill_keys(const double* s, const double* e, double factor, int64_t n, uint64_t* keys) {
  return keys_into(s, e, factor, n, keys);
}
static inline int64_t count(const uint64_t* keys, int64_t n, uint64_t least) { return count_from(keys, n, least); }

// Keys of one row, masked entries 0; the largest is returned.
template <class Real>
Key<Real> row_keys(const Row<Real>& row, Real factor, Key<Real>* keys) {
  if (!row.active) return std::fill(keys, keys + row.width, 0), 0;
  Key<Real> top = fill_keys(row.strength, row.energy, factor, row.width, keys);
  if (row.mask) {
    top = 0;
    for (int64_t i = 0; i < row.width; ++i) top = std::max(top, keys[i] *= row.mask[i]);
  }
  return top;
}

// A key such that at least k lie at or above it, and at most k + slack unless they are ties of the k-th; 1 if
// fewer than k are left. `counter(key)` counts those at or above. A gallop down from the top, then bisection.
template <class K, class Counter>
MINEXP_BOTH K lower_bound_of_top(K top, int64_t k, int64_t slack, Counter counter) {
  K high = top + 1, step = K(1) << (sizeof(K) == 8 ? 51 : 22), low = 1;  // a first step of half a binade
  const auto good = [&](int64_t found) { return found >= k && found <= k + slack; };
  while (high > low + 1) {
    const K at = high > step + 1 ? high - step : 1;
    const int64_t found = counter(at);
    if (good(found) || at == 1) {
      if (found < k || good(found)) return at;
      low = at;
      break;
    }
    if (found >= k) {
      low = at;
      break;
    }
    high = at, step *= 2;
  }
  while (high - low > 1) {
    const K middle = low + (high - low) / 2;
    const int64_t found = counter(middle);
    if (good(found)) return middle;
    (found >= k ? low : high) = middle;
  }
  return low;
}

// Places (ascending) of the keys at or above `least`, and how many; `places` needs room for n + 1.
template <class K>
int64_t compact(const K* keys, int64_t n, K least, int32_t* places) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {  // no branch: what is not wanted is overwritten by the next
    places[found] = int32_t(i);
    found += keys[i] >= least;
  }
  return found;
}

#if defined(MINEXP_AVX512)
MINEXP_AVX512 inline int64_t compact_by_vectors(const uint32_t* keys, int64_t n, uint32_t least, int32_t* places) {
  const __m512i bound = _mm512_set1_epi32(int(least));
  __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t found = 0;
  for (int64_t i = 0; i < n; i += 16, place = _mm512_add_epi32(place, _mm512_set1_epi32(16))) {
    const __mmask16 inside = n - i < 16 ? __mmask16((1 << (n - i)) - 1) : __mmask16(-1);
    const __mmask16 wanted = _mm512_mask_cmpge_epu32_mask(inside, _mm512_maskz_loadu_epi32(inside, keys + i), bound);
    const int kept = __builtin_popcount(wanted);
    // compressed in a register first: compressing into memory takes Zen 4 over a hundred cycles
    _mm512_mask_storeu_epi32(places + found, __mmask16((1u << kept) - 1), _mm512_maskz_compress_epi32(wanted, place));
    found += kept;
  }
  return found;
}

inline int64_t compact(const uint32_t* keys, int64_t n, uint32_t least, int32_t* places) {
  return has_avx512() ? compact_by_vectors(keys, n, least, places) : compact<uint32_t>(keys, n, least, places);
}
#endif

constexpr int kLanes = 16;

// ranks[i] = how many come before i when the largest comes first and equal ones stay in order; both arrays have room
// for a multiple of 16. Of equal keys, those of blocks before count and those of blocks after do not.
template <class K>
MINEXP_INLINE void ranks_of(const K* keys, int32_t n, int32_t* ranks) {
  for (int32_t i = 0; i < n; i += kLanes) {
    const int32_t end = std::min(i + kLanes, n);
    int32_t before[kLanes] = {};
    for (int32_t j = 0; j < i; ++j)
#pragma omp simd
      for (int lane = 0; lane < kLanes; ++lane) before[lane] += keys[j] >= keys[i + lane];
    for (int32_t j = i; j < end; ++j)
#pragma omp simd
      for (int lane = 0; lane < kLanes; ++lane)
        before[lane] += (keys[j] > keys[i + lane]) | ((keys[j] == keys[i + lane]) & (j < i + lane));
    for (int32_t j = end; j < n; ++j)
#pragma omp simd
      for (int lane = 0; lane < kLanes; ++lane) before[lane] += keys[j] > keys[i + lane];
    std::copy_n(before, kLanes, ranks + i);
  }
}

MINEXP_CLONES static void rank_plainly(const uint32_t* keys, int32_t n, int32_t* ranks) { ranks_of(keys, n, ranks); }

#if defined(MINEXP_AVX512)
// As ranks_of: a compare and a masked increment a key, which compilers do not find.
MINEXP_AVX512 inline void rank_by_vectors(const uint32_t* keys, int32_t n, int32_t* ranks) {
  const __m512i one = _mm512_set1_epi32(1);
  for (int32_t i = 0; i < n; i += kLanes) {
    const __m512i own = _mm512_loadu_si512(keys + i);
    const int32_t end = std::min(i + kLanes, n);
    __m512i before = _mm512_setzero_si512();
    const auto add = [&](__mmask16 ahead) MINEXP_AVX512 { before = _mm512_mask_add_epi32(before, ahead, before, one); };
    int32_t j = 0;
    for (; j < i; ++j) add(_mm512_cmple_epu32_mask(own, _mm512_set1_epi32(int(keys[j]))));
    for (; j < end; ++j) {
      const __m512i other = _mm512_set1_epi32(int(keys[j]));
      const auto later = __mmask16(0xfffeu << (j - i));
      add(_mm512_cmplt_epu32_mask(own, other) | (_mm512_cmpeq_epu32_mask(own, other) & later));
    }
    for (; j < n; ++j) add(_mm512_cmplt_epu32_mask(own, _mm512_set1_epi32(int(keys[j]))));
    _mm512_storeu_si512(ranks + i, before);
  }
}

static inline void rank(const uint32_t* keys, int32_t n, int32_t* ranks) {
  has_avx512() ? rank_by_vectors(keys, n, ranks) : rank_plainly(keys, n, ranks);
}
#else
static inline void rank(const uint32_t* keys, int32_t n, int32_t* ranks) { rank_plainly(keys, n, ranks); }
#endif
static inline void rank(const uint64_t* keys, int32_t n, int32_t* ranks) { ranks_of(keys, n, ranks); }

// Working memory of one thread.
template <class Real>
struct Scratch {
  std::vector<Key<Real>> keys, found;
  std::vector<int32_t> places, ranks;
  explicit Scratch(int64_t width) : keys(width), found(width + kLanes), places(width + 1), ranks(width + kLanes) {}
};

constexpr int64_t kRanked = 160;  // up to here counting beats sorting

// The k largest of scratch.keys, largest first, equal ones by place: their places go to `out`; how many there are.
template <class Real>
int64_t largest(Scratch<Real>& scratch, Key<Real> top, int64_t width, int64_t k, int32_t* out) {
  using K = Key<Real>;
  const K* keys = scratch.keys.data();
  const int64_t slack = k / 2 + 8;
  if (top == 0) return 0;
  const K least = lower_bound_of_top(top, k, slack, [&](K at) { return count(keys, width, at); });
  int32_t* places = scratch.places.data();
  const int64_t m = compact(keys, width, least, places);
  if (m > kRanked) {  // many wanted, or many ties
    std::stable_sort(places, places + m, [&](int32_t i, int32_t j) { return keys[i] > keys[j]; });
    std::copy_n(places, std::min(m, k), out);
    return std::min(m, k);
  }
  for (int64_t i = 0; i < m; ++i) scratch.found[i] = keys[places[i]];
  rank(scratch.found.data(), int32_t(m), scratch.ranks.data());
  for (int64_t i = 0; i < m; ++i)
    if (scratch.ranks[i] < k) out[scratch.ranks[i]] = places[i];
  return std::min(m, k);
}

// ---- Position-aware scores ---------------------------------------------------------------------------------------

// For 16 targets: scores[lane] = sum over positions p of |sum over taps t of weight[t * pitch + lane] * patch[t, p]|.
// positions must be a multiple of 8 (zeros add nothing).
template <class Real>
MINEXP_INLINE void position_scores_of(
    const Real* weight, int64_t taps, int64_t pitch, const Real* patch, int64_t positions, Real* scores) {
  constexpr int kPositions = 8;  // accumulators that stay in registers
  Real sum[kLanes] = {};
  for (int64_t p = 0; p < positions; p += kPositions) {
    Real at[kPositions][kLanes] = {};
    for (int64_t t = 0; t < taps; ++t)
      for (int q = 0; q < kPositions; ++q)
#pragma omp simd
        for (int lane = 0; lane < kLanes; ++lane) at[q][lane] += weight[t * pitch + lane] * patch[t * positions + p + q];
    for (int q = 0; q < kPositions; ++q)
#pragma omp simd
      for (int lane = 0; lane < kLanes; ++lane) sum[lane] += std::fabs(at[q][lane]);
  }
  std::copy_n(sum, kLanes, scores);
}

MINEXP_CLONES static void position_scores(
    const float* w, int64_t taps, int64_t pitch, const float* x, int64_t positions, float* scores) {
  position_scores_of(w, taps, pitch, x, positions, scores);
}
static inline void position_scores(
    const double* w, int64_t taps, int64_t pitch, const double* x, int64_t positions, double* scores) {
  position_scores_of(w, taps, pitch, x, positions, scores);
}

// How a window slides over an image of one channel.
struct Geometry {
  int64_t kernel[2], size[2], stride[2], padding[2], dilation[2];
  MINEXP_BOTH int64_t out(int d) const { return (size[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) / stride[d] + 1; }
  MINEXP_BOTH int64_t taps() const { return kernel[0] * kernel[1]; }
  MINEXP_BOTH int64_t positions() const { return out(0) * out(1); }
};

// patch[tap * pitch + position], zero where the window leaves the image.
template <class Real>
void unfold(const Geometry& g, const Real* image, Real* patch, int64_t pitch) {
  for (int64_t ky = 0; ky < g.kernel[0]; ++ky)
    for (int64_t kx = 0; kx < g.kernel[1]; ++kx, patch += pitch) {
      Real* to = patch;
      for (int64_t oy = 0; oy < g.out(0); ++oy) {
        const int64_t y = oy * g.stride[0] + ky * g.dilation[0] - g.padding[0];
        for (int64_t ox = 0; ox < g.out(1); ++ox) {
          const int64_t x = ox * g.stride[1] + kx * g.dilation[1] - g.padding[1];
          *to++ = y >= 0 && y < g.size[0] && x >= 0 && x < g.size[1] ? image[y * g.size[1] + x] : Real(0);
        }
      }
    }
}

}  // namespace minexp
