// Edge scoring as CUDA kernels, without torch and launch syntax. A warp takes a row (image, target): it holds the keys
// in shared memory, bisects with counts over its lanes and compacts by ballot.
#pragma once

#include "edges.h"

namespace minexp {

// The rows of a call, as edges.cpp has them.
template <class Real>
struct DeviceRows {
  const Real *strength, *energy, *gradient;
  const bool *source_mask, *target_mask;
  int64_t images, targets, width, sources, groups;

  __device__ int64_t count() const { return images * targets; }
  __device__ Row<Real> operator[](int64_t at) const {
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

template <class T>
__device__ T warp_sum(T x) {
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

template <class T>
__device__ T warp_top(T x) {
  for (int distance = 16; distance > 0; distance /= 2) {
    const T other = __shfl_xor_sync(~0u, x, distance);
    x = other > x ? other : x;
  }
  return x;
}

__device__ inline int rank_in_ballot(unsigned ballot) { return __popc(ballot & ((1u << (threadIdx.x % 32)) - 1)); }

// The warp's k largest of keys[width]: emit(rank, place) for each, by any lane. places has room for width.
template <class K, class Emit>
__device__ int64_t warp_largest(const K* keys, int64_t width, int64_t k, int32_t* places, Emit emit) {
  const int lane = threadIdx.x % 32;
  K top = 0;
  for (int64_t i = lane; i < width; i += 32) top = keys[i] > top ? keys[i] : top;
  top = warp_top(top);
  if (top == 0) return 0;
  const K least = lower_bound_of_top(top, k, k / 2 + 16, [&](K at) {
    int found = 0;
    for (int64_t i = lane; i < width; i += 32) found += keys[i] >= at;
    return int64_t(warp_sum(found));
  });
  int found = 0;
  for (int64_t base = 0; base < width; base += 32) {
    const bool wanted = base + lane < width && keys[base + lane] >= least;
    const unsigned ballot = __ballot_sync(~0u, wanted);
    if (wanted) places[found + rank_in_ballot(ballot)] = int32_t(base + lane);
    found += __popc(ballot);
  }
  __syncwarp();
  for (int i = lane; i < found; i += 32) {
    const K key = keys[places[i]];
    int64_t rank = 0;
    for (int j = 0; j < found; ++j) {
      const K other = keys[places[j]];
      rank += other > key || (other == key && j < i);
    }
    if (rank < k) emit(rank, places[i]);
  }
  __syncwarp();
  return found < k ? found : k;
}

template <class Real>
__device__ Key<Real> key_at(const Row<Real>& row, Real factor, int64_t i) {
  return row.has(i) ? key_of(row.score(i) * factor) : Key<Real>(0);
}

// Shared memory of a warp: keys, then places.
template <class Real>
constexpr int64_t topk_bytes(int64_t width) {
  return (width * int64_t(sizeof(Key<Real>) + sizeof(int32_t)) + 15) / 16 * 16;
}

template <class Real>
__global__ void edge_topk_kernel(const DeviceRows<Real> rows, int64_t k, Real* values, int64_t* indices) {
  extern __shared__ double shared_memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  char* memory = reinterpret_cast<char*>(shared_memory) + warp * topk_bytes<Real>(rows.width);
  auto* keys = reinterpret_cast<Key<Real>*>(memory);
  auto* places = reinterpret_cast<int32_t*>(keys + rows.width);
  const int64_t at = int64_t(blockIdx.x) * (blockDim.x / 32) + warp;
  if (at >= rows.count()) return;  // a whole warp; no barrier of the block follows
  const Row<Real> row = rows[at];
  for (int64_t i = lane; i < row.width; i += 32) keys[i] = key_at(row, Real(1), i);
  __syncwarp();
  Real* value = values + at * k;
  int64_t* index = indices + at * k;
  const int64_t found = warp_largest(keys, row.width, k, places, [&](int64_t rank, int32_t i) {
    value[rank] = row.score(i) * row.gradient;
    index[rank] = i + row.first_source;
  });
  for (int64_t i = found + lane; i < k; i += 32) value[i] = 0, index[i] = -1;
}

// How many scores of each row lie above the threshold; with `source` (and the rows' starts) the scores themselves.
template <class Real>
__global__ void edge_threshold_kernel(
    const DeviceRows<Real> rows, Key<Real> least, int64_t* counts, const int64_t* starts, int64_t* source, Real* values) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t at = int64_t(blockIdx.x) * (blockDim.x / 32) + warp;
  if (at >= rows.count()) return;
  const Row<Real> row = rows[at];
  int64_t found = source ? starts[at] : 0;
  for (int64_t base = 0; base < row.width; base += 32) {
    const int64_t i = base + lane;
    const bool wanted = i < row.width && key_at(row, row.gradient, i) >= least;
    const unsigned ballot = __ballot_sync(~0u, wanted);
    if (source && wanted) {
      source[found + rank_in_ballot(ballot)] = i + row.first_source;
      values[found + rank_in_ballot(ballot)] = row.score(i) * row.gradient;
    }
    found += __popc(ballot);
  }
  if (!source && lane == 0) counts[at] = found;
}

constexpr int kSelectThreads = 512;

// One block an image: the n largest of all its scores, in order of place.
template <class Real>
__global__ void __launch_bounds__(kSelectThreads, 2)
    edge_select_kernel(const DeviceRows<Real> rows, int64_t n, Real* values, int64_t* flat) {
  using K = Key<Real>;
  extern __shared__ double shared_memory[];
  auto* memory = reinterpret_cast<unsigned long long*>(shared_memory);  // one for each warp
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, warps = kSelectThreads / 32;
  const int64_t image = blockIdx.x, all = rows.targets * rows.width;
  const auto key = [&](int64_t place) {
    const Row<Real> row = rows[image * rows.targets + place / rows.width];
    return key_at(row, row.gradient, place % rows.width);
  };
  // Every thread gets combine() over what the warps hold.
  const auto over_block = [&](unsigned long long x, auto combine) {
    if (lane == 0) memory[warp] = x;
    __syncthreads();
    x = memory[0];
    for (int w = 1; w < warps; ++w) x = combine(x, memory[w]);
    __syncthreads();
    return x;
  };
  const auto sum = [](unsigned long long x, unsigned long long y) { return x + y; };
  const auto count = [&](K least) {
    int found = 0;
#pragma unroll 1
    for (int64_t i = thread; i < all; i += kSelectThreads) found += key(i) >= least;
    return int64_t(over_block(warp_sum(found), sum));
  };
  K top = 0;
  for (int64_t i = thread; i < all; i += kSelectThreads) {
    const K at = key(i);
    top = at > top ? at : top;
  }
  top = K(over_block(warp_top(top), [](unsigned long long x, unsigned long long y) { return x > y ? x : y; }));
  const K least = top > 0 ? lower_bound_of_top(top, n, int64_t(0), count) : K(1);
  const int64_t larger = top > 0 ? count(least + 1) : 0;
  int64_t ties = n - larger, found = 0;  // the same in every thread
  for (int64_t base = 0; base < all; base += kSelectThreads) {
    const int64_t i = base + thread;
    const K at = i < all ? key(i) : K(0);
    const unsigned above = __ballot_sync(~0u, at > least), equal = __ballot_sync(~0u, at == least);
    const unsigned long long both = (unsigned long long)(__popc(above)) << 32 | unsigned(__popc(equal));
    if (lane == 0) memory[warp] = both;
    __syncthreads();
    int64_t above_before = 0, equal_before = 0, above_all = 0, equal_all = 0;
    for (int w = 0; w < warps; ++w) {
      const int64_t a = int64_t(memory[w] >> 32), e = int64_t(memory[w] & 0xffffffffu);
      if (w < warp) above_before += a, equal_before += e;
      above_all += a, equal_all += e;
    }
    __syncthreads();
    above_before += rank_in_ballot(above), equal_before += rank_in_ballot(equal);
    if (at > least || (at == least && equal_before < ties)) {
      const int64_t to = image * n + found + above_before + (equal_before < ties ? equal_before : ties);
      const Row<Real> row = rows[image * rows.targets + i / rows.width];
      values[to] = row.score(i % rows.width) * row.gradient;
      flat[to] = i;
    }
    const int64_t used = equal_all < ties ? equal_all : ties;
    found += above_all + used, ties -= used;
  }
  for (int64_t i = found + thread; i < n; i += kSelectThreads) values[image * n + i] = 0, flat[image * n + i] = -1;
}

constexpr int kTogether = 4;  // targets of a block: each activation read serves all of them

// Shared memory of a block: the scores, then the keys and places of its targets.
template <class Real>
constexpr int64_t position_bytes(int64_t width) {
  return kTogether * (width * int64_t(sizeof(Real)) + topk_bytes<Real>(width));
}

// A block takes kTogether targets of one group of one image; weight [O, I/groups, taps].
template <class Real>
__global__ void __launch_bounds__(kTogether * 32, 4) edge_position_kernel(
    const DeviceRows<Real> rows, const Geometry g, int64_t k, Real* values, int64_t* indices) {
  extern __shared__ double shared_memory[];
  auto* scores = reinterpret_cast<Real*>(shared_memory);  // [kTogether, width]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t width = rows.width, taps = g.taps(), positions = g.positions(), pixels = g.size[0] * g.size[1];
  const int64_t group_targets = rows.targets / rows.groups, tiles = (group_targets + kTogether - 1) / kTogether;
  const int64_t image = blockIdx.x / (tiles * rows.groups), group = blockIdx.x / tiles % rows.groups;
  const int64_t local = blockIdx.x % tiles * kTogether, first = group * group_targets + local;
  const int here = int(group_targets - local < kTogether ? group_targets - local : kTogether);
  for (int64_t i = warp; i < width; i += kTogether) {
    const Real* channel = rows.energy + (image * rows.sources + group * width + i) * pixels;
    Real sums[kTogether] = {};
    for (int64_t p = lane; p < positions; p += 32) {
      const int64_t top = p / g.out(1) * g.stride[0] - g.padding[0], left = p % g.out(1) * g.stride[1] - g.padding[1];
      Real at[kTogether] = {};
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t y = top + t / g.kernel[1] * g.dilation[0], x = left + t % g.kernel[1] * g.dilation[1];
        if (y < 0 || y >= g.size[0] || x < 0 || x >= g.size[1]) continue;
        const Real pixel = channel[y * g.size[1] + x];
#pragma unroll
        for (int o = 0; o < kTogether; ++o)
          if (o < here) at[o] += rows.strength[((first + o) * width + i) * taps + t] * pixel;
      }
#pragma unroll
      for (int o = 0; o < kTogether; ++o) sums[o] += at[o] < 0 ? -at[o] : at[o];
    }
#pragma unroll
    for (int o = 0; o < kTogether; ++o) {
      const Real sum = warp_sum(sums[o]);
      if (lane == 0) scores[o * width + i] = sum;
    }
  }
  __syncthreads();
  if (warp >= here) return;
  const int64_t row_at = image * rows.targets + first + warp;
  const Real* mine = scores + warp * width;
  char* memory = reinterpret_cast<char*>(scores + kTogether * width) + warp * topk_bytes<Real>(width);
  auto* keys = reinterpret_cast<Key<Real>*>(memory);
  auto* places = reinterpret_cast<int32_t*>(keys + width);
  const Row<Real> row = rows[row_at];
  for (int64_t i = lane; i < width; i += 32) keys[i] = row.has(i) ? key_of(mine[i]) : Key<Real>(0);
  __syncwarp();
  const int64_t found = warp_largest(keys, width, k, places, [&](int64_t rank, int32_t i) {
    values[row_at * k + rank] = mine[i] * row.gradient;
    indices[row_at * k + rank] = i + row.first_source;
  });
  for (int64_t i = found + lane; i < k; i += 32) values[row_at * k + i] = 0, indices[row_at * k + i] = -1;
}

}  // namespace minexp
