// Runs CUDA kernels on the host, as they are: each thread of a block is a fiber, barriers and warp shuffles are points
// where fibers wait for one another. Blocks run one after another. It finds wrong indices, wrong shuffles, missing
// barriers (shared memory is poisoned before every block, and fibers can run in either order) and barriers that not
// all threads reach; it cannot find races on memory order.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
#define __shared__
#define __launch_bounds__(...)

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace minexp {
constexpr size_t kSharedBytes = 227 * 1024;
alignas(16) inline double shared_memory[kSharedBytes / sizeof(double) + 16];
}  // namespace minexp

namespace emulator {

struct Barrier {
  int arrived = 0, generation = 0;
};

class Block {
 public:
  Block(unsigned index, unsigned grid, unsigned threads, size_t shared_bytes, bool backwards, std::function<void()> kernel)
      : kernel_(std::move(kernel)), fibers_(threads), warps_((threads + 31) / 32), slots_(threads), backwards_(backwards) {
    current_ = this;
    blockIdx.x = index, blockDim.x = threads, gridDim.x = grid;
    std::memset(minexp::shared_memory, 0xff, sizeof minexp::shared_memory);  // as floating point: NaN
    live_ = int(threads);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = fibers_[t];
      fiber.stack.reset(new char[kStack]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    run();
    const auto* end = reinterpret_cast<const unsigned char*>(minexp::shared_memory);
    for (size_t i = shared_bytes; i < sizeof minexp::shared_memory; ++i)
      if (end[i] != 0xff) throw std::runtime_error("a kernel wrote past its shared memory");
  }

  static Block& current() { return *current_; }

  void block_barrier() { wait(barrier_, [this] { return live_; }); }

  void warp_barrier() {
    const unsigned warp = thread_ / 32;
    wait(warps_[warp], [this, warp] {
      int alive = 0;
      for (unsigned t = warp * 32; t < std::min<unsigned>((warp + 1) * 32, fibers_.size()); ++t) alive += !fibers_[t].done;
      return alive;
    });
  }

  // Every lane of the warp offers a value; lane `from` of it is returned.
  template <class T>
  T exchange(T value, unsigned from) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    std::memcpy(&slots_[thread_], &value, sizeof value);
    warp_barrier();
    std::memcpy(&value, &slots_[thread_ / 32 * 32 + from % 32], sizeof value);
    warp_barrier();
    return value;
  }

  unsigned ballot(bool yes) {
    slots_[thread_] = yes;
    warp_barrier();
    unsigned bits = 0;
    const unsigned first = thread_ / 32 * 32;
    for (unsigned lane = 0; lane < 32 && first + lane < fibers_.size(); ++lane)
      bits |= unsigned(slots_[first + lane] & 1) << lane;
    warp_barrier();
    return bits;
  }

 private:
  static constexpr size_t kStack = 64 * 1024;
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
  };

  static void enter() {
    Block& block = *current_;
    block.kernel_();
    block.fibers_[block.thread_].done = true;
    --block.live_;
  }

  void run() {
    int64_t idle = 0;
    while (live_ > 0) {
      const int64_t before = progress_ - live_;
      for (unsigned i = 0; i < fibers_.size(); ++i) {
        thread_ = backwards_ ? unsigned(fibers_.size()) - 1 - i : i;
        if (fibers_[thread_].done) continue;
        threadIdx.x = thread_;
        swapcontext(&scheduler_, &fibers_[thread_].context);
      }
      idle = progress_ - live_ == before ? idle + 1 : 0;
      if (idle > 3) throw std::runtime_error("a barrier that not every thread reaches");
    }
  }

  template <class Expected>
  void wait(Barrier& barrier, Expected expected) {
    const int generation = barrier.generation;
    ++barrier.arrived, ++progress_;
    while (barrier.generation == generation) {
      if (barrier.arrived == expected()) {
        barrier.arrived = 0, ++barrier.generation, ++progress_;
        break;
      }
      const unsigned thread = thread_;
      swapcontext(&fibers_[thread].context, &scheduler_);
      thread_ = thread, threadIdx.x = thread;
    }
  }

  inline static Block* current_ = nullptr;
  std::function<void()> kernel_;
  std::vector<Fiber> fibers_;
  std::vector<Barrier> warps_;
  std::vector<uint64_t> slots_;
  ucontext_t scheduler_;
  Barrier barrier_;
  bool backwards_;
  unsigned thread_ = 0;
  int live_ = 0;
  int64_t progress_ = 0;
};

// kernel<<<blocks, threads, shared_bytes>>>(arguments...), one block after another.
template <class Kernel, class... Arguments>
void launch(Kernel kernel, unsigned blocks, unsigned threads, size_t shared_bytes, bool backwards, Arguments... arguments) {
  if (shared_bytes > minexp::kSharedBytes) throw std::runtime_error("more shared memory than a GPU has");
  for (unsigned b = 0; b < blocks; ++b)
    Block(backwards ? blocks - 1 - b : b, blocks, threads, shared_bytes, backwards, [&] { kernel(arguments...); });
}

}  // namespace emulator

inline void __syncthreads() { emulator::Block::current().block_barrier(); }
inline void __syncwarp() { emulator::Block::current().warp_barrier(); }
inline void __threadfence() {}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __ballot_sync(unsigned, bool yes) { return emulator::Block::current().ballot(yes); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::Block::current().exchange(value, (threadIdx.x % 32) ^ unsigned(mask));
}
inline unsigned atomicAdd(unsigned* to, unsigned value) {
  const unsigned before = *to;
  *to += value;
  return before;
}
