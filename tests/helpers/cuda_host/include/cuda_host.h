// CUDA's words for a C++ compiler: the kernels of csrc/cuda/ run on the CPU, a fiber per CUDA thread, one block after the other (all
// blocks of a cooperative launch together). Barriers and shuffles switch fibers, so everything between two of them runs in an order of
// the test's choice: forward, backward or shuffled. What depends on the order for want of a barrier gives other numbers.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define FAM_DYNAMIC_SHARED(name) unsigned char* name = fam_ext::gpu::host::current().shared

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace fam_ext::gpu {
using std::exp;
using std::log1p;

namespace host {

struct Barrier {
  int size = 0, arrived = 0;
  int64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  unsigned char slots[2][32][8];  // two sets: one barrier per shuffle is enough
};

struct Copy {
  void* to;
  const void* from;
  size_t size;
};

// What a CUDA thread knows of itself.
struct Thread {
  dim3 thread{0, 0, 0}, block{0, 0, 0}, block_size, grid_size;
  unsigned char* shared = nullptr;
  Barrier *block_barrier = nullptr, *grid_barrier = nullptr;
  Warp* warp = nullptr;
  int shuffles = 0;
  std::vector<Copy> copies;  // asynchronous ones: made when the thread waits for them, and not before
};

Thread& current();
void wait(Barrier& barrier);
void launch(bool cooperative, dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);
inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}
inline uint16_t float_to_bfloat16(float x) {
  if (std::isnan(x)) return 0x7fc0;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The value that lane `from(lane)` gives, once all 32 lanes are here.
template <typename T, typename F>
T exchange(T value, const F& from) {
  Thread& self = current();
  const int lane = static_cast<int>(self.thread.x % 32), set = self.shuffles++ % 2;
  std::memcpy(self.warp->slots[set][lane], &value, sizeof(T));
  wait(self.warp->barrier);
  T result;
  std::memcpy(&result, self.warp->slots[set][from(lane)], sizeof(T));
  return result;
}

}  // namespace host

inline void grid_barrier() { host::wait(*host::current().grid_barrier); }
template <typename T>
void copy_async(T* shared, const T* global) {
  host::current().copies.push_back({shared, global, sizeof(T)});
}
inline void wait_for_copies() {
  for (const host::Copy& copy : host::current().copies) std::memcpy(copy.to, copy.from, copy.size);
  host::current().copies.clear();
}

}  // namespace fam_ext::gpu

#define threadIdx (fam_ext::gpu::host::current().thread)
#define blockIdx (fam_ext::gpu::host::current().block)
#define blockDim (fam_ext::gpu::host::current().block_size)
#define gridDim (fam_ext::gpu::host::current().grid_size)

inline void __syncthreads() { fam_ext::gpu::host::wait(*fam_ext::gpu::host::current().block_barrier); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return fam_ext::gpu::host::exchange(value, [mask](int lane) { return lane ^ mask; });
}
inline unsigned __ballot_sync(unsigned, bool set) {
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) {
    result |= static_cast<unsigned>(fam_ext::gpu::host::exchange(set, [lane](int) { return lane; })) << lane;
  }
  return result;
}
inline int __ffs(int x) { return __builtin_ffs(x); }

#define FAM_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ((void)(stream), fam_ext::gpu::host::launch(false, grid, block, shared, [&] { kernel(__VA_ARGS__); }))
#define FAM_LAUNCH_COOPERATIVE(kernel, grid, block, shared, stream, ...)                                \
  ((void)(stream), fam_ext::gpu::host::launch(true, grid, block, shared, [&] { kernel(__VA_ARGS__); }), \
   cudaGetLastError())
