// activation_kl as CUDA kernels: no torch and no launch syntax here, so that they also run on a host emulator.
//
// One block a piece, all layers in one launch. A team of threads shares a row: the block a long single row, a warp
// each of several contiguous rows, a thread each of several interleaved ones (neighbours then read neighbours). The
// last block of an image to finish merges the image's pieces, always in the same order.
#pragma once

#include "kl.h"
#include "warp.cuh"

namespace minexp {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kItems = 8;              // elements a thread loads at once, of each side
constexpr int kRun = 64;               // elements a thread adds up in Real before it goes on in double
constexpr int64_t kCudaPiece = 16384;  // elements of a block

// The whole call as one kernel parameter: 56 bytes a layer, up to 512 of them.
template <int Most>
struct Table {
  Layer layers[Most];
  int32_t count, aligned;  // aligned: every layer begins where a 16-byte load may
  uint32_t image_pieces;
  int64_t images, rows;
  double temperature;
};

struct Place {
  int layer;
  int64_t image, piece;
};

template <int Most>
__device__ Place place_of(const Table<Most>& table, int64_t block) {
  int low = 0, high = table.count - 1;  // the last layer that begins at or before the block; empty ones never are
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.layers[middle].first_piece <= block)
      low = middle;
    else
      high = middle - 1;
  }
  const int64_t local = block - table.layers[low].first_piece;
  return {low, local / table.layers[low].pieces, local % table.layers[low].pieces};
}

template <class T, int Width>
struct alignas(sizeof(T) * Width) Packet {
  T items[Width];
};

// What stands where a thread has no element: its exponential is 0 about any reference.
constexpr float kNothing = -1e30f;

// The tiles of a team on elements [begin, end): in packets of Width while they are full, element by element at the end.
// f(tile, load, store): load(from, nothing, out) fetches this member's items, `nothing` beyond the end.
template <int Width, class F>
__device__ void for_tiles(int step, int begin, int end, int member, int team, F f) {
  int tile = begin;
#pragma unroll 1
  for (; tile + team * kItems <= end; tile += team * kItems) {
    const int first = tile + member * Width;
    f([&](const auto* from, auto, auto& out) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(from)>>;
#pragma unroll
        for (int q = 0; q < kItems / Width; ++q) {
          const auto packet = *reinterpret_cast<const Packet<T, Width>*>(from + (first + q * team * Width) * step);
#pragma unroll
          for (int i = 0; i < Width; ++i) out[q * Width + i] = static_cast<std::remove_reference_t<decltype(out[0])>>(packet.items[i]);
        }
      },
      [&](auto* to, const auto& values) {
        using T = std::remove_pointer_t<decltype(to)>;
#pragma unroll
        for (int q = 0; q < kItems / Width; ++q) {
          Packet<T, Width> packet;
#pragma unroll
          for (int i = 0; i < Width; ++i) packet.items[i] = static_cast<T>(values[q * Width + i]);
          *reinterpret_cast<Packet<T, Width>*>(to + (first + q * team * Width) * step) = packet;
        }
      });
  }
  if (tile >= end) return;
  const auto at = [&](int i) { return tile + i * team + member; };
  f([&](const auto* from, auto nothing, auto& out) {
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        out[i] = at(i) < end ? static_cast<std::remove_reference_t<decltype(out[0])>>(from[at(i) * step]) : nothing;
    },
    [&](auto* to, const auto& values) {
#pragma unroll
      for (int i = 0; i < kItems; ++i)
        if (at(i) < end) to[at(i) * step] = static_cast<std::remove_pointer_t<decltype(to)>>(values[i]);
    });
}

// The sums of a run of elements about given references, in Real: what a thread and then its warp add up.
template <class State, class Real>
struct Sums;

template <class Real>
struct Sums<Pair, Real> {
  static constexpr Real nothing = Real(kNothing);
  Real sum_a = 0, sum_b = 0, growth = 0, slope = 0;

  __device__ void add(const Pair& at, const Real (&a)[kItems], const Real (&b)[kItems], Real scale) {
    const Real ref_a = Real(at.top_a), ref_b = Real(at.top_b);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const Real ea = fast_exp2(a[i] * scale - ref_a), eb = fast_exp2(b[i] * scale - ref_b);
      sum_a += ea, sum_b += eb, growth += eb - ea, slope += ea * (b[i] - a[i]);
    }
  }

  __device__ void warp_reduce() {
    sum_a = warp_sum(sum_a), sum_b = warp_sum(sum_b), growth = warp_sum(growth), slope = warp_sum(slope);
  }

  __device__ bool outgrown() const { return !(sum_a < Real(kMost) && sum_b < Real(kMost)); }
  __device__ Pair about(const Pair& at, Real scale) const {
    return {at.top_a, at.top_b, double(sum_a), double(sum_b), double(growth), double(slope) * double(scale)};
  }
};

template <class Real>
struct Sums<Cached, Real> {
  static constexpr Real nothing = 0;
  Real sum = 0, cross = 0, mass = 0;

  __device__ void add(const Cached& at, const Real (&p)[kItems], const Real (&b)[kItems], Real scale) {
    const Real ref = Real(at.top);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const Real v = b[i] * scale - ref;
      sum += fast_exp2(v), cross += p[i] * v, mass += p[i];
    }
  }

  __device__ void warp_reduce() { sum = warp_sum(sum), cross = warp_sum(cross), mass = warp_sum(mass); }

  __device__ bool outgrown() const { return !(sum < Real(kMost)); }
  __device__ Cached about(const Cached& at, Real) const {
    return {at.top, double(sum), {double(cross) + double(mass) * at.top, double(mass)}};
  }
};

template <class Real>
__device__ Real top_of_items(const Real (&x)[kItems]) {
  Real top = x[0];
#pragma unroll
  for (int i = 1; i < kItems; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

template <class State>
__device__ State shuffled(State state, int distance) {
  double fields[sizeof(State) / sizeof(double)];
  std::memcpy(fields, &state, sizeof state);
  for (double& field : fields) field = __shfl_xor_sync(~0u, field, distance);
  std::memcpy(&state, fields, sizeof state);
  return state;
}

// Merges the states of a warp; every lane gets the same result, in the same order.
template <class State>
__device__ State warp_merge(State state) {
  for (int distance = 16; distance > 0; distance /= 2) {
    const State other = shuffled(state, distance);
    const bool first = (threadIdx.x & distance) == 0;  // the lower lane's state comes first on both sides
    State left = first ? state : other;
    left.merge(first ? other : state);
    state = left;
  }
  return state;
}

// References from the first elements of a row, the same for every thread and block that shares it.
template <class State, class P, class T, class Real>
__device__ State references(const P* target, const T* input, int step, int width, int team, Real scale) {
  constexpr bool both = std::is_same_v<State, Pair>;
  Real a = Real(kNothing), b = Real(kNothing);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = team > 1 ? i * 32 + threadIdx.x % 32 : i;
    if (at >= width) continue;
    const Real x = static_cast<Real>(input[at * step]), y = both ? static_cast<Real>(target[at * step]) : Real(0);
    a = y > a ? y : a, b = x > b ? x : b;
  }
  if (team > 1) a = both ? warp_max(a) : a, b = warp_max(b);
  return State::about(double(a * scale), double(b * scale));
}

// A team member's state of elements [begin, end) of a row that outgrow its references: tile by tile, about their maxima.
template <class State, class P, class T, class Real>
__device__ MINEXP_RARE State member_state_alone(
    const P* target, const T* input, int step, int begin, int end, int member, int team, Real scale) {
  State state = State::about(double(kNothing), double(kNothing));
  for_tiles<1>(step, begin, end, member, team, [&](auto load, auto) {
    Real a[kItems], b[kItems];
    load(target, Sums<State, Real>::nothing, a);
    load(input, Real(kNothing), b);
    const State own = State::about(double(top_of_items(a) * scale), double(top_of_items(b) * scale));
    Sums<State, Real> sums;
    sums.add(own, a, b, scale);
    state.merge(sums.about(own, scale));
  });
  return state;
}

// The same by the whole block, in thread 0.
template <class State, class P, class T, class Real>
__device__ MINEXP_RARE State
block_state_alone(const P* target, const T* input, int begin, int end, Real scale, State* memory) {
  const int thread = threadIdx.x;
  State state = warp_merge(member_state_alone<State>(target, input, 1, begin, end, thread, kThreads, scale));
  __syncthreads();
  if (thread % 32 == 0) memory[thread / 32] = state;
  __syncthreads();
  for (int w = 1; thread == 0 && w < kWarps; ++w) state.merge(memory[w]);
  return state;
}

// A team member's sums of elements [begin, end) of a row about the references of `at`.
template <class State, int Width, class P, class T, class Real>
__device__ Sums<State, Real> member_sums(
    const State& at, const P* target, const T* input, int step, int begin, int end, int member, int team, Real scale) {
  Sums<State, Real> sums;
  for_tiles<Width>(step, begin, end, member, team, [&](auto load, auto) {
    Real a[kItems], b[kItems];
    load(target, Sums<State, Real>::nothing, a);
    load(input, Real(kNothing), b);
    sums.add(at, a, b, scale);
  });
  return sums;
}

// The state of a piece of a single row, by the whole block; thread 0 has it. memory holds a State for each warp.
template <class State, class P, class T, class Real>
__device__ State block_state(const P* target, const T* input, int width, Range range, Real scale, bool aligned, State* memory) {
  constexpr int Width = int(16 / sizeof(T));
  const int thread = threadIdx.x, warp = thread / 32, begin = int(range.begin), end = int(range.end);
  const State at = references<State>(target, input, 1, width, kThreads, scale);
  auto sums = aligned ? member_sums<State, Width>(at, target, input, 1, begin, end, thread, kThreads, scale)
                      : member_sums<State, 1>(at, target, input, 1, begin, end, thread, kThreads, scale);
  sums.warp_reduce();
  if (thread % 32 == 0) memory[warp] = sums.about(at, scale);
  __syncthreads();
  State state = memory[0];
  for (int w = 1; w < kWarps; ++w) state.add(memory[w]);
  if (!state.outgrown()) return state;
  return block_state_alone<State>(target, input, begin, end, scale, memory);
}

// A team member's state of a whole row.
template <class State, class P, class T, class Real>
__device__ State member_state(const P* target, const T* input, int step, int width, int member, int team, Real scale) {
  const State at = references<State>(target, input, step, width, team, scale);
  State state = at;
  for (int run = 0; run < width; run += team * kRun) {
    const int stop = run + team * kRun < width ? run + team * kRun : width;
    state.add(member_sums<State, 1>(at, target, input, step, run, stop, member, team, scale).about(at, scale));
  }
  return state.outgrown() ? member_state_alone<State>(target, input, step, 0, width, member, team, scale) : state;
}

template <class State>
struct Part {
  State state;  // of a piece of a single row
  double loss;  // of several rows
};

template <class State, class P, class T, class Real, int Most>
__global__ void __launch_bounds__(kThreads, sizeof(Real) == 4 ? 3 : 1) kl_forward(
    const __grid_constant__ Table<Most> table, const double* entropy, Part<State>* parts, unsigned* tickets,
    Saved<Real>* saved, Real* total, Real* losses) {
  constexpr int Width = int(16 / sizeof(T));
  extern __shared__ double shared_memory[];
  State* states = reinterpret_cast<State*>(shared_memory);  // kWarps of them
  double* memory = shared_memory + kWarps * (sizeof(State) / sizeof(double));  // kWarps

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const Place place = place_of(table, blockIdx.x);
  const Layer& layer = table.layers[place.layer];
  const int64_t offset = place.image * layer.features();
  const P* target = static_cast<const P*>(layer.target) + offset;
  const T* input = static_cast<const T*>(layer.input) + offset;
  const Real scale = Real(kLog2e / table.temperature);
  const auto finish = [&](const State& state, const Layer& of, int64_t row) {
    const int64_t at = place.image * table.rows + of.first_row + row;
    const double loss = state.loss(entropy ? entropy + 2 * at : nullptr);
    saved[at] = saved_or_nan<Real>(loss, state.saved());
    return loss;
  };

  if (layer.rows == 1) {
    const Range range = layer.range(place.piece);
    const bool aligned = table.aligned && offset % Width == 0 && range.begin % Width == 0;
    const State state = block_state<State>(target, input, layer.width, range, scale, aligned, states);
    if (thread == 0) parts[blockIdx.x].state = state;
  } else {
    const Range rows = layer.range(place.piece);
    double loss = 0;
    const int team = layer.strided ? 1 : 32;
    for (int64_t row = rows.begin + thread / team; row < rows.end; row += kThreads / team) {
      const P* t = target + layer.begin(row);
      const T* x = input + layer.begin(row);
      State state = member_state<State>(t, x, int(layer.step()), layer.width, thread % team, team, scale);
      if (team > 1) state = warp_merge(state);
      if (thread % team == 0) loss += finish(state, layer, row);
    }
    loss = warp_sum(loss);
    if (lane == 0) memory[warp] = loss;
    __syncthreads();
    if (thread == 0) {
      for (int w = 1; w < kWarps; ++w) loss += memory[w];
      parts[blockIdx.x].loss = loss;
    }
  }

  // The last piece of this image to come here finishes it.
  if (thread == 0) {
    __threadfence();
    memory[0] = atomicAdd(&tickets[place.image], 1u) + 1 == table.image_pieces;
  }
  __syncthreads();
  if (memory[0] == 0) return;
  __threadfence();
  for (int l = warp; l < table.count; l += kWarps) {
    const Layer& of = table.layers[l];
    const Part<State>* mine = parts + of.first_piece + place.image * of.pieces;
    double loss = 0;
    if (of.rows == 1 && of.pieces > 0) {
      State state = State::resumed(mine[0].state.saved().top_a, mine[0].state.saved().top_b);
      for (int p = lane; p < of.pieces; p += 32) state.merge(mine[p].state);
      state = warp_merge(state);
      if (lane == 0) loss = finish(state, of, 0);
    } else {
      for (int p = lane; p < of.pieces; p += 32) loss += mine[p].loss;
      loss = warp_sum(loss);
    }
    if (lane == 0) losses[l * table.images + place.image] = Real(loss / of.rows);
  }
  __syncthreads();
  if (thread == 0) {
    double weighted = 0;
    for (int l = 0; l < table.count; ++l)
      if (table.layers[l].pieces > 0) weighted += table.layers[l].weight * double(losses[l * table.images + place.image]);
    total[place.image] = Real(weighted);
  }
}

template <class State, int Width, class P, class T, class Real>
__device__ void member_gradient(
    const P* target, const T* input, T* grad, int step, int begin, int end, int member, int team, Real scale,
    const Saved<Real>& saved, Real c) {
  const Real ca = c / saved.sum_a, cb = c / saved.sum_b;
  for_tiles<Width>(step, begin, end, member, team, [&](auto load, auto store) {
    Real a[kItems], b[kItems];
    load(target, Real(0), a);
    load(input, Real(0), b);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const Real p = std::is_same_v<State, Pair> ? fast_exp2(a[i] * scale - saved.top_a) * ca : a[i] * c;
      b[i] = fast_exp2(b[i] * scale - saved.top_b) * cb - p;
    }
    store(grad, b);
  });
}

template <class State, class P, class T, class Real, int Most>
__global__ void __launch_bounds__(kThreads, sizeof(Real) == 4 ? 3 : 1) kl_backward(
    const __grid_constant__ Table<Most> table, const Saved<Real>* saved, const Real* grad_total, const Real* grad_layers) {
  constexpr int Width = int(16 / sizeof(T));
  const Place place = place_of(table, blockIdx.x);
  const Layer& layer = table.layers[place.layer];
  const int64_t offset = place.image * layer.features();
  const P* target = static_cast<const P*>(layer.target) + offset;
  const T* input = static_cast<const T*>(layer.input) + offset;
  T* grad = static_cast<T*>(layer.grad) + offset;
  const Saved<Real>* rows = saved + place.image * table.rows + layer.first_row;
  const Real scale = Real(kLog2e / table.temperature);
  double slope = 0;
  if (grad_total) slope += layer.weight * double(grad_total[place.image]);
  if (grad_layers) slope += double(grad_layers[place.layer * table.images + place.image]);
  const Real c = Real(slope / (table.temperature * layer.rows));
  const int thread = threadIdx.x;
  if (layer.rows == 1) {
    const Range range = layer.range(place.piece);
    if (table.aligned && offset % Width == 0 && range.begin % Width == 0)
      member_gradient<State, Width>(target, input, grad, 1, int(range.begin), int(range.end), thread, kThreads, scale, rows[0], c);
    else
      member_gradient<State, 1>(target, input, grad, 1, int(range.begin), int(range.end), thread, kThreads, scale, rows[0], c);
    return;
  }
  const Range range = layer.range(place.piece);
  const int team = layer.strided ? 1 : 32;
  for (int64_t row = range.begin + thread / team; row < range.end; row += kThreads / team) {
    const int64_t begin = layer.begin(row);
    member_gradient<State, 1>(
        target + begin, input + begin, grad + begin, int(layer.step()), 0, layer.width, thread % team, team, scale, rows[row], c);
  }
}

constexpr int shared_bytes = int(sizeof(double)) * kWarps * (int(sizeof(Pair) / sizeof(double)) + 1);

}  // namespace minexp
