// activation_kl as CUDA kernels: no torch and no launch syntax here, so that they also run on a host emulator.
//
// One block a piece, all layers in one launch. A team of threads shares a row: the block a long single row, a warp
// each of several contiguous rows, a thread each of several interleaved ones (neighbours then read neighbours). The
// last block of an image to finish merges the image's pieces, always in the same order.
#pragma once

#include "kl.h"

namespace minexp {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kItems = 8;              // elements a thread holds at once
constexpr int64_t kCudaPiece = 16384;  // elements of a block

// The whole call as one kernel parameter: 56 bytes a layer, up to 512 of them.
template <int Most>
struct Table {
  Layer layers[Most];
  int32_t count, aligned;  // aligned: every layer begins where a 16-byte load may
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

// This member's elements of one tile of a team, in packets of Width: how many of them there are.
template <int Width, class T, class Real>
__device__ int load(const T* from, int64_t step, int64_t begin, int64_t end, int member, int team, Real (&out)[kItems]) {
  int count = 0;
#pragma unroll
  for (int q = 0; q < kItems / Width; ++q) {
    const int64_t at = begin + int64_t(q * team + member) * Width;
    if (Width > 1 && at + Width <= end) {
      const auto packet = *reinterpret_cast<const Packet<T, Width>*>(from + at);
#pragma unroll
      for (int i = 0; i < Width; ++i) out[q * Width + i] = static_cast<Real>(packet.items[i]);
      count += Width;
    } else {
#pragma unroll
      for (int i = 0; i < Width; ++i)
        if (at + i < end) out[q * Width + i] = static_cast<Real>(from[(at + i) * step]), ++count;
    }
  }
  return count;
}

template <int Width, class T, class Real>
__device__ void store(T* to, int64_t step, int64_t begin, int64_t end, int member, int team, const Real (&values)[kItems]) {
#pragma unroll
  for (int q = 0; q < kItems / Width; ++q) {
    const int64_t at = begin + int64_t(q * team + member) * Width;
    if (Width > 1 && at + Width <= end) {
      Packet<T, Width> packet;
#pragma unroll
      for (int i = 0; i < Width; ++i) packet.items[i] = static_cast<T>(values[q * Width + i]);
      *reinterpret_cast<Packet<T, Width>*>(to + at) = packet;
    } else {
#pragma unroll
      for (int i = 0; i < Width; ++i)
        if (at + i < end) to[(at + i) * step] = static_cast<T>(values[q * Width + i]);
    }
  }
}

// The sums of a thread's elements about the references of `at`, as the CPU's tiles but with every index constant.
template <class Real>
__device__ Pair<double> sums_of(const Pair<double>& at, const Real (&a)[kItems], const Real (&b)[kItems], int count, Real scale) {
  const Real ref_a = Real(at.top_a), ref_b = Real(at.top_b);
  Real sum_a = 0, sum_b = 0, growth = 0, slope = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i)
    if (i < count) {
      const Real u = a[i] * scale, v = b[i] * scale;
      const Real ea = fast_exp(u - ref_a), eb = fast_exp(v - ref_b);
      sum_a += ea, sum_b += eb, growth += eb - ea, slope += ea * (v - u);
    }
  return {at.top_a, at.top_b, sum_a, sum_b, growth, slope};
}

template <class Real>
__device__ Cached<double> sums_of(const Cached<double>& at, const Real (&p)[kItems], const Real (&b)[kItems], int count, Real scale) {
  const Real ref = Real(at.top);
  Real sum = 0, cross = 0, mass = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i)
    if (i < count) {
      const Real v = b[i] * scale - ref;
      sum += fast_exp(v), cross += p[i] * v, mass += p[i];
    }
  return {at.top, sum, double(cross) + double(mass) * at.top, mass};
}

template <class Real>
__device__ Real top_of_items(const Real (&x)[kItems], int count) {
  Real top = -std::numeric_limits<Real>::infinity();
#pragma unroll
  for (int i = 0; i < kItems; ++i)
    if (i < count) top = x[i] > top ? x[i] : top;
  return top;
}

__device__ inline double warp_max(double x) {
  for (int distance = 16; distance > 0; distance /= 2) {
    const double other = __shfl_xor_sync(~0u, x, distance);
    x = other > x ? other : x;
  }
  return x;
}

template <class State>
__device__ State shuffled(State state, int distance) {
  double fields[sizeof(State) / sizeof(double)];
  std::memcpy(fields, &state, sizeof state);
  for (double& field : fields) field = __shfl_xor_sync(~0u, field, distance);
  std::memcpy(&state, fields, sizeof state);
  return state;
}

// Merges states that some lanes of a warp have; every lane gets the same result, in the same order.
template <class State>
__device__ State warp_merge(State state, bool some) {
  for (int distance = 16; distance > 0; distance /= 2) {
    State other = shuffled(state, distance);
    const bool others = __shfl_xor_sync(~0u, int(some), distance);
    if (some && others) {
      const bool first = (threadIdx.x & distance) == 0;  // the lower lane's state comes first on both sides
      State left = first ? state : other;
      left.merge(first ? other : state);
      state = left;
    } else if (others) {
      state = other;
    }
    some = some || others;
  }
  return state;
}

// A team member's state of elements [begin, end) of a row, about references that the whole team shares if it is a
// block or a warp (`memory` then holds a maximum for each warp). Every thread of a block must come here for a block.
template <class State, int Width, class P, class T, class Real>
__device__ State member_state(
    const P* target, const T* input, int64_t step, int64_t begin, int64_t end, int member, int team, Real scale,
    double* memory, bool& some) {
  Real a[kItems], b[kItems];
  State state;
  some = false;
  bool first = true;
#pragma unroll 1  // one tile's registers are enough
  for (int64_t tile = begin; first || tile < end; tile += int64_t(team) * kItems, first = false) {
    const int count = load<Width>(target, step, tile, end, member, team, a);
    load<Width>(input, step, tile, end, member, team, b);
    double tops[2] = {double(top_of_items(a, count) * scale), double(top_of_items(b, count) * scale)};
    if (first) {
      double shared[2] = {tops[0], tops[1]};
      if (team > 1)
        for (int side = 0; side < 2; ++side) shared[side] = warp_max(shared[side]);
      if (team == kThreads) {
        if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = shared[0], memory[kWarps + threadIdx.x / 32] = shared[1];
        __syncthreads();
        for (int w = 0; w < kWarps; ++w)
          for (int side = 0; side < 2; ++side)
            shared[side] = memory[side * kWarps + w] > shared[side] ? memory[side * kWarps + w] : shared[side];
        __syncthreads();
      }
      state = State::about(shared[0], shared[1]);
    }
    if (count == 0) continue;
    some = true;
    if (state.overflows(tops, 60.))
      state.merge(sums_of(State::about(tops[0], tops[1]), a, b, count, scale));
    else
      state.merge(sums_of(state, a, b, count, scale));
  }
  return state;
}

template <class State>
struct Part {
  State state;  // of a piece of a single row
  double loss;  // of several rows
};

template <template <class> class Algebra, class P, class T, class Real, int Most>
__global__ void __launch_bounds__(kThreads, sizeof(Real) == 4 ? 2 : 1) kl_forward(
    const __grid_constant__ Table<Most> table, const double* entropy, Part<Algebra<double>>* parts, unsigned* tickets,
    Saved<Real>* saved, Real* total, Real* losses) {
  using State = Algebra<double>;
  constexpr int Width = int(16 / sizeof(T));
  extern __shared__ double shared_memory[];
  State* states = reinterpret_cast<State*>(shared_memory);  // kWarps of them
  double* memory = shared_memory + kWarps * (sizeof(State) / sizeof(double));  // 2 * kWarps

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const Place place = place_of(table, blockIdx.x);
  const Layer& layer = table.layers[place.layer];
  const int64_t offset = place.image * layer.features();
  const P* target = static_cast<const P*>(layer.target) + offset;
  const T* input = static_cast<const T*>(layer.input) + offset;
  const Real scale = Real(1 / table.temperature);
  const auto finish = [&](const State& state, const Layer& of, int64_t row) {
    const int64_t at = place.image * table.rows + of.first_row + row;
    const double loss = state.loss(entropy ? entropy + 2 * at : nullptr);
    saved[at] = saved_or_nan<Real>(loss, state.saved());
    return loss;
  };

  bool some;
  if (layer.rows == 1) {
    const Range range = layer.range(place.piece);
    const bool whole = table.aligned && offset % Width == 0 && range.begin % Width == 0;
    State state =
        whole ? member_state<State, Width>(target, input, 1, range.begin, range.end, thread, kThreads, scale, memory, some)
              : member_state<State, 1>(target, input, 1, range.begin, range.end, thread, kThreads, scale, memory, some);
    state = warp_merge(state, some);
    const bool any = __ballot_sync(~0u, some) != 0;
    if (lane == 0) states[warp] = state, memory[warp] = any;
    __syncthreads();
    if (thread == 0) {
      for (int w = 1; w < kWarps; ++w)
        if (memory[w] != 0) state.merge(states[w]);
      parts[blockIdx.x].state = state;
    }
  } else {
    const Range rows = layer.range(place.piece);
    double loss = 0;
    const int team = layer.strided ? 1 : 32;
    for (int64_t row = rows.begin + thread / team; row < rows.end; row += kThreads / team) {
      const int64_t begin = layer.begin(row);
      State state = member_state<State, 1>(
          target + begin, input + begin, layer.step(), 0, layer.width, thread % team, team, scale, memory, some);
      if (team > 1) state = warp_merge(state, some);
      if (thread % team == 0) loss += finish(state, layer, row);
    }
    for (int distance = 16; distance > 0; distance /= 2) loss += __shfl_xor_sync(~0u, loss, distance);
    if (lane == 0) memory[warp] = loss;
    __syncthreads();
    if (thread == 0) {
      for (int w = 1; w < kWarps; ++w) loss += memory[w];
      parts[blockIdx.x].loss = loss;
    }
  }

  // The last piece of this image to come here finishes it.
  if (thread == 0) {
    unsigned expected = 0;
    for (int l = 0; l < table.count; ++l) expected += table.layers[l].pieces;
    __threadfence();
    memory[0] = atomicAdd(&tickets[place.image], 1u) + 1 == expected;
  }
  __syncthreads();
  if (memory[0] == 0) return;
  __threadfence();
  for (int l = warp; l < table.count; l += kWarps) {
    const Layer& of = table.layers[l];
    const Part<State>* mine = parts + of.first_piece + place.image * of.pieces;
    double loss = 0;
    if (of.rows == 1 && of.pieces > 0) {
      State state;
      some = false;
      for (int p = lane; p < of.pieces; p += 32, some = true) {
        if (some)
          state.merge(mine[p].state);
        else
          state = mine[p].state;
      }
      state = warp_merge(state, some);
      if (lane == 0) loss = finish(state, of, 0);
    } else {
      for (int p = lane; p < of.pieces; p += 32) loss += mine[p].loss;
      for (int distance = 16; distance > 0; distance /= 2) loss += __shfl_xor_sync(~0u, loss, distance);
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

template <class Real>
__device__ Real slope_of(Pair<double>*, Real t, Real x, Real scale, const Saved<Real>& s, Real ca, Real cb) {
  return fast_exp(x * scale - s.top_b) * cb - fast_exp(t * scale - s.top_a) * ca;
}

template <class Real>
__device__ Real slope_of(Cached<double>*, Real t, Real x, Real scale, const Saved<Real>& s, Real, Real cb) {
  return fast_exp(x * scale - s.top_b) * cb - t * (cb * s.sum_b);
}

template <class State, int Width, class P, class T, class Real>
__device__ void member_gradient(
    const P* target, const T* input, T* grad, int64_t step, int64_t begin, int64_t end, int member, int team, Real scale,
    const Saved<Real>& saved, Real c) {
  const Real ca = c / saved.sum_a, cb = c / saved.sum_b;
#pragma unroll 1
  for (int64_t tile = begin; tile < end; tile += int64_t(team) * kItems) {
    Real a[kItems] = {}, b[kItems] = {};
    load<Width>(target, step, tile, end, member, team, a);
    load<Width>(input, step, tile, end, member, team, b);
#pragma unroll
    for (int i = 0; i < kItems; ++i) b[i] = slope_of(static_cast<State*>(nullptr), a[i], b[i], scale, saved, ca, cb);
    store<Width>(grad, step, tile, end, member, team, b);
  }
}

template <template <class> class Algebra, class P, class T, class Real, int Most>
__global__ void __launch_bounds__(kThreads, sizeof(Real) == 4 ? 2 : 1) kl_backward(
    const __grid_constant__ Table<Most> table, const Saved<Real>* saved, const Real* grad_total, const Real* grad_layers) {
  using State = Algebra<double>;
  constexpr int Width = int(16 / sizeof(T));
  const Place place = place_of(table, blockIdx.x);
  const Layer& layer = table.layers[place.layer];
  const int64_t offset = place.image * layer.features();
  const P* target = static_cast<const P*>(layer.target) + offset;
  const T* input = static_cast<const T*>(layer.input) + offset;
  T* grad = static_cast<T*>(layer.grad) + offset;
  const Saved<Real>* rows = saved + place.image * table.rows + layer.first_row;
  const Real scale = Real(1 / table.temperature);
  double slope = 0;
  if (grad_total) slope += layer.weight * double(grad_total[place.image]);
  if (grad_layers) slope += double(grad_layers[place.layer * table.images + place.image]);
  const Real c = Real(slope / (table.temperature * layer.rows));
  const int thread = threadIdx.x;
  if (layer.rows == 1) {
    const Range range = layer.range(place.piece);
    if (table.aligned && offset % Width == 0 && range.begin % Width == 0)
      member_gradient<State, Width>(target, input, grad, 1, range.begin, range.end, thread, kThreads, scale, rows[0], c);
    else
      member_gradient<State, 1>(target, input, grad, 1, range.begin, range.end, thread, kThreads, scale, rows[0], c);
    return;
  }
  const Range range = layer.range(place.piece);
  const int team = layer.strided ? 1 : 32;
  for (int64_t row = range.begin + thread / team; row < range.end; row += kThreads / team) {
    const int64_t begin = layer.begin(row);
    member_gradient<State, 1>(
        target + begin, input + begin, grad + begin, layer.step(), 0, layer.width, thread % team, team, scale, rows[row], c);
  }
}

constexpr int shared_bytes = int(sizeof(double)) * kWarps * (int(sizeof(Pair<double>) / sizeof(double)) + 2);

}  // namespace minexp
