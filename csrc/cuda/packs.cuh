// Elements in packs of up to 16 bytes, which one instruction loads or stores, and the maximum that
// keeps NaN.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <limits>
#include <type_traits>

namespace d2ext {

// Arithmetic type of an element type: float64 for float64, else float32.
template <typename scalar_t>
using arithmetic_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename scalar_t>
constexpr int kFullPack = 16 / sizeof(scalar_t);

template <typename T>
__device__ __forceinline__ T lowest() {
  return -std::numeric_limits<T>::infinity();
}

// The greater one; NaN if one is NaN.
__device__ __forceinline__ float maximum(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return b > a || b != b ? b : a;
#endif
}

__device__ __forceinline__ double maximum(double a, double b) { return b > a || b != b ? b : a; }

// Whether x takes over from the running maximum m: strictly greater, NaN being the greatest.
template <typename T>
__device__ __forceinline__ bool takes_over(T x, T m) {
  return m == m && !(x <= m);
}

// Pairs of 16-bit elements stay together in 32-bit registers; left to itself the compiler takes a
// register for each element.
template <typename scalar_t, int V>
constexpr bool kInPairs = sizeof(scalar_t) == 2 && V % 2 == 0;

__device__ __forceinline__ float from_bits(c10::BFloat16, uint32_t bits) {
  return __uint_as_float(bits << 16);
}
__device__ __forceinline__ float from_bits(c10::Half, uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
__device__ __forceinline__ uint32_t to_bits(c10::BFloat16, float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
__device__ __forceinline__ uint32_t to_bits(c10::Half, float value) {
  return __half_as_ushort(__float2half_rn(value));
}

template <typename scalar_t, int V, bool kPairs = kInPairs<scalar_t, V>>
struct alignas(sizeof(scalar_t) * V) Pack {
  using acc_t = arithmetic_t<scalar_t>;

  scalar_t values[V];

  __device__ __forceinline__ acc_t operator[](int i) const { return static_cast<acc_t>(values[i]); }
  __device__ __forceinline__ void set(int i, acc_t value) {
    values[i] = static_cast<scalar_t>(value);
  }
  __device__ __forceinline__ void fill(acc_t value) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      set(i, value);
    }
  }
};

template <typename scalar_t, int V>
struct alignas(sizeof(scalar_t) * V) Pack<scalar_t, V, true> {
  using acc_t = float;

  uint32_t words[V / 2];

  __device__ __forceinline__ float operator[](int i) const {
    return from_bits(scalar_t(), i % 2 == 0 ? words[i / 2] & 0xffffu : words[i / 2] >> 16);
  }
  // The other element of the pair must have a value.
  __device__ __forceinline__ void set(int i, float value) {
    const uint32_t bits = to_bits(scalar_t(), value);
    words[i / 2] =
        i % 2 == 0 ? (words[i / 2] & 0xffff0000u) | bits : (words[i / 2] & 0xffffu) | bits << 16;
  }
  __device__ __forceinline__ void fill(float value) {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      words[i] = to_bits(scalar_t(), value) * 0x10001u;
    }
  }
};

template <typename scalar_t, int V>
__device__ __forceinline__ Pack<scalar_t, V> load_pack(const scalar_t* source) {
  return *reinterpret_cast<const Pack<scalar_t, V>*>(source);
}

template <typename scalar_t, int V>
__device__ __forceinline__ void store_pack(scalar_t* target, const Pack<scalar_t, V>& pack) {
  *reinterpret_cast<Pack<scalar_t, V>*>(target) = pack;
}

__device__ __forceinline__ uint32_t maximum_of_pairs(c10::BFloat16, uint32_t a, uint32_t b) {
  const __nv_bfloat162 result = __hmax2_nan(reinterpret_cast<const __nv_bfloat162&>(a),
                                            reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(result);
}
__device__ __forceinline__ uint32_t maximum_of_pairs(c10::Half, uint32_t a, uint32_t b) {
  const __half2 result =
      __hmax2_nan(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(result);
}

// Element by element.
template <typename scalar_t, int V>
__device__ __forceinline__ Pack<scalar_t, V> maximum(const Pack<scalar_t, V>& a,
                                                     const Pack<scalar_t, V>& b) {
  Pack<scalar_t, V> result;
  if constexpr (kInPairs<scalar_t, V>) {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      result.words[i] = maximum_of_pairs(scalar_t(), a.words[i], b.words[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      result.set(i, maximum(a[i], b[i]));
    }
  }
  return result;
}

// Whether memory can be read and written in full packs: runs of `run` elements, each beginning on a
// multiple of 16 bytes.
template <typename scalar_t, typename... Pointers>
bool full_packs(int64_t run, const Pointers*... pointers) {
  return run % kFullPack<scalar_t> == 0 &&
         ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace d2ext
