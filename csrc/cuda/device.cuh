// What every CUDA kernel stands on: dtypes, strided rows, sums over a warp and a block. No torch header is included, so nvcc alone
// compiles the kernels; without nvcc they compile as C++ over a shim that tests/helpers/cuda_host/ provides.
#pragma once

#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <type_traits>
#define FAM_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define FAM_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
namespace fam_ext::gpu {
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }
// One number from global to shared memory, without a register: all copies up to the next wait are under way together.
template <typename T>
__device__ __forceinline__ void copy_async(T* shared, const T* global) {
  __pipeline_memcpy_async(shared, global, sizeof(T));
}
__device__ __forceinline__ void wait_for_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}
// The arguments have the kernel's own types: the launch copies them byte by byte.
template <typename... Parameters>
cudaError_t launch_cooperative(void (*kernel)(Parameters...), unsigned grid, unsigned block, size_t shared,
                               cudaStream_t stream, std::decay_t<Parameters>... arguments) {
  void* pointers[] = {static_cast<void*>(&arguments)...};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(grid), dim3(block), pointers, shared,
                                     stream);
}
}  // namespace fam_ext::gpu
#define FAM_LAUNCH_COOPERATIVE(...) launch_cooperative(__VA_ARGS__)
#else
#include "cuda_host.h"
#endif

#undef NDEBUG  // a class index out of range must stop the kernel in every build
#include <cassert>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cuda/view.h"
#include "flatness.h"

namespace fam_ext::gpu {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarp = 32;

// ---- Numbers in memory. T is the type of accumulation, float or double. ----

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename T>
__device__ __forceinline__ T from_storage(float x) {
  return static_cast<T>(x);
}
template <typename T>
__device__ __forceinline__ T from_storage(double x) {
  return static_cast<T>(x);
}
#ifdef __CUDACC__
template <typename T>
__device__ __forceinline__ T from_storage(BFloat16 x) {
  return static_cast<T>(__uint_as_float(static_cast<unsigned>(x.bits) << 16));
}
template <typename T>
__device__ __forceinline__ T from_storage(Half x) {
  return static_cast<T>(__half2float(__ushort_as_half(x.bits)));
}
#else
template <typename T>
T from_storage(BFloat16 x) {
  return static_cast<T>(host::bfloat16_to_float(x.bits));
}
template <typename T>
T from_storage(Half x) {
  return static_cast<T>(host::half_to_float(x.bits));
}
#endif

template <typename T>
__device__ __forceinline__ void to_storage(T x, float* p) {
  *p = static_cast<float>(x);
}
template <typename T>
__device__ __forceinline__ void to_storage(T x, double* p) {
  *p = static_cast<double>(x);
}
#ifdef __CUDACC__
template <typename T>
__device__ __forceinline__ void to_storage(T x, BFloat16* p) {
  p->bits = __bfloat16_as_ushort(__float2bfloat16_rn(static_cast<float>(x)));
}
template <typename T>
__device__ __forceinline__ void to_storage(T x, Half* p) {
  p->bits = __half_as_ushort(__float2half_rn(static_cast<float>(x)));
}
#else
template <typename T>
void to_storage(T x, BFloat16* p) {
  p->bits = host::float_to_bfloat16(static_cast<float>(x));
}
template <typename T>
void to_storage(T x, Half* p) {
  p->bits = host::float_to_half(static_cast<float>(x));
}
#endif

// In place of the type of numbers in memory: it is known when the kernel runs only.
struct Any {};

// f(S()), or with Any f of the type that `type` stands for: a branch that all threads of a launch take alike. What is accumulated in
// float holds no double.
template <typename T, typename S, typename F>
__device__ __forceinline__ void with_type(DType type, const F& f) {
  if constexpr (!std::is_same_v<S, Any>) {
    f(S{});
  } else if (type == DType::kBFloat16) {
    f(BFloat16{});
  } else if (type == DType::kHalf) {
    f(Half{});
  } else if (std::is_same_v<T, float> || type == DType::kFloat) {
    f(float{});
  } else {
    f(T{});
  }
}

template <typename T, typename S>
__device__ __forceinline__ T load(const RowView& view, int64_t index) {
  T result{};
  with_type<T, S>(view.dtype,
                  [&](auto s) { result = from_storage<T>(static_cast<const decltype(s)*>(view.data)[index]); });
  return result;
}
template <typename S, typename T>
__device__ __forceinline__ void store(const RowView& view, int64_t index, T x) {
  with_type<T, S>(view.dtype, [&](auto s) { to_storage(x, static_cast<decltype(s)*>(view.data) + index); });
}

// f(S()) on the host, for the type S in memory that a kernel is compiled for: float accumulates what is of one type, double what is
// double or Any.
template <typename T, typename F>
cudaError_t for_type(DType type, const F& f) {
  if constexpr (std::is_same_v<T, double>) {
    return type == DType::kDouble ? f(double{}) : f(Any{});
  } else {
    return type == DType::kBFloat16 ? f(BFloat16{}) : type == DType::kHalf ? f(Half{}) : f(float{});
  }
}

// V numbers that lie side by side, 16 bytes of them at most.
template <typename S, int V>
struct alignas(sizeof(S) * V) Pack {
  S values[V];
};
template <typename S>
constexpr int kPack = 16 / sizeof(S);

struct alignas(16) Words {
  uint32_t values[4];
};

// One store of 16 bytes: left to itself, the compiler takes some packs apart.
template <typename S, int V>
__device__ __forceinline__ void store_pack(S* target, const Pack<S, V>& pack) {
  if constexpr (sizeof(pack) == sizeof(Words)) {
    Words words;
    memcpy(&words, &pack, sizeof(words));
#ifdef __CUDACC__
    *reinterpret_cast<uint4*>(target) = make_uint4(words.values[0], words.values[1], words.values[2], words.values[3]);
#else
    *reinterpret_cast<Words*>(target) = words;
#endif
  } else {
    *reinterpret_cast<Pack<S, V>*>(target) = pack;
  }
}

template <typename T>
constexpr T kLowest = std::numeric_limits<T>::lowest();
template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// exp(x - max), its argument's rounding error made good
template <typename T>
__device__ __forceinline__ T shifted_exp(T x, T max) {
  const T d = x - max, error = d > kLowest<T> ? difference_error(x, max, d) : T(0);
  const T e = exp(d);
  return e * error + e;
}

// ---- Sums in a fixed order ----

// In two levels: the rounding error grows with the square root of the number of terms over 32.
template <typename T>
class LongSum {
 public:
  __device__ __forceinline__ LongSum() : LongSum(T(0)) {}
  __device__ __forceinline__ explicit LongSum(T start) : outer_(start), inner_(0) {}
  __device__ __forceinline__ void add(T x) {
    inner_ += x;
    if (++count_ % 32 == 0) flush();
  }
  __device__ __forceinline__ T total() const { return outer_ + inner_; }

 private:
  __device__ __forceinline__ void flush() {
    outer_ += inner_;
    inner_ = T(0);
  }
  T outer_, inner_;
  int count_ = 0;
};

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

constexpr int kSumThreads = 128;  // of every block that sums

// The sum over the block in every thread. `scratch`: one number per warp; all threads call it.
template <typename T>
__device__ __forceinline__ T block_sum(T x, T* scratch) {
  constexpr int warps = kSumThreads / kWarp;
  x = warp_sum(x);
  __syncthreads();  // the scratch of the sum before has been read
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  T result(0);
#pragma unroll
  for (int k = 0; k < warps; ++k) result += scratch[k];
  return result;
}

// sum of the squares of one row, by the threads `lane`, `lane` + `lanes`, ...: this thread's share
template <typename T, typename Stored>
__device__ __forceinline__ T squares_share(const RowView& view, int64_t row, int lane, int lanes) {
  const int64_t start = view.offset(row);
  T result(0);
  with_type<T, Stored>(view.dtype, [&](auto s) {
    using S = decltype(s);
    constexpr int V = kPack<S>;
    const S* x = static_cast<const S*>(view.data) + start;
    T sums[V] = {};
    if (view.packed) {
      const auto* packs = reinterpret_cast<const Pack<S, V>*>(x);
      for (int64_t k = lane; k < view.width / V; k += lanes) {
        const Pack<S, V> pack = packs[k];
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const T value = from_storage<T>(pack.values[j]);
          sums[j] += value * value;
        }
      }
    } else {
      for (int64_t k = lane; k < view.width; k += lanes) {
        const T value = from_storage<T>(x[k * view.width_stride]);
        sums[0] += value * value;
      }
    }
#pragma unroll
    for (int j = 0; j < V; ++j) result += sums[j];
  });
  return result;
}

// The dtype of a gradient made before the loss scale is known, as csrc/gradient_dtype.h has it.
template <typename S>
struct GradientOf {
  using type = S;
};
template <>
struct GradientOf<Half> {
  using type = float;
};
template <>
struct GradientOf<BFloat16> {
  using type = float;
};

// The sum of |a_i - b_i|^2 over `size` entries, by one warp, in every thread of it.
template <typename T>
__device__ __forceinline__ T squared_difference(const T* a, const T* b, int64_t size, int lane) {
  T sums[4] = {};
  for (int64_t i = lane; i < size; i += 4 * kWarp) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (i + j * kWarp >= size) continue;
      const T d = a[i + j * kWarp] - b[i + j * kWarp];
      sums[j] += d * d;
    }
  }
  return warp_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The k-th pair (s, t) of classes in the order of rows, with s < t, or s <= t.
struct ClassPair {
  int s = 0, t;
  __device__ __forceinline__ ClassPair(int k, int classes, bool diagonal) : t(k) {
    const int first = diagonal ? 0 : 1;
#pragma unroll 1
    while (t >= classes - first - s) t -= classes - first - s++;
    t += s + first;
  }
};

// out's row = factor * view's row, by the same threads; zeros where the factor is 0, whatever the row holds. `out` has the dtype of a
// gradient of `view`.
template <typename Stored, typename T>
__device__ __forceinline__ void scale_row(const RowView& view, const RowView& out, int64_t row, T factor, int lane,
                                          int lanes) {
  const int64_t from = view.offset(row), to = out.offset(row);
  with_type<T, Stored>(view.dtype, [&](auto s) {
    using S = decltype(s);
    constexpr int V = kPack<S>;
    const S* x = static_cast<const S*>(view.data) + from;
    using G = typename GradientOf<S>::type;
    constexpr int P = kPack<G>;
    G* y = static_cast<G*>(out.data) + to;
    const auto scaled = [factor](S value, G* target) {
      to_storage(factor == T(0) ? T(0) : factor * from_storage<T>(value), target);
    };
    if (view.packed && out.packed) {
      for (int64_t k = lane; k < view.width / V; k += lanes) {
        const Pack<S, V> pack = reinterpret_cast<const Pack<S, V>*>(x)[k];
#pragma unroll
        for (int part = 0; part < V; part += P) {
          Pack<G, P> result;
#pragma unroll
          for (int j = 0; j < P; ++j) scaled(pack.values[part + j], &result.values[j]);
          store_pack(y + k * V + part, result);
        }
      }
    } else {
      for (int64_t k = lane; k < view.width; k += lanes) scaled(x[k * view.width_stride], y + k * out.width_stride);
    }
  });
}

}  // namespace fam_ext::gpu
