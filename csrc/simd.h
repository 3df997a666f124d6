// What lets plain loops run at the width of the machine they meet.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// One binary for every x86-64 level, chosen when the library loads; elsewhere the plain loop.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_UNDEFINED__) && !defined(__CUDACC__) && !defined(MINEXP_NO_CLONES)
#define MINEXP_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MINEXP_CLONES
#endif

// Hand-written vectors beside the plain loops, for machines that have them.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__CUDACC__)
#include <immintrin.h>
#define MINEXP_AVX512 __attribute__((target("avx512f")))
#endif

#if defined(__CUDACC__)
#define MINEXP_BOTH __host__ __device__
#define MINEXP_RARE __noinline__  // a call costs less than the registers it would take
#else
#define MINEXP_BOTH
#define MINEXP_RARE
#endif

#if defined(__CUDACC__)
#define MINEXP_INLINE __host__ __device__ inline
#elif defined(__GNUC__)
#define MINEXP_INLINE inline __attribute__((always_inline))
#else
#define MINEXP_INLINE inline
#endif

namespace minexp {

constexpr double kLn2 = 0.693147180559945309;

// 2^x to 2e-7, between 2^-126 and 2^127. Branchless, so that loops over it vectorise.
MINEXP_INLINE float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  x = x < -126.f ? -126.f : x;  // written so that NaN passes
  x = x > 127.f ? 127.f : x;
  const float shifted = x + 12582912.f;  // rounds to the nearest integer, kept in the low bits
  const float r = x - (shifted - 12582912.f);
  // Least maximal relative error on |r| <= 1/2 among those that are 1 at 0: 9e-8.
  const float p =
      1.f + r * (.693147004f + r * (.240222424f + r * (.0555073395f + r * (.00967151113f + r * .00132646528f))));
  uint32_t bits, power;
  std::memcpy(&bits, &p, 4);
  std::memcpy(&power, &shifted, 4);
  bits += power << 23;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
#endif
}

MINEXP_BOTH inline double fast_exp2(double x) { return std::exp2(x); }

// After stores that passed the caches by: whoever is told next sees them.
inline void drain() {
#if defined(MINEXP_AVX512)
  _mm_sfence();
#endif
}

#if defined(MINEXP_AVX512)
inline bool has_avx512() {
  static const bool has = __builtin_cpu_supports("avx512f");
  return has;
}

// factor * 2^x in as many instructions as 2^x: the polynomial's coefficients, each times the factor.
struct Powers {
  __m512 coefficients[6];

  MINEXP_AVX512 explicit Powers(float factor = 1) {
    const float minimax[6] = {.00132646528f, .00967151113f, .0555073395f, .240222424f, .693147004f, 1.f};
    for (int k = 0; k < 6; ++k) coefficients[k] = _mm512_set1_ps(minimax[k] * factor);
  }

  MINEXP_AVX512 __m512 of(__m512 x) const {
    const __m512 n = _mm512_roundscale_ps(x, 8), r = _mm512_sub_ps(x, n);
    __m512 p = coefficients[0];
    for (int k = 1; k < 6; ++k) p = _mm512_fmadd_ps(p, r, coefficients[k]);
    return _mm512_scalef_ps(p, n);
  }
};
#endif

}  // namespace minexp
