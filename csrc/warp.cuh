// Reductions over the lanes of a warp; every lane gets the result.
#pragma once

namespace minexp {

template <class T>
__device__ T warp_sum(T x) {
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

template <class T>
__device__ T warp_max(T x) {
  for (int distance = 16; distance > 0; distance /= 2) {
    const T other = __shfl_xor_sync(~0u, x, distance);
    x = other > x ? other : x;
  }
  return x;
}

}  // namespace minexp
