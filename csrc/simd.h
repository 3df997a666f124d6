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

// e^x for x <= 86, to 2e-7; below -86 it stays at e^-86. Branchless, so that loops over it vectorise.
MINEXP_INLINE float fast_exp(float x) {
  x = x < -86.f ? -86.f : x;  // written so that NaN passes
  const float shifted = x * 1.44269504f + 12582912.f;  // rounds to the nearest integer n, kept in the low bits
  const float n = shifted - 12582912.f;
  const float r = x - n * 0.693145752f - n * 1.42860677e-6f;
  // Least maximal relative error on |r| <= ln(2)/2: 2e-9.
  const float p =
      1.f + r * (1.f + r * (0.49999994f + r * (0.1666643f + r * (0.041668005f + r * (0.008374196f + r * 0.0013843607f)))));
  uint32_t bits, power;
  std::memcpy(&bits, &p, 4);
  std::memcpy(&power, &shifted, 4);
  bits += power << 23;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

MINEXP_INLINE double fast_exp(double x) { return std::exp(x); }

inline void prefetch(const void* from) {
#if defined(__GNUC__)
  __builtin_prefetch(from);
#endif
}

}  // namespace minexp
