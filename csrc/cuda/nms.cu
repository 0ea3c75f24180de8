// Non-maximum suppression over fixed slots (see d2ext/layers/nms.py). Greedy: which boxes overlap,
// as bits, then one block for each group decides, 64 boxes at a time. Fast: a warp for each box.
// Nothing waits for the host.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "../check.h"

namespace d2ext {
namespace {

using at::Tensor;
using Bits = unsigned long long;

constexpr int32_t kBits = 64;
constexpr int32_t kWarp = 32;
constexpr int32_t kScanThreads = 256;
constexpr int32_t kScanWarps = kScanThreads / kWarp;
// Words of a row that fit into the shared memory of every GPU.
constexpr int64_t kMaxWords = 4096;

// Products rounded by themselves, as on the CPU, not fused with a sum.
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }

template <typename T>
struct Box {
  T x1, y1, x2, y2;
};

template <typename T>
__device__ __forceinline__ bool overlap(const Box<T>& a, const Box<T>& b, T threshold) {
  const T width = max(min(a.x2, b.x2) - max(a.x1, b.x1), T(0));
  const T height = max(min(a.y2, b.y2) - max(a.y1, b.y1), T(0));
  const T common = product(width, height);
  const T areas = product(a.x2 - a.x1, a.y2 - a.y1) + product(b.x2 - b.x1, b.y2 - b.y1);
  return common / (areas - common) > threshold;
}

// Bit b of word w of a row: whether its box overlaps box 64 w + b, which comes later. Words are
// left out where nothing will read them, or only bits of boxes that are not valid.
template <typename T>
__global__ void __launch_bounds__(kBits)
    overlaps_kernel(const Box<T>* boxes, const bool* valid, int32_t groups, int32_t count,
                    int32_t words, T threshold, Bits* overlaps) {
  if (blockIdx.x < blockIdx.y) {
    return;
  }
  __shared__ Box<T> columns[kBits];
  const auto lane = static_cast<int32_t>(threadIdx.x);
  const int32_t first = static_cast<int32_t>(blockIdx.x) * kBits;
  const int32_t row = static_cast<int32_t>(blockIdx.y) * kBits + lane;
  for (int32_t group = blockIdx.z; group < groups; group += gridDim.z) {
    const int64_t base = static_cast<int64_t>(group) * count;
    const bool row_valid = row < count && valid[base + row];
    const bool column_valid = first + lane < count && valid[base + first + lane];
    // Both also keep this round's boxes from being written while the last round reads.
    const int any_row = __syncthreads_or(row_valid);
    const int any_column = __syncthreads_or(column_valid);
    if (!any_row || !any_column) {
      continue;
    }
    if (first + lane < count) {
      columns[lane] = boxes[base + first + lane];
    }
    __syncthreads();
    if (!row_valid) {
      continue;
    }
    const Box<T> own = boxes[base + row];
    const int32_t end = min(kBits, count - first);
    Bits word = 0;
    for (int32_t i = blockIdx.x == blockIdx.y ? lane + 1 : 0; i < end; ++i) {
      word |= overlap(own, columns[i], threshold) ? Bits(1) << i : Bits(0);
    }
    overlaps[(base + row) * words + blockIdx.x] = word;
  }
}

__global__ void __launch_bounds__(kScanThreads)
    scan_kernel(const Bits* overlaps, const bool* valid, int32_t count, int32_t words, bool* keep) {
  extern __shared__ Bits removed[];
  __shared__ Bits diagonal[kBits];
  __shared__ uint32_t halves[2];
  __shared__ Bits kept;
  const auto lane = static_cast<int32_t>(threadIdx.x);
  const int64_t base = static_cast<int64_t>(blockIdx.x) * count;
  for (int32_t w = lane; w < words; w += kScanThreads) {
    removed[w] = 0;
  }
  for (int32_t w = 0; w < words; ++w) {
    const int32_t row = w * kBits + lane;
    if (lane < kBits) {
      const bool own = row < count && valid[base + row];
      diagonal[lane] = own ? overlaps[(base + row) * words + w] : 0;
      const uint32_t half = __ballot_sync(0xffffffffu, own);
      if (lane % 32 == 0) {
        halves[lane / 32] = half;
      }
    }
    __syncthreads();
    if (lane == 0) {
      Bits left = (static_cast<Bits>(halves[1]) << 32 | halves[0]) & ~removed[w];
      Bits best = 0;
      while (left != 0) {
        const int i = __ffsll(static_cast<long long>(left)) - 1;
        best |= Bits(1) << i;
        left &= ~(diagonal[i] | Bits(1) << i);
      }
      kept = best;
    }
    __syncthreads();
    const Bits best = kept;
    if (lane < kBits && row < count) {
      keep[base + row] = (best >> lane & 1) != 0;
    }
    const int32_t rest = best == 0 ? 0 : words - w - 1;
    for (int32_t i = lane; i < rest * kBits; i += kScanThreads) {
      const int32_t other = w + 1 + i % rest;
      if (best >> (i / rest) & 1) {
        atomicOr(&removed[other], overlaps[(base + w * kBits + i / rest) * words + other]);
      }
    }
    __syncthreads();
  }
}

// Whether a box overlaps one that comes before, which may be overlapped itself. A warp for each
// box.
template <typename T>
__global__ void __launch_bounds__(kScanThreads)
    overlapped_kernel(const Box<T>* boxes, int64_t total, int32_t count, T threshold,
                      bool* overlapped) {
  const int64_t box = static_cast<int64_t>(blockIdx.x) * kScanWarps + threadIdx.x / kWarp;
  if (box >= total) {
    return;
  }
  const auto lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  const auto place = static_cast<int32_t>(box % count);
  const Box<T>* group = boxes + (box - place);
  const Box<T> own = group[place];
  bool found = false;
  for (int32_t first = 0; first < place && !found; first += kWarp) {
    const int32_t other = first + lane;
    found = __any_sync(0xffffffffu, other < place && overlap(group[other], own, threshold)) != 0;
  }
  if (lane == 0) {
    overlapped[box] = found;
  }
}

void check_boxes(const char* name, const Tensor& boxes) {
  D2EXT_CHECK_VALUE(
      boxes.dim() >= 2 && boxes.size(-1) == 4 && at::isFloatingType(boxes.scalar_type()), name,
      ": boxes must be floating point of shape (..., N, 4), got ", boxes.scalar_type(),
      " of shape ", boxes.sizes());
}

Tensor overlapped_cuda(const Tensor& boxes, double threshold) {
  check_boxes("overlapped", boxes);
  const c10::cuda::CUDAGuard guard(boxes.device());
  const auto type = at::toOpMathType(boxes.scalar_type());
  const Tensor held = boxes.to(type).contiguous();
  const int64_t count = boxes.size(-2);
  Tensor overlapped =
      at::empty(boxes.sizes().slice(0, boxes.dim() - 1), boxes.options().dtype(at::kBool));
  if (overlapped.numel() == 0) {
    return overlapped;
  }
  const int64_t total = overlapped.numel();
  const int64_t blocks = (total + kScanWarps - 1) / kScanWarps;
  D2EXT_CHECK_VALUE(count <= std::numeric_limits<int32_t>::max() - kWarp &&
                        blocks <= std::numeric_limits<int32_t>::max(),
                    "overlapped: too many boxes for a GPU: ", total / count, " groups of ", count);
  AT_DISPATCH_FLOATING_TYPES(type, "overlapped_cuda", [&] {
    overlapped_kernel<scalar_t>
        <<<static_cast<uint32_t>(blocks), kScanThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
            reinterpret_cast<const Box<scalar_t>*>(held.const_data_ptr<scalar_t>()), total,
            static_cast<int32_t>(count), static_cast<scalar_t>(threshold),
            overlapped.mutable_data_ptr<bool>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return overlapped;
}

Tensor nms_cuda(const Tensor& boxes, const Tensor& valid, double threshold) {
  check_boxes("nms", boxes);
  D2EXT_CHECK_VALUE(
      valid.scalar_type() == at::kBool && valid.sizes() == boxes.sizes().slice(0, boxes.dim() - 1),
      "nms: valid must be bool, one for each box, got ", valid.scalar_type(), " of shape ",
      valid.sizes());
  D2EXT_CHECK_VALUE(valid.device() == boxes.device(), "nms: boxes are on ", boxes.device(),
                    " but valid is on ", valid.device());
  const c10::cuda::CUDAGuard guard(boxes.device());
  const auto type = at::toOpMathType(boxes.scalar_type());
  const Tensor held_boxes = boxes.to(type).contiguous();
  const Tensor held_valid = valid.contiguous();
  Tensor keep = at::empty(valid.sizes(), valid.options());
  const int64_t count = boxes.size(-2);
  if (keep.numel() == 0) {
    return keep;
  }
  const int64_t groups = keep.numel() / count;
  const int64_t words = (count + kBits - 1) / kBits;
  D2EXT_CHECK_VALUE(words <= kMaxWords && groups <= std::numeric_limits<int32_t>::max(),
                    "nms: too many boxes for a GPU: ", groups, " groups of ", count);
  const Tensor overlaps = at::empty({groups, count, words}, boxes.options().dtype(at::kLong));
  auto* bits = reinterpret_cast<Bits*>(overlaps.mutable_data_ptr<int64_t>());
  const auto stream = at::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES(type, "nms_cuda", [&] {
    // The greatest number of the type that is not above it.
    auto limit = static_cast<scalar_t>(threshold);
    if (static_cast<double>(limit) > threshold) {
      limit = std::nextafter(limit, -std::numeric_limits<scalar_t>::infinity());
    }
    const dim3 grid(static_cast<uint32_t>(words), static_cast<uint32_t>(words),
                    static_cast<uint32_t>(std::min<int64_t>(groups, 65535)));
    overlaps_kernel<scalar_t><<<grid, kBits, 0, stream>>>(
        reinterpret_cast<const Box<scalar_t>*>(held_boxes.const_data_ptr<scalar_t>()),
        held_valid.const_data_ptr<bool>(), static_cast<int32_t>(groups),
        static_cast<int32_t>(count), static_cast<int32_t>(words), limit, bits);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  scan_kernel<<<static_cast<uint32_t>(groups), kScanThreads, words * sizeof(Bits), stream>>>(
      bits, held_valid.const_data_ptr<bool>(), static_cast<int32_t>(count),
      static_cast<int32_t>(words), keep.mutable_data_ptr<bool>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return keep;
}

}  // namespace

TORCH_LIBRARY_IMPL(d2ext, CUDA, m) {
  m.impl("nms", nms_cuda);
  m.impl("overlapped", overlapped_cuda);
}

}  // namespace d2ext
