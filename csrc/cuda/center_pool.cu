// CUDA kernels of center_pool. One block works on one plane: it reduces columns and rows in one
// pass over them and then writes the plane.
#include <ATen/Dispatch.h>
#include <ATen/ops/add.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <tuple>

#include "line_gradients.cuh"

namespace d2ext {
namespace {

using at::Tensor;

constexpr int32_t kCenterThreads = 256;
// Rows that a thread loads at a time.
constexpr int32_t kCenterRows = 4;
// What a block gets without being asked for, less than 48 KiB by what the kernels declare
// themselves.
constexpr int64_t kCenterSharedBytes = 24 * 1024;

// A plane in packs: blockDim.x threads (`lanes`) to a row, thread row ty has rows ty, ty +
// blockDim.y, and so on.
struct Plane {
  int32_t height;
  int32_t width;
  int64_t begin;

  __device__ __forceinline__ Plane(int32_t height_in, int32_t width_in)
      : height(height_in),
        width(width_in),
        begin(static_cast<int64_t>(blockIdx.x) * height_in * width_in) {}

  __device__ __forceinline__ int64_t position(int32_t row, int32_t pack, int32_t pack_width) const {
    return begin + static_cast<int64_t>(row) * width + static_cast<int64_t>(pack) * pack_width;
  }

  // A pack of a map; -inf outside the plane.
  template <typename scalar_t, int V>
  __device__ __forceinline__ Pack<scalar_t, V> load(const scalar_t* __restrict__ map, int32_t row,
                                                    int32_t pack) const {
    if (row < height && (pack + 1) * V <= width) {
      return load_pack<scalar_t, V>(map + position(row, pack, V));
    }
    Pack<scalar_t, V> outside;
    outside.fill(lowest<arithmetic_t<scalar_t>>());
    return outside;
  }
};

template <typename scalar_t, int V>
__global__ void __launch_bounds__(kCenterThreads)
    center_kernel(const scalar_t* __restrict__ vertical, const scalar_t* __restrict__ horizontal,
                  scalar_t* __restrict__ out, int32_t height, int32_t width) {
  using P = Pack<scalar_t, V>;
  using acc_t = typename P::acc_t;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  acc_t* column_maxima = reinterpret_cast<acc_t*>(shared_bytes);  // (width,)
  acc_t* row_maxima = column_maxima + width;                      // (height,)
  __shared__ P partial[kCenterThreads];
  const Plane plane(height, width);
  const int32_t lanes = blockDim.x;
  const int32_t lane = threadIdx.x;
  const int32_t ty = threadIdx.y;
  const int32_t packs = width / V;

  for (int32_t begin = 0; begin < packs; begin += lanes) {
    const int32_t pack = begin + lane;
    P total;
    total.fill(lowest<acc_t>());
    for (int32_t first = ty; first < height; first += kCenterRows * blockDim.y) {
      P parts[kCenterRows];
#pragma unroll
      for (int r = 0; r < kCenterRows; ++r) {
        parts[r] = plane.load<scalar_t, V>(vertical, first + r * blockDim.y, pack);
      }
#pragma unroll
      for (int r = 0; r < kCenterRows; ++r) {
        total = maximum(total, parts[r]);
      }
    }
    partial[ty * lanes + lane] = total;
    __syncthreads();
    if (ty == 0 && pack < packs) {
      for (int32_t j = 1; j < blockDim.y; ++j) {
        total = maximum(total, partial[j * lanes + lane]);
      }
#pragma unroll
      for (int k = 0; k < V; ++k) {
        column_maxima[pack * V + k] = total[k];
      }
    }
    __syncthreads();
  }

  // All lanes of a warp take part in its shuffles, in rows below the last one too.
  for (int32_t begin = 0; begin < height; begin += kCenterRows * blockDim.y) {
    acc_t totals[kCenterRows];
#pragma unroll
    for (int r = 0; r < kCenterRows; ++r) {
      totals[r] = lowest<acc_t>();
    }
    for (int32_t pack = lane; pack < packs; pack += lanes) {
      P parts[kCenterRows];
#pragma unroll
      for (int r = 0; r < kCenterRows; ++r) {
        parts[r] = plane.load<scalar_t, V>(horizontal, begin + ty + r * blockDim.y, pack);
      }
#pragma unroll
      for (int r = 0; r < kCenterRows; ++r) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
          totals[r] = maximum(totals[r], parts[r][k]);
        }
      }
    }
    for (int32_t step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
      for (int r = 0; r < kCenterRows; ++r) {
        totals[r] = maximum(totals[r], __shfl_xor_sync(kAllLanes, totals[r], step, lanes));
      }
    }
#pragma unroll
    for (int r = 0; r < kCenterRows; ++r) {
      const int32_t row = begin + ty + r * blockDim.y;
      if (lane == 0 && row < height) {
        row_maxima[row] = totals[r];
      }
    }
  }
  __syncthreads();

  for (int32_t pack = lane; pack < packs; pack += lanes) {
    acc_t columns[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      columns[k] = column_maxima[pack * V + k];
    }
#pragma unroll 4
    for (int32_t row = ty; row < height; row += blockDim.y) {
      P result;
      result.fill(0);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        result.set(k, columns[k] + row_maxima[row]);
      }
      store_pack(out + plane.position(row, pack, V), result);
    }
  }
}

// A maximum and the index that holds it: among equal ones the highest. NaN is the greatest.
template <typename acc_t>
struct Holder {
  acc_t value;
  int32_t index;

  __device__ __forceinline__ void update(acc_t other, int32_t other_index) {
    const bool greater = takes_over(other, value);
    const bool less = takes_over(value, other);
    if (greater || (!less && other_index > index)) {
      value = other;
      index = other_index;
    }
  }
};

// The gradient's sum over a column (a row) goes to the element that holds its maximum, 0 to the
// others.
template <typename scalar_t, int V>
__global__ void __launch_bounds__(kCenterThreads)
    center_backward_kernel(const scalar_t* __restrict__ grad, const scalar_t* __restrict__ vertical,
                           const scalar_t* __restrict__ horizontal,
                           scalar_t* __restrict__ grad_vertical,
                           scalar_t* __restrict__ grad_horizontal, int32_t height, int32_t width) {
  using P = Pack<scalar_t, V>;
  using acc_t = typename P::acc_t;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  acc_t* column_sums = reinterpret_cast<acc_t*>(shared_bytes);  // (width,)
  acc_t* row_sums = column_sums + width;                        // (height,)
  int32_t* column_holders = reinterpret_cast<int32_t*>(row_sums + height);
  int32_t* row_holders = column_holders + width;
  __shared__ acc_t partial_values[kCenterThreads * V];
  __shared__ acc_t partial_sums[kCenterThreads * V];
  __shared__ int32_t partial_indices[kCenterThreads * V];
  const Plane plane(height, width);
  const int32_t lanes = blockDim.x;
  const int32_t lane = threadIdx.x;
  const int32_t ty = threadIdx.y;
  const int32_t packs = width / V;

  for (int32_t begin = 0; begin < packs; begin += lanes) {
    const int32_t pack = begin + lane;
    Holder<acc_t> holders[V];
    acc_t sums[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      holders[k] = {lowest<acc_t>(), -1};
      sums[k] = 0;
    }
    for (int32_t first = ty; first < height; first += kCenterRows * blockDim.y) {
      P parts[kCenterRows];
      P grads[kCenterRows];
#pragma unroll
      for (int r = 0; r < kCenterRows; ++r) {
        parts[r] = plane.load<scalar_t, V>(vertical, first + r * blockDim.y, pack);
        grads[r] = plane.load<scalar_t, V>(grad, first + r * blockDim.y, pack);
      }
#pragma unroll
      for (int r = 0; r < kCenterRows; ++r) {
        const int32_t row = first + r * blockDim.y;
        if (row < height) {
#pragma unroll
          for (int k = 0; k < V; ++k) {
            holders[k].update(parts[r][k], row);
            sums[k] += grads[r][k];
          }
        }
      }
    }
    // (V, threads): neighbours in different banks.
    const int32_t self = ty * lanes + lane;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      partial_values[k * kCenterThreads + self] = holders[k].value;
      partial_indices[k * kCenterThreads + self] = holders[k].index;
      partial_sums[k * kCenterThreads + self] = sums[k];
    }
    __syncthreads();
    if (ty == 0 && pack < packs) {
      for (int32_t j = 1; j < blockDim.y; ++j) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const int32_t other = k * kCenterThreads + j * lanes + lane;
          holders[k].update(partial_values[other], partial_indices[other]);
          sums[k] += partial_sums[other];
        }
      }
#pragma unroll
      for (int k = 0; k < V; ++k) {
        column_holders[pack * V + k] = holders[k].index;
        column_sums[pack * V + k] = sums[k];
      }
    }
    __syncthreads();
  }

  for (int32_t begin = 0; begin < height; begin += kCenterRows * blockDim.y) {
    Holder<acc_t> holders[kCenterRows];
    acc_t totals[kCenterRows];
#pragma unroll
    for (int r = 0; r < kCenterRows; ++r) {
      holders[r] = {lowest<acc_t>(), -1};
      totals[r] = 0;
    }
    for (int32_t pack = lane; pack < packs; pack += lanes) {
      P parts[kCenterRows];
      P grads[kCenterRows];
#pragma unroll
      for (int r = 0; r < kCenterRows; ++r) {
        parts[r] = plane.load<scalar_t, V>(horizontal, begin + ty + r * blockDim.y, pack);
        grads[r] = plane.load<scalar_t, V>(grad, begin + ty + r * blockDim.y, pack);
      }
#pragma unroll
      for (int r = 0; r < kCenterRows; ++r) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
          holders[r].update(parts[r][k], pack * V + k);
          totals[r] += grads[r][k];
        }
      }
    }
    for (int32_t step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
      for (int r = 0; r < kCenterRows; ++r) {
        const acc_t value = __shfl_xor_sync(kAllLanes, holders[r].value, step, lanes);
        const int32_t index = __shfl_xor_sync(kAllLanes, holders[r].index, step, lanes);
        totals[r] += __shfl_xor_sync(kAllLanes, totals[r], step, lanes);
        holders[r].update(value, index);
      }
    }
#pragma unroll
    for (int r = 0; r < kCenterRows; ++r) {
      const int32_t row = begin + ty + r * blockDim.y;
      if (lane == 0 && row < height) {
        row_holders[row] = holders[r].index;
        row_sums[row] = totals[r];
      }
    }
  }
  __syncthreads();

  for (int32_t pack = lane; pack < packs; pack += lanes) {
    int32_t holders[V];
    acc_t sums[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      holders[k] = column_holders[pack * V + k];
      sums[k] = column_sums[pack * V + k];
    }
#pragma unroll 4
    for (int32_t row = ty; row < height; row += blockDim.y) {
      const int64_t position = plane.position(row, pack, V);
      const int32_t holder = row_holders[row];
      const acc_t row_sum = row_sums[row];
      P own_vertical;
      P own_horizontal;
      own_vertical.fill(0);
      own_horizontal.fill(0);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        own_vertical.set(k, holders[k] == row ? sums[k] : acc_t(0));
        own_horizontal.set(k, holder == pack * V + k ? row_sum : acc_t(0));
      }
      store_pack(grad_vertical + position, own_vertical);
      store_pack(grad_horizontal + position, own_horizontal);
    }
  }
}

// Whether planes fit a block: dense (B, C, H, W), and room for what is kept of columns and rows.
bool planes_fit(const Tensor& x, at::MemoryFormat format, int64_t bytes_per_line) {
  return format == at::MemoryFormat::Contiguous && x.size(0) * x.size(1) <= INT32_MAX &&
         (x.size(2) + x.size(3)) * bytes_per_line <= kCenterSharedBytes;
}

template <int V>
dim3 center_threads(int64_t width) {
  const int32_t lanes = lanes_for(width / V);
  return dim3(lanes, kCenterThreads / lanes);
}

Tensor center_pool_cuda(const Tensor& vertical, const Tensor& horizontal) {
  check_map("center_pool", "vertical", vertical);
  check_same("center_pool", "vertical", vertical, "horizontal", horizontal);
  const c10::cuda::CUDAGuard guard(vertical.device());
  const auto format = format_of(vertical);
  Tensor out = empty_map(vertical);
  if (out.numel() == 0) {
    return out;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, out.scalar_type(), "center_pool_cuda", [&] {
        constexpr int kFull = kFullPack<scalar_t>;
        constexpr int64_t kBytes = sizeof(arithmetic_t<scalar_t>);
        if (!planes_fit(out, format, kBytes)) {
          at::add_out(out, at::amax(vertical, {2}, true), at::amax(horizontal, {3}, true));
          return;
        }
        const Tensor dense_vertical = vertical.contiguous();
        const Tensor dense_horizontal = horizontal.contiguous();
        const scalar_t* v = dense_vertical.const_data_ptr<scalar_t>();
        const scalar_t* h = dense_horizontal.const_data_ptr<scalar_t>();
        scalar_t* target = out.mutable_data_ptr<scalar_t>();
        const auto launch = [&](auto kernel, dim3 threads) {
          kernel<<<static_cast<uint32_t>(out.size(0) * out.size(1)), threads,
                   (out.size(2) + out.size(3)) * kBytes, c10::cuda::getCurrentCUDAStream()>>>(
              v, h, target, static_cast<int32_t>(out.size(2)), static_cast<int32_t>(out.size(3)));
        };
        if (full_packs<scalar_t>(out.size(3), v, h, target)) {
          launch(center_kernel<scalar_t, kFull>, center_threads<kFull>(out.size(3)));
        } else {
          launch(center_kernel<scalar_t, 1>, center_threads<1>(out.size(3)));
        }
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
  return out;
}

// Gradient of the maximum along `axis`, for maps that do not fit a block: the whole sum arrives at
// the end of a scan from the far side.
template <typename scalar_t>
Tensor maximum_backward(const Tensor& grad, const Tensor& x, at::MemoryFormat format,
                        int64_t axis) {
  const Tensor dense = x.contiguous(format);
  Tensor arriving = at::zeros_like(dense);
  arriving.narrow(axis, 0, 1).copy_(at::sum(grad, {axis}, true));
  Tensor grad_x = at::empty_like(dense);
  launch_scan_backward<scalar_t>(
      dense.const_data_ptr<scalar_t>(), arriving.const_data_ptr<scalar_t>(),
      grad_x.mutable_data_ptr<scalar_t>(), lines_of(x, format, axis), true);
  return grad_x;
}

std::tuple<Tensor, Tensor> center_pool_backward_cuda(const Tensor& grad, const Tensor& vertical,
                                                     const Tensor& horizontal) {
  check_map("center_pool_backward", "vertical", vertical);
  check_same("center_pool_backward", "vertical", vertical, "horizontal", horizontal);
  check_same("center_pool_backward", "vertical", vertical, "grad", grad);
  const c10::cuda::CUDAGuard guard(vertical.device());
  if (vertical.numel() == 0) {
    return {empty_map(vertical), empty_map(horizontal)};
  }
  Tensor grad_vertical;
  Tensor grad_horizontal;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, vertical.scalar_type(), "center_pool_backward_cuda", [&] {
        constexpr int kFull = kFullPack<scalar_t>;
        constexpr int64_t kBytes = sizeof(arithmetic_t<scalar_t>) + sizeof(int32_t);
        const auto format = format_of(vertical);
        const auto other_format = format_of(horizontal);
        if (format != other_format || !planes_fit(vertical, format, kBytes)) {
          grad_vertical = maximum_backward<scalar_t>(grad, vertical, format, 2);
          grad_horizontal = maximum_backward<scalar_t>(grad, horizontal, other_format, 3);
          return;
        }
        grad_vertical = empty_map(vertical);
        grad_horizontal = empty_map(horizontal);
        const Tensor dense_grad = grad.contiguous();
        const Tensor dense_vertical = vertical.contiguous();
        const Tensor dense_horizontal = horizontal.contiguous();
        const scalar_t* g = dense_grad.const_data_ptr<scalar_t>();
        const scalar_t* v = dense_vertical.const_data_ptr<scalar_t>();
        const scalar_t* h = dense_horizontal.const_data_ptr<scalar_t>();
        scalar_t* own_vertical = grad_vertical.mutable_data_ptr<scalar_t>();
        scalar_t* own_horizontal = grad_horizontal.mutable_data_ptr<scalar_t>();
        const int64_t height = vertical.size(2);
        const int64_t width = vertical.size(3);
        const auto launch = [&](auto kernel, dim3 threads) {
          kernel<<<static_cast<uint32_t>(vertical.size(0) * vertical.size(1)), threads,
                   (height + width) * kBytes, c10::cuda::getCurrentCUDAStream()>>>(
              g, v, h, own_vertical, own_horizontal, static_cast<int32_t>(height),
              static_cast<int32_t>(width));
        };
        if (full_packs<scalar_t>(width, g, v, h, own_vertical, own_horizontal)) {
          launch(center_backward_kernel<scalar_t, kFull>, center_threads<kFull>(width));
        } else {
          launch(center_backward_kernel<scalar_t, 1>, center_threads<1>(width));
        }
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
  return {grad_vertical, grad_horizontal};
}

}  // namespace

TORCH_LIBRARY_IMPL(d2ext, CUDA, m) {
  m.impl("center_pool", center_pool_cuda);
  m.impl("center_pool_backward", center_pool_backward_cuda);
}

}  // namespace d2ext
