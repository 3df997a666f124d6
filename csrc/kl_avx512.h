// The runs of kl.h in AVX-512, in two thirds of the instructions that a compiler makes of the plain loops.
#pragma once

#if defined(MINEXP_AVX512)

namespace minexp {

#define MINEXP_WIDE_STEP __attribute__((target("avx512f"), always_inline))  // for lambdas, which inherit neither

// f(i, mask) for every 16 elements of [begin, end), the last perhaps in part. A mask of all is known when compiling and
// vanishes: as a variable it costs a third of the time.
template <class F>
MINEXP_AVX512 inline void by_16(int64_t begin, int64_t end, F f) {
  int64_t i = begin;
  for (; i + 32 <= end; i += 32) f(i, __mmask16(-1)), f(i + 16, __mmask16(-1));
  for (; i + 16 <= end; i += 16) f(i, __mmask16(-1));
  if (i < end) f(i, __mmask16((1 << (end - i)) - 1));
}

MINEXP_AVX512 inline Pair wide_sums(const Pair& at, const float* a, const float* b, int64_t count, float scale) {
  const __m512 s = _mm512_set1_ps(scale), ref_a = _mm512_set1_ps(float(at.top_a)), ref_b = _mm512_set1_ps(float(at.top_b));
  const Powers exp2;
  Pair found = Pair::resumed(at.top_a, at.top_b);
  for (int64_t begin = 0; begin < count; begin += kTile) {
    __m512 sum_a = _mm512_setzero_ps(), sum_b = sum_a, growth = sum_a, slope = sum_a;
    by_16(begin, std::min(begin + kTile, count), [&](int64_t i, __mmask16 m) MINEXP_WIDE_STEP {
      const __m512 x = _mm512_maskz_loadu_ps(m, a + i), y = _mm512_maskz_loadu_ps(m, b + i);
      const __m512 ea = exp2.of(_mm512_fmsub_ps(x, s, ref_a)), eb = exp2.of(_mm512_fmsub_ps(y, s, ref_b));
      sum_a = _mm512_mask_add_ps(sum_a, m, sum_a, ea), sum_b = _mm512_mask_add_ps(sum_b, m, sum_b, eb);
      growth = _mm512_mask_add_ps(growth, m, growth, _mm512_sub_ps(eb, ea));
      slope = _mm512_mask3_fmadd_ps(ea, _mm512_sub_ps(y, x), slope, m);
    });
    found.sum_a += _mm512_reduce_add_ps(sum_a), found.sum_b += _mm512_reduce_add_ps(sum_b);
    found.growth += _mm512_reduce_add_ps(growth), found.slope += double(_mm512_reduce_add_ps(slope)) * double(scale);
  }
  return found;
}

MINEXP_AVX512 inline Cached wide_sums(const Cached& at, const float*, const float* b, int64_t count, float scale) {
  const __m512 s = _mm512_set1_ps(scale), ref = _mm512_set1_ps(float(at.top));
  const Powers exp2;
  Cached found = Cached::about(at.top, at.top);
  for (int64_t begin = 0; begin < count; begin += kTile) {
    __m512 sum = _mm512_setzero_ps();
    by_16(begin, std::min(begin + kTile, count), [&](int64_t i, __mmask16 m) MINEXP_WIDE_STEP {
      sum = _mm512_mask_add_ps(sum, m, sum, exp2.of(_mm512_fmsub_ps(_mm512_maskz_loadu_ps(m, b + i), s, ref)));
    });
    found.sum += _mm512_reduce_add_ps(sum);
  }
  return found;
}

MINEXP_AVX512 inline void wide_store(float* to, __mmask16 m, __m512 x, bool stream) {
  if (stream && m == __mmask16(-1))
    _mm512_stream_ps(to, x);
  else
    _mm512_mask_storeu_ps(to, m, x);
}

inline bool may_stream(const float* to) { return reinterpret_cast<uintptr_t>(to) % 64 == 0; }

MINEXP_AVX512 inline Cross wide_gradient(
    const Pair& at, const float* a, const float* b, float* g, int64_t count, float scale, float ca, float cb, bool stream) {
  const __m512 s = _mm512_set1_ps(scale), ref_a = _mm512_set1_ps(float(at.top_a)), ref_b = _mm512_set1_ps(float(at.top_b));
  const Powers scaled_a(ca), scaled_b(cb);
  stream = stream && may_stream(g);
  by_16(0, count, [&](int64_t i, __mmask16 m) MINEXP_WIDE_STEP {
    const __m512 x = _mm512_maskz_loadu_ps(m, a + i), y = _mm512_maskz_loadu_ps(m, b + i);
    const __m512 ga = scaled_a.of(_mm512_fmsub_ps(x, s, ref_a)), gb = scaled_b.of(_mm512_fmsub_ps(y, s, ref_b));
    wide_store(g + i, m, _mm512_sub_ps(gb, ga), stream);
  });
  return {0, 0};
}

// cross_of() and, with a g, gradient_of().
template <bool WithGradient>
MINEXP_AVX512 inline Cross wide_cached(
    const Cached& at, const float* p, const float* b, float* g, int64_t count, float scale, float c, float cb, bool stream) {
  const __m512 s = _mm512_set1_ps(scale), ref = _mm512_set1_ps(float(at.top));
  const __m512 fp = _mm512_set1_ps(c);
  const Powers scaled(cb);
  stream = stream && may_stream(g);
  Cross found{0, 0};
  for (int64_t begin = 0; begin < count; begin += kTile) {
    __m512 cross = _mm512_setzero_ps(), mass = cross;
    by_16(begin, std::min(begin + kTile, count), [&](int64_t i, __mmask16 m) MINEXP_WIDE_STEP {
      const __m512 q = _mm512_maskz_loadu_ps(m, p + i);  // zeros add nothing
      const __m512 v = _mm512_fmsub_ps(_mm512_maskz_loadu_ps(m, b + i), s, ref);
      if (WithGradient)
        wide_store(g + i, m, _mm512_fnmadd_ps(q, fp, scaled.of(v)), stream);
      cross = _mm512_fmadd_ps(q, v, cross), mass = _mm512_add_ps(mass, q);
    });
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
