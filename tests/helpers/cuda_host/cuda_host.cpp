#include "cuda_host.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

namespace {

using fam_ext::gpu::host::Barrier;
using fam_ext::gpu::host::Thread;
using fam_ext::gpu::host::Warp;

constexpr size_t kStack = 64 << 10, kCanary = 256, kMostShared = 48 << 10;

int order = 0, cooperative_launch = 1, processors = 64, launches = 0, grid_barriers = 0;
cudaError_t last_error = cudaSuccess;

struct Fiber {
  ucontext_t
      context;  // for the first entry; later ones go by setjmp, which saves no signal mask and makes no system call
  jmp_buf place;
  bool begun = false;
  Thread self;
  const Barrier* waiting = nullptr;
  int64_t generation = 0;
  bool done = false;
};

std::vector<Fiber> fibers;
std::vector<void*> stacks;
jmp_buf scheduler;
Fiber* running = nullptr;
const std::function<void()>* entry = nullptr;
uint64_t random_state = 1;

[[gnu::noinline]] void leave() {
  if (_setjmp(running->place) == 0) _longjmp(scheduler, 1);
}

[[gnu::noinline]] void resume() {
  if (_setjmp(scheduler) != 0) return;
  if (running->begun) _longjmp(running->place, 1);
  running->begun = true;
  setcontext(&running->context);
}

void run_fiber() {
  (*entry)();
  running->done = true;
  leave();
}

void begin(Fiber& fiber, void* stack) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
}

uint64_t next_random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  return random_state ^= random_state << 17;
}

// 0, 1, 2, ... in the order that was asked for
void arrange(std::vector<int>& indices) {
  for (size_t k = 0; k < indices.size(); ++k) indices[k] = static_cast<int>(k);
  if (order == 1) std::reverse(indices.begin(), indices.end());
  if (order == 2) {
    for (size_t k = indices.size(); k > 1; --k) std::swap(indices[k - 1], indices[next_random() % k]);
  }
}

void run_all() {
  std::vector<int> turn(fibers.size());
  for (size_t left = fibers.size(); left > 0;) {
    bool progress = false;
    arrange(turn);
    for (const int k : turn) {
      Fiber& fiber = fibers[k];
      if (fiber.done || (fiber.waiting != nullptr && fiber.waiting->generation == fiber.generation)) continue;
      fiber.waiting = nullptr;
      progress = true;
      running = &fiber;
      resume();
      if (fiber.done) --left;
    }
    if (!progress) {
      std::fprintf(stderr, "CUDA host shim: a barrier waits for threads that have ended or wait elsewhere\n");
      std::abort();
    }
  }
}

}  // namespace

namespace fam_ext::gpu::host {

Thread& current() { return running->self; }

void wait(Barrier& barrier) {
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
    if (&barrier == running->self.grid_barrier) ++grid_barriers;
    return;
  }
  running->waiting = &barrier;
  running->generation = barrier.generation;
  leave();
}

void launch(bool cooperative, dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel) {
  ++launches;
  const size_t threads = block.x, blocks = static_cast<size_t>(grid.x) * grid.y;
  if (blocks == 0 || threads == 0 || threads > 1024 || threads % 32 != 0 || grid.y > 65535 || grid.x > 0x7fffffff ||
      shared > kMostShared || block.y * block.z * grid.z != 1) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  entry = &kernel;
  const size_t together = cooperative ? blocks : 1;
  std::vector<int> turn(blocks);
  arrange(turn);
  Barrier grid_barrier{static_cast<int>(threads * together)};
  fibers.resize(threads * together);
  while (stacks.size() < fibers.size()) {
    stacks.push_back(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  for (size_t first = 0; first < blocks; first += together) {
    std::vector<Barrier> barriers(together, Barrier{static_cast<int>(threads)});
    std::vector<Warp> warps(together * threads / 32, Warp{Barrier{32}, {}});
    std::vector<std::unique_ptr<unsigned char[]>> memory(together);
    for (size_t b = 0; b < together; ++b) {
      memory[b].reset(new unsigned char[shared + kCanary + 16]);
      std::memset(memory[b].get(), 0xff, shared + kCanary + 16);  // nan, until written
      const unsigned index = static_cast<unsigned>(turn[first + b]);
      auto start = reinterpret_cast<uintptr_t>(memory[b].get());
      for (size_t t = 0; t < threads; ++t) {
        Fiber& fiber = fibers[b * threads + t];
        fiber.done = fiber.begun = false;
        fiber.waiting = nullptr;
        fiber.self = Thread{};
        fiber.self.thread.x = static_cast<unsigned>(t);
        fiber.self.block = dim3(index % grid.x, index / grid.x, 0);
        fiber.self.block_size = block;
        fiber.self.grid_size = grid;
        fiber.self.shared = reinterpret_cast<unsigned char*>((start + 15) / 16 * 16);
        fiber.self.block_barrier = &barriers[b];
        fiber.self.grid_barrier = cooperative ? &grid_barrier : nullptr;
        fiber.self.warp = &warps[b * threads / 32 + t / 32];
        begin(fiber, stacks[b * threads + t]);
      }
    }
    run_all();
    for (size_t b = 0; b < together; ++b) {
      const unsigned char* end = fibers[b * threads].self.shared + shared;
      if (!std::all_of(end, end + kCanary - 16, [](unsigned char c) { return c == 0xff; })) {
        std::fprintf(stderr, "CUDA host shim: a kernel wrote past its shared memory\n");
        std::abort();
      }
    }
  }
}

float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float x;
  if (exponent == 31) {
    x = fraction != 0 ? std::nanf("") : INFINITY;
  } else {
    x = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                      : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  }
  return bits >> 15 ? -x : x;
}

uint16_t float_to_half(float x) {
  const auto sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000 : 0);
  if (std::isnan(x)) return 0x7e00;
  const float size = std::fabs(x);
  if (size == 0) return sign;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent = 0;
  std::frexp(size, &exponent);
  const int unit = std::max(exponent - 11, -24);  // of the last place
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));
  // steps of 2^-24 up to 2^11: both subnormal and normal numbers are encoded by adding
  return static_cast<uint16_t>(sign | (unit == -24 ? steps : ((unit + 24) << 10) + steps));
}

}  // namespace fam_ext::gpu::host

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrCooperativeLaunch ? cooperative_launch : processors;
  return cudaSuccess;
}

// For the tests, through ctypes.
extern "C" {
void fam_host_set_order(int value) { order = value; }
void fam_host_set_cooperative(int value) { cooperative_launch = value; }
void fam_host_set_processors(int value) { processors = value; }
int fam_host_launches() { return std::exchange(launches, 0); }
int fam_host_grid_barriers() { return std::exchange(grid_barriers, 0); }
}
