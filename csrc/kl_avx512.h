// The runs of kl.h in AVX-512, in two thirds of the instructions that a compiler makes of the plain loops.
#pragma once

#if defined(MINEXP_AVX512)

namespace minexp {

// The first elements of what is left, as a mask of 16.
inline __mmask16 first_of(int64_t left) { return left < 16 ? __mmask16((1 << left) - 1) : __mmask16(-1); }

MINEXP_AVX512 inline Pair wide_sums(const Pair& at, const float* a, const float* b, int64_t count, float scale) {
  const __m512 s = _mm512_set1_ps(scale), ref_a = _mm512_set1_ps(float(at.top_a)), ref_b = _mm512_set1_ps(float(at.top_b));
  Pair found = Pair::resumed(at.top_a, at.top_b);
  for (int64_t begin = 0; begin < count; begin += kTile) {
    const int64_t end = std::min(begin + kTile, count);
    __m512 sum_a = _mm512_setzero_ps(), sum_b = sum_a, growth = sum_a, slope = sum_a;
    for (int64_t i = begin; i < end; i += 16) {
      const __mmask16 m = first_of(end - i);
      const __m512 x = _mm512_maskz_loadu_ps(m, a + i), y = _mm512_maskz_loadu_ps(m, b + i);
      const __m512 ea = fast_exp2(_mm512_fmsub_ps(x, s, ref_a)), eb = fast_exp2(_mm512_fmsub_ps(y, s, ref_b));
      sum_a = _mm512_mask_add_ps(sum_a, m, sum_a, ea), sum_b = _mm512_mask_add_ps(sum_b, m, sum_b, eb);
      growth = _mm512_mask_add_ps(growth, m, growth, _mm512_sub_ps(eb, ea));
      slope = _mm512_mask3_fmadd_ps(ea, _mm512_sub_ps(y, x), slope, m);
    }
    found.sum_a += _mm512_reduce_add_ps(sum_a), found.sum_b += _mm512_reduce_add_ps(sum_b);
    found.growth += _mm512_reduce_add_ps(growth), found.slope += double(_mm512_reduce_add_ps(slope)) * double(scale);
  }
  return found;
}

MINEXP_AVX512 inline Cached wide_sums(const Cached& at, const float*, const float* b, int64_t count, float scale) {
  const __m512 s = _mm512_set1_ps(scale), ref = _mm512_set1_ps(float(at.top));
  Cached found = Cached::about(at.top, at.top);
  for (int64_t begin = 0; begin < count; begin += kTile) {
    const int64_t end = std::min(begin + kTile, count);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = begin; i < end; i += 16) {
      const __mmask16 m = first_of(end - i);
      sum = _mm512_mask_add_ps(sum, m, sum, fast_exp2(_mm512_fmsub_ps(_mm512_maskz_loadu_ps(m, b + i), s, ref)));
    }
    found.sum += _mm512_reduce_add_ps(sum);
  }
  return found;
}

MINEXP_AVX512 inline void wide_store(float* to, __mmask16 m, __m512 x, bool stream) {
  if (stream)
    _mm512_stream_ps(to, x);
  else
    _mm512_mask_storeu_ps(to, m, x);
}

inline bool may_stream(const float* to) { return reinterpret_cast<uintptr_t>(to) % 64 == 0; }

MINEXP_AVX512 inline Cross wide_gradient(
    const Pair& at, const float* a, const float* b, float* g, int64_t count, float scale, float ca, float cb, bool stream) {
  const __m512 s = _mm512_set1_ps(scale), ref_a = _mm512_set1_ps(float(at.top_a)), ref_b = _mm512_set1_ps(float(at.top_b));
  const __m512 fa = _mm512_set1_ps(ca), fb = _mm512_set1_ps(cb);
  stream = stream && may_stream(g);
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 m = first_of(count - i);
    const __m512 ea = fast_exp2(_mm512_fmsub_ps(_mm512_maskz_loadu_ps(m, a + i), s, ref_a));
    const __m512 eb = fast_exp2(_mm512_fmsub_ps(_mm512_maskz_loadu_ps(m, b + i), s, ref_b));
    wide_store(g + i, m, _mm512_fmsub_ps(eb, fb, _mm512_mul_ps(ea, fa)), stream && count - i >= 16);
  }
  return {0, 0};
}

// cross_of() and, with a g, gradient_of().
template <bool WithGradient>
MINEXP_AVX512 inline Cross wide_cached(
    const Cached& at, const float* p, const float* b, float* g, int64_t count, float scale, float c, float cb, bool stream) {
  const __m512 s = _mm512_set1_ps(scale), ref = _mm512_set1_ps(float(at.top));
  const __m512 fp = _mm512_set1_ps(c), fb = _mm512_set1_ps(cb);
  stream = stream && may_stream(g);
  Cross found{0, 0};
  for (int64_t begin = 0; begin < count; begin += kTile) {
    const int64_t end = std::min(begin + kTile, count);
    __m512 cross = _mm512_setzero_ps(), mass = cross;
    for (int64_t i = begin; i < end; i += 16) {
      const __mmask16 m = first_of(end - i);
      const __m512 q = _mm512_maskz_loadu_ps(m, p + i);  // zeros add nothing
      const __m512 v = _mm512_fmsub_ps(_mm512_maskz_loadu_ps(m, b + i), s, ref);
      if (WithGradient)
        wide_store(g + i, m, _mm512_fmsub_ps(fast_exp2(v), fb, _mm512_mul_ps(q, fp)), stream && end - i >= 16);
      cross = _mm512_fmadd_ps(q, v, cross), mass = _mm512_add_ps(mass, q);
    }
    const double whole = _mm512_reduce_add_ps(mass);
    found.add({double(_mm512_reduce_add_ps(cross)) + whole * at.top, whole});
  }
  return found;
}

MINEXP_AVX512 inline Cross wide_gradient(
    const Cached& at, const float* p, const float* b, float* g, int64_t count, float scale, float c, float cb, bool stream) {
  return wide_cached<true>(at, p, b, g, count, scale, c, cb, stream);
}

MINEXP_AVX512 inline Cross wide_cross(const Cached& at, const float* p, const float* b, int64_t count, float scale) {
  return wide_cached<false>(at, p, b, nullptr, count, scale, 0, 0, false);
}

}  // namespace minexp

#endif
