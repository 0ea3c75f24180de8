// CUDA kernels of corner_pool and corner_pool_pair.
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <tuple>

#include "line_gradients.cuh"

namespace d2ext {
namespace {

using at::Tensor;

struct Cuda {
  template <typename scalar_t>
  static void scan(const scalar_t* x, const scalar_t* addend, scalar_t* out, const Lines& lines,
                   bool reverse) {
    addend == nullptr ? launch_scan<false>(x, addend, out, lines, reverse)
                      : launch_scan<true>(x, addend, out, lines, reverse);
  }

  template <typename scalar_t>
  static void scan_backward(const scalar_t* x, const scalar_t* grad, scalar_t* grad_x,
                            const Lines& lines, bool reverse) {
    launch_scan_backward(x, grad, grad_x, lines, reverse);
  }
};

// ---------------------------------------------------------------- pair

constexpr int32_t kPairThreads = 512;
constexpr int32_t kPairRows = 8;
// With so many planes, several share a multiprocessor: smaller blocks, of which one loads while
// another stores.
constexpr int64_t kManyPlanes = 256;

// One block pools one plane. A thread has kPairRows adjacent rows and, of each, a pack. Columns are
// scanned as in column_scan_kernel, rows as in row_scan_kernel. A plane of more than blockDim.x
// (`lanes`) packs to a row is gone through in steps along the rows, one of more than blockDim.y *
// kPairRows rows in steps along the columns; not both.
template <typename scalar_t, int V, bool kReverse>
__global__ void __launch_bounds__(kPairThreads)
    pair_kernel(const scalar_t* __restrict__ vertical, const scalar_t* __restrict__ horizontal,
                scalar_t* __restrict__ out, int32_t height, int32_t width) {
  using P = Pack<scalar_t, V>;
  using acc_t = typename P::acc_t;
  __shared__ P totals[kPairThreads];
  const int32_t lanes = blockDim.x;
  const int32_t lane = threadIdx.x;
  const int32_t ty = threadIdx.y;
  const int32_t packs = width / V;
  const int32_t chunk = blockDim.y * kPairRows;
  const bool long_columns = height > chunk;
  const int64_t plane = static_cast<int64_t>(blockIdx.x) * height * width;
  acc_t carry[kPairRows];  // of each row
  P column_carry;
#pragma unroll
  for (int r = 0; r < kPairRows; ++r) {
    carry[r] = lowest<acc_t>();
  }
  column_carry.fill(lowest<acc_t>());

  const int32_t steps = long_columns ? (height - 1) / chunk + 1 : (packs - 1) / lanes + 1;
  for (int32_t step = 0; step < steps; ++step) {
    const int32_t first = (long_columns ? step * chunk : 0) + ty * kPairRows;  // in scan order
    const int32_t index = (long_columns ? 0 : step * lanes) + lane;
    const int32_t offset = (kReverse ? packs - 1 - index : index) * V;
    const int32_t count = index < packs ? height - first : 0;  // rows from the first on
    const int64_t start =
        plane + static_cast<int64_t>(kReverse ? height - 1 - first : first) * width + offset;
    const int64_t row_step = kReverse ? -width : width;
    P columns[kPairRows];
    P rows[kPairRows];
    int64_t place = start;
#pragma unroll
    for (int r = 0; r < kPairRows; ++r) {
      columns[r].fill(lowest<acc_t>());
      rows[r].fill(lowest<acc_t>());
      if (r < count) {
        columns[r] = load_pack<scalar_t, V>(vertical + place);
        rows[r] = load_pack<scalar_t, V>(horizontal + place);
      }
      place += row_step;
    }
    P total = columns[0];
#pragma unroll
    for (int r = 1; r < kPairRows; ++r) {
      total = maximum(total, columns[r]);
    }
    __syncthreads();  // the totals of the step before have been read
    totals[ty * lanes + lane] = total;

    acc_t row_totals[kPairRows];
    acc_t before[kPairRows];
#pragma unroll
    for (int r = 0; r < kPairRows; ++r) {
      row_totals[r] = rows[r][0];
#pragma unroll
      for (int k = 1; k < V; ++k) {
        row_totals[r] = maximum(row_totals[r], rows[r][k]);
      }
    }
    scan_lanes(row_totals, before, lanes, lane);
    __syncthreads();
    place = start;
    P above = column_carry;
    for (int32_t j = 0; j < ty; ++j) {
      above = maximum(above, totals[j * lanes + lane]);
    }
    if (long_columns) {
      column_carry = above;
      for (int32_t j = ty; j < blockDim.y; ++j) {
        column_carry = maximum(column_carry, totals[j * lanes + lane]);
      }
    }
#pragma unroll
    for (int r = 0; r < kPairRows; ++r) {
      above = maximum(above, columns[r]);
      acc_t running = maximum(carry[r], before[r]);
      if (!long_columns && step + 1 < steps) {
        carry[r] = maximum(carry[r], __shfl_sync(kAllLanes, row_totals[r], lanes - 1, lanes));
      }
      P result;
      result.fill(0);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const int place = kReverse ? V - 1 - k : k;
        running = maximum(running, rows[r][place]);
        result.set(place, above[place] + running);
      }
      if (r < count) {
        store_pack(out + place, result);
      }
      place += row_step;
    }
  }
}

// Whether pair_kernel was launched: it takes planes in full packs that are not both wide and high.
template <typename scalar_t>
bool launch_pair(const Tensor& vertical, const Tensor& horizontal, Tensor& out, bool reverse) {
  constexpr int kFull = kFullPack<scalar_t>;
  const scalar_t* v = vertical.const_data_ptr<scalar_t>();
  const scalar_t* h = horizontal.const_data_ptr<scalar_t>();
  scalar_t* target = out.mutable_data_ptr<scalar_t>();
  const int64_t planes = out.size(0) * out.size(1);
  const int64_t height = out.size(2);
  const int64_t width = out.size(3);
  if (!full_packs<scalar_t>(width, v, h, target) || std::max(height, width) > INT32_MAX / 2 ||
      planes > INT32_MAX) {
    return false;
  }
  const int32_t lanes = lanes_for(width / kFull);
  const int64_t packs = width / kFull;
  // Whole warps: they exchange through shuffles.
  const int64_t warp_rows = 32 / lanes;
  int64_t ty = (height + kPairRows - 1) / kPairRows;
  ty = (ty + warp_rows - 1) / warp_rows * warp_rows;
  if (packs <= lanes) {
    ty = std::min<int64_t>(ty, (planes >= kManyPlanes ? kPairThreads / 2 : kPairThreads) / lanes);
  } else if (ty * lanes > kPairThreads) {
    return false;
  }
  const auto kernel =
      reverse ? pair_kernel<scalar_t, kFull, true> : pair_kernel<scalar_t, kFull, false>;
  kernel<<<static_cast<uint32_t>(planes), dim3(lanes, static_cast<uint32_t>(ty)), 0,
           c10::cuda::getCurrentCUDAStream()>>>(v, h, target, static_cast<int32_t>(height),
                                                static_cast<int32_t>(width));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return true;
}

Tensor corner_pool_pair_cuda(const Tensor& vertical, const Tensor& horizontal, bool reverse) {
  check_map("corner_pool_pair", "vertical", vertical);
  check_same("corner_pool_pair", "vertical", vertical, "horizontal", horizontal);
  const c10::cuda::CUDAGuard guard(vertical.device());
  Tensor out = empty_map(vertical);
  if (out.numel() == 0) {
    return out;
  }
  const auto format = format_of(vertical);
  const Tensor v = vertical.contiguous(format);
  const Tensor h = horizontal.contiguous(format);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, out.scalar_type(), "corner_pool_pair_cuda", [&] {
        if (format == at::MemoryFormat::ChannelsLast ||
            !launch_pair<scalar_t>(v, h, out, reverse)) {
          scalar_t* target = out.mutable_data_ptr<scalar_t>();
          Cuda::scan<scalar_t>(v.const_data_ptr<scalar_t>(), nullptr, target,
                               lines_of(out, format, 2), reverse);
          Cuda::scan<scalar_t>(h.const_data_ptr<scalar_t>(), target, target,
                               lines_of(out, format, 3), reverse);
        }
      });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(d2ext, CUDA, m) {
  m.impl("corner_pool", corner_pool<Cuda>);
  m.impl("corner_pool_backward", corner_pool_backward<Cuda>);
  m.impl("corner_pool_pair", corner_pool_pair_cuda);
  m.impl("corner_pool_pair_backward", corner_pool_pair_backward<Cuda>);
}

}  // namespace d2ext
