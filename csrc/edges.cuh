// Edge scoring as CUDA kernels, without torch and launch syntax. A warp takes a row (image, target): it holds the keys
// in shared memory, bisects with counts over its lanes and compacts by ballot.
#pragma once

#include "edges.h"
#include "warp.cuh"

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

__device__ inline int rank_in_ballot(unsigned ballot) { return __popc(ballot & ((1u << (threadIdx.x % 32)) - 1)); }

// The warp's k largest of keys[width]: emit(rank, place) for each, by any lane. places has room for width.
template <class K, class Emit>
__device__ int64_t warp_largest(const K* keys, int64_t width, int64_t k, int32_t* places, Emit emit) {
  const int lane = threadIdx.x % 32;
  K top = 0;
  for (int64_t i = lane; i < width; i += 32) top = keys[i] > top ? keys[i] : top;
  top = warp_max(top);
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
  top = K(over_block(warp_max(top), [](unsigned long long x, unsigned long long y) { return x > y ? x : y; }));
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

// ---- Position-aware scores ---------------------------------------------------------------------------------------

constexpr int kPositionWarps = 8;
constexpr int kSlots = 2;   // positions of a lane at once
constexpr int kTaps = 16;   // taps whose weights a warp holds in shared memory

// Shared memory of a block: keys of its targets, then places and weights of each warp.
template <class Real, int Together>
constexpr int64_t position_bytes(int64_t width) {
  return (Together * int64_t(sizeof(Key<Real>)) + kPositionWarps * int64_t(sizeof(int32_t))) * ((width + 3) / 4 * 4) +
         kPositionWarps * kTaps * Together * int64_t(sizeof(Real));
}

// Sums over the warp, one for each of its lanes' values: v[0] is the sum of everyone's v[target] for the target returned.
template <int Together, class Real>
__device__ int warp_scatter(Real (&v)[Together]) {
  const int lane = threadIdx.x % 32;
  int target = 0;
#pragma unroll
  for (int distance = 16, left = Together / 2; distance > 0; distance /= 2, left /= 2) {
    const bool upper = lane & distance;
    if (left == 0) v[0] += __shfl_xor_sync(~0u, v[0], distance);
#pragma unroll
    for (int j = 0; j < left; ++j) {
      const Real given = upper ? v[j] : v[j + left], kept = upper ? v[j + left] : v[j];
      v[j] = kept + __shfl_xor_sync(~0u, given, distance);
    }
    if (upper) target += left;
  }
  return target;
}

// A block takes Together targets of one group of one image, a warp one source at a time; weight [O, I/groups, taps].
template <class Real, int Together>
__global__ void __launch_bounds__(kPositionWarps * 32, sizeof(Real) == 4 ? 2 : 1) edge_position_kernel(
    const DeviceRows<Real> rows, const Geometry g, int64_t k, Real* values, int64_t* indices) {
  using K = Key<Real>;
  extern __shared__ double shared_memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = int(rows.width), pitch = (width + 3) / 4 * 4;
  auto* keys = reinterpret_cast<K*>(shared_memory);  // [Together, pitch]
  auto* weights = reinterpret_cast<Real*>(keys + Together * pitch) + warp * kTaps * Together;  // [kTaps, Together]
  auto* places = reinterpret_cast<int32_t*>(reinterpret_cast<Real*>(keys + Together * pitch) + kPositionWarps * kTaps * Together) + warp * pitch;
  const int taps = int(g.taps()), positions = int(g.positions()), columns = int(g.out(1));
  const int height = int(g.size[0]), breadth = int(g.size[1]), across = int(g.kernel[1]);
  const int64_t group_targets = rows.targets / rows.groups, tiles = (group_targets + Together - 1) / Together;
  const int64_t image = blockIdx.x / (tiles * rows.groups), group = blockIdx.x / tiles % rows.groups;
  const int64_t local = blockIdx.x % tiles * Together, first = group * group_targets + local;
  const int here = int(group_targets - local < Together ? group_targets - local : Together);

  for (int i = warp; i < width; i += kPositionWarps) {
    const Real* channel = rows.energy + (image * rows.sources + group * width + i) * height * breadth;
    Real sums[Together] = {};
    for (int base = 0; base < positions; base += 32 * kSlots) {
      int top[kSlots], left[kSlots];  // of the window; a position beyond the last lies outside the image
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const int p = base + slot * 32 + lane;
        top[slot] = p < positions ? p / columns * int(g.stride[0]) - int(g.padding[0]) : height;
        left[slot] = p % columns * int(g.stride[1]) - int(g.padding[1]);
      }
      Real at[kSlots][Together] = {};
      for (int chunk = 0; chunk < taps; chunk += kTaps) {
        const int some = taps - chunk < kTaps ? taps - chunk : kTaps;
        __syncwarp();
        for (int j = lane; j < Together * some; j += 32) {
          const int o = j / some, t = j % some;
          weights[t * Together + o] = o < here ? rows.strength[((first + o) * width + i) * taps + chunk + t] : Real(0);
        }
        __syncwarp();
#pragma unroll 1
        for (int t = 0; t < some; ++t) {
          const int down = (chunk + t) / across * int(g.dilation[0]), right = (chunk + t) % across * int(g.dilation[1]);
          Real w[Together];
#pragma unroll
          for (int o = 0; o < Together; ++o) w[o] = weights[t * Together + o];
#pragma unroll
          for (int slot = 0; slot < kSlots; ++slot) {
            const int y = top[slot] + down, x = left[slot] + right;
            const Real pixel = y >= 0 && y < height && x >= 0 && x < breadth ? channel[y * breadth + x] : Real(0);
#pragma unroll
            for (int o = 0; o < Together; ++o) at[slot][o] += w[o] * pixel;
          }
        }
      }
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot)
#pragma unroll
        for (int o = 0; o < Together; ++o) sums[o] += at[slot][o] < 0 ? -at[slot][o] : at[slot][o];
    }
    const int o = warp_scatter(sums);
    if (o < here) keys[o * pitch + i] = rows[image * rows.targets + first + o].has(i) ? key_of(sums[0]) : K(0);
  }
  __syncthreads();
  for (int o = warp; o < here; o += kPositionWarps) {
    const int64_t at = image * rows.targets + first + o;
    const Row<Real> row = rows[at];
    const K* mine = keys + o * pitch;
    const int64_t found = warp_largest(mine, width, k, places, [&](int64_t rank, int32_t i) {
      const K bits = mine[i] - 1;  // a sum of magnitudes is its key's bits
      Real score;
      std::memcpy(&score, &bits, sizeof score);
      values[at * k + rank] = score * row.gradient;
      indices[at * k + rank] = i + row.first_source;
    });
    for (int64_t i = found + lane; i < k; i += 32) values[at * k + i] = 0, indices[at * k + i] = -1;
  }
}

}  // namespace minexp
