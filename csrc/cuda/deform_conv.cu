// Deformable convolution (arXiv 1811.11168): the samples of all taps as a matrix, in the dtype of
// the arguments, and matrix products, in half precision by tensor cores. Eight lanes read one
// cell's channels together. Letters and layout are those of deform_conv.h.
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <tuple>

#include "../deform_conv.h"
#include "packs.cuh"

namespace d2ext {
namespace {

constexpr int kLanes = 8;               // threads that share a sample's place
constexpr int kChannels = kDeformPack;  // channels of a thread at a time
constexpr int kThreads = 256;
// Bytes of samples in a slice. An H100 has 50 MB of second-level cache.
constexpr int64_t kSliceBytes = int64_t(24) << 20;

// The values of eight channels in the four cells around a place; 0 outside.
template <typename scalar_t>
struct Corners {
  using pack_t = Pack<scalar_t, kChannels>;
  pack_t top_left, top_right, bottom_left, bottom_right;

  __device__ Corners(const scalar_t* source, const DeformSample& at, const DeformShape& shape) {
    const int64_t down = int64_t(shape.width) * shape.channels;
    top_left = load(source, at.top && at.left);
    top_right = load(source + shape.channels, at.top && at.right);
    bottom_left = load(source + down, at.bottom && at.left);
    bottom_right = load(source + down + shape.channels, at.bottom && at.right);
  }

  __device__ static pack_t load(const scalar_t* source, bool inside) {
    pack_t pack;
    if (inside) {
      pack = load_pack<scalar_t, kChannels>(source);
    } else {
      pack.fill(0.f);
    }
    return pack;
  }

  __device__ float value(int i, const DeformSample& at) const {
    const float above = top_left[i] + at.dx * (top_right[i] - top_left[i]);
    const float below = bottom_left[i] + at.dx * (bottom_right[i] - bottom_left[i]);
    return above + at.dy * (below - above);
  }
};

// Which sample a thread works at: eight lanes at one. Of a grid's axes, x goes over the rows of a
// slice and y over groups of offsets and taps.
template <typename scalar_t>
struct Item {
  int slice_row, lane, tap, offset_group;
  int64_t mask_index;
  const scalar_t* image;
  float y, x;

  __device__ Item(const DeformShape& shape, const scalar_t* x_data, const scalar_t* offset,
                  int index, int first_row)
      : slice_row(index), lane(threadIdx.x % kLanes) {
    tap = blockIdx.y % shape.taps;
    offset_group = blockIdx.y / shape.taps;
    const int row = first_row + slice_row, cells = shape.out_height * shape.out_width;
    const int cell = row % cells, out_y = cell / shape.out_width, out_x = cell % shape.out_width;
    mask_index = int64_t(row) * gridDim.y + blockIdx.y;
    y = out_y * shape.stride - shape.padding + tap / shape.kernel_width * shape.dilation +
        static_cast<float>(offset[2 * mask_index]);
    x = out_x * shape.stride - shape.padding + tap % shape.kernel_width * shape.dilation +
        static_cast<float>(offset[2 * mask_index + 1]);
    image = x_data + int64_t(row / cells) * shape.height * shape.width * shape.channels;
  }

  // Where a channel's sample is in the matrix (G, rows, K, C / G) of a slice.
  __device__ int64_t place(const DeformShape& shape, int channel, int rows) const {
    if (shape.groups == 1) {
      return (int64_t(slice_row) * shape.taps + tap) * shape.channels + channel;
    }
    const int in_group = shape.channels / shape.groups, group = channel / in_group;
    return ((int64_t(group) * rows + slice_row) * shape.taps + tap) * in_group + channel % in_group;
  }
};

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(const scalar_t* __restrict__ x, const scalar_t* __restrict__ offset,
                  const scalar_t* __restrict__ mask, scalar_t* __restrict__ samples,
                  DeformShape shape, int first_row, int rows) {
  const int index = (blockIdx.x * kThreads + threadIdx.x) / kLanes;
  if (index >= rows) {
    return;
  }
  const Item<scalar_t> item(shape, x, offset, index, first_row);
  const DeformSample at(shape, item.y, item.x);
  const float weight = mask == nullptr ? 1.f : static_cast<float>(mask[item.mask_index]);
  const int in_group = shape.channels / shape.offset_groups;
  const int first = item.offset_group * in_group;
  for (int c = first + item.lane * kChannels; c < first + in_group; c += kLanes * kChannels) {
    Pack<scalar_t, kChannels> out;
    if (at.broken || weight != weight) {
      out.fill(std::numeric_limits<float>::quiet_NaN());
    } else if (at.outside) {
      out.fill(0.f);
    } else {
      const Corners<scalar_t> corners(item.image + at.cell * shape.channels + c, at, shape);
      out.fill(0.f);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        out.set(i, weight * corners.value(i, at));
      }
    }
    store_pack(samples + item.place(shape, c, rows), out);
  }
}

// Adds up gradients of the input, in float32, in no fixed order.
struct FloatSum {
  float* sum;

  __device__ void add(int64_t place, const float (&values)[kChannels], float factor) const {
#pragma unroll
    for (int i = 0; i < kChannels; i += 4) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
      atomicAdd(reinterpret_cast<float4*>(sum + place + i),
                make_float4(factor * values[i], factor * values[i + 1], factor * values[i + 2],
                            factor * values[i + 3]));
#else
      for (int j = i; j < i + 4; ++j) {
        atomicAdd(sum + place + j, factor * values[j]);
      }
#endif
    }
  }
};

// In multiples of 1 / scale: whole numbers, whose sum does not depend on the order.
struct FixedSum {
  unsigned long long* sum;
  const float* scale;

  __device__ void add(int64_t place, const float (&values)[kChannels], float factor) const {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const long long value = __float2ll_rn(factor * values[i] * *scale);
      atomicAdd(sum + place + i, static_cast<unsigned long long>(value));
    }
  }
};

template <typename scalar_t, typename sum_t>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(const scalar_t* __restrict__ x, const scalar_t* __restrict__ offset,
                    const scalar_t* __restrict__ mask, const scalar_t* __restrict__ grad_samples,
                    scalar_t* __restrict__ samples, sum_t grad_x,
                    scalar_t* __restrict__ grad_offset, scalar_t* __restrict__ grad_mask,
                    DeformShape shape, int first_row, int rows) {
  const int index = (blockIdx.x * kThreads + threadIdx.x) / kLanes;
  const bool active = index < rows;  // all lanes stay for the sums over them
  const Item<scalar_t> item(shape, x, offset, active ? index : 0, first_row);
  const DeformSample at(shape, item.y, item.x);
  const float weight = mask == nullptr ? 1.f : static_cast<float>(mask[item.mask_index]);
  const bool broken = at.broken || weight != weight;
  const int in_group = shape.channels / shape.offset_groups;
  const int first = item.offset_group * in_group;
  const int64_t start = (item.image - x) + at.cell * shape.channels;
  const int64_t down = int64_t(shape.width) * shape.channels;
  float sum_y = 0.f, sum_x = 0.f, sum_mask = 0.f;
  for (int c = first + item.lane * kChannels; active && c < first + in_group;
       c += kLanes * kChannels) {
    const int64_t place = item.place(shape, c, rows);
    Pack<scalar_t, kChannels> out;
    out.fill(broken ? std::numeric_limits<float>::quiet_NaN() : 0.f);
    if (!broken && !at.outside) {
      const Corners<scalar_t> corners(x + start + c, at, shape);
      const auto grad = load_pack<scalar_t, kChannels>(grad_samples + place);
      float values[kChannels];
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        const float above = corners.top_right[i] - corners.top_left[i];
        const float below = corners.bottom_right[i] - corners.bottom_left[i];
        const float left = corners.bottom_left[i] - corners.top_left[i];
        const float right = corners.bottom_right[i] - corners.top_right[i];
        const float value = corners.value(i, at);
        out.set(i, weight * value);
        values[i] = weight * grad[i];
        sum_mask += grad[i] * value;
        sum_y += values[i] * (left + at.dx * (right - left));
        sum_x += values[i] * (above + at.dy * (below - above));
      }
      if (at.top && at.left) {
        grad_x.add(start + c, values, (1.f - at.dy) * (1.f - at.dx));
      }
      if (at.top && at.right) {
        grad_x.add(start + c + shape.channels, values, (1.f - at.dy) * at.dx);
      }
      if (at.bottom && at.left) {
        grad_x.add(start + c + down, values, at.dy * (1.f - at.dx));
      }
      if (at.bottom && at.right) {
        grad_x.add(start + c + down + shape.channels, values, at.dy * at.dx);
      }
    }
    store_pack(samples + place, out);
  }
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    sum_y += __shfl_xor_sync(0xffffffffu, sum_y, step);
    sum_x += __shfl_xor_sync(0xffffffffu, sum_x, step);
    sum_mask += __shfl_xor_sync(0xffffffffu, sum_mask, step);
  }
  if (active && item.lane == 0) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    grad_offset[2 * item.mask_index] = static_cast<scalar_t>(broken ? nan : sum_y);
    grad_offset[2 * item.mask_index + 1] = static_cast<scalar_t>(broken ? nan : sum_x);
    if (grad_mask != nullptr) {
      grad_mask[item.mask_index] = static_cast<scalar_t>(broken ? nan : sum_mask);
    }
  }
}

dim3 grid(const DeformShape& shape, int rows) {
  constexpr int kRows = kThreads / kLanes;
  return dim3((rows + kRows - 1) / kRows, shape.taps * shape.offset_groups);
}

void check_type(const Tensor& x) {
  D2EXT_CHECK_VALUE(x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16 ||
                        x.scalar_type() == at::kFloat,
                    "deform_conv2d: x must be Half, BFloat16 or Float, not ", x.scalar_type());
}

// Calls a function with a value of a tensor's element type.
template <typename Function>
void for_type(const Tensor& x, Function function) {
  if (x.scalar_type() == at::kHalf) {
    function(c10::Half());
  } else if (x.scalar_type() == at::kFloat) {
    function(0.f);
  } else {
    function(c10::BFloat16());
  }
}

template <typename scalar_t>
scalar_t* data(const Tensor& tensor) {
  return tensor.defined() ? tensor.data_ptr<scalar_t>() : nullptr;
}

Tensor deform_conv2d(const Tensor& input, const Tensor& weights, const Tensor& offsets,
                     const std::optional<Tensor>& masks, const std::optional<Tensor>& bias,
                     int64_t stride, int64_t padding, int64_t dilation) {
  check_type(input);
  const DeformArguments given(input, weights, offsets, masks, stride, padding, dilation);
  if (bias.has_value()) {
    check_deform_like("bias", *bias, input, {given.out_channels});
  }
  const c10::cuda::CUDAGuard guard(input.device());
  const auto stream = at::cuda::getCurrentCUDAStream();
  return deform_convolve(given, bias, kSliceBytes, [&](const Tensor& samples, int first, int rows) {
    for_type(input, [&](auto zero) {
      using scalar_t = decltype(zero);
      sample_kernel<scalar_t><<<grid(given.shape, rows), kThreads, 0, stream>>>(
          data<scalar_t>(given.x), data<scalar_t>(given.offset), data<scalar_t>(given.mask),
          data<scalar_t>(samples), given.shape, first, rows);
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

Tensor largest(const Tensor& tensor) { return tensor.abs().amax().to(at::kFloat); }

// (G, m, k) times (G, k, n). A single product may be split along k, which those of a batch are not.
Tensor product(const Tensor& a, const Tensor& b) {
  return a.size(0) == 1 ? at::mm(a[0], b[0]).unsqueeze(0) : at::bmm(a, b);
}

// Gradients of x, weight, offset and mask (of no elements without one).
std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv2d_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weights, const Tensor& offsets,
    const std::optional<Tensor>& masks, int64_t stride, int64_t padding, int64_t dilation,
    bool deterministic) {
  check_type(input);
  const DeformArguments given(input, weights, offsets, masks, stride, padding, dilation);
  const DeformShape& shape = given.shape;
  check_deform_like("grad", grad, input,
                    {given.batch, given.out_channels, shape.out_height, shape.out_width});
  deterministic = deterministic && grad.numel() > 0;
  const c10::cuda::CUDAGuard guard(input.device());
  const auto stream = at::cuda::getCurrentCUDAStream();
  const Tensor grads = grad.contiguous(at::MemoryFormat::ChannelsLast);
  const auto floats = input.options().dtype(at::kFloat);
  const at::IntArrayRef cells = given.x.sizes();
  Tensor sum_x = at::zeros({cells[0], cells[2], cells[3], cells[1]},
                           deterministic ? floats.dtype(at::kLong) : floats);
  Tensor sum_weight = at::zeros(given.weight.sizes(), floats);
  Tensor grad_offset = given.maps(offsets.size(1));
  Tensor grad_mask = masks.has_value() ? given.maps(masks->size(1)) : Tensor();
  Tensor scale;
  if (deterministic) {
    // A cell's gradient is a sum over the taps of all output cells of an image, less than 2^22.
    // Terms are at most N times the largest |weight|, |grad| and |mask|: 2^40 parts of that leave
    // room in 63 bits.
    Tensor bound = largest(weights).mul(largest(grad)).mul(double(given.out_channels));
    bound = masks.has_value() ? bound.mul(largest(*masks)) : bound;
    scale = bound.clamp_min(1e-30).reciprocal().mul(double(int64_t(1) << 40));
  }
  const int slice = given.slice(kSliceBytes);
  for (int first = 0; first < shape.rows; first += slice) {
    const int rows = std::min(slice, shape.rows - first);
    const Tensor grad_rows = rows_of(grads, shape, first, rows);
    const Tensor grad_samples = product(grad_rows, given.weight);
    const Tensor samples = given.samples(rows);
    for_type(input, [&](auto zero) {
      using scalar_t = decltype(zero);
      const auto launch = [&](auto sum) {
        gradient_kernel<scalar_t><<<grid(shape, rows), kThreads, 0, stream>>>(
            data<scalar_t>(given.x), data<scalar_t>(given.offset), data<scalar_t>(given.mask),
            data<scalar_t>(grad_samples), data<scalar_t>(samples), sum, data<scalar_t>(grad_offset),
            data<scalar_t>(grad_mask), shape, first, rows);
      };
      if (deterministic) {
        auto* whole = reinterpret_cast<unsigned long long*>(sum_x.data_ptr<int64_t>());
        launch(FixedSum{whole, scale.data_ptr<float>()});
      } else {
        launch(FloatSum{sum_x.data_ptr<float>()});
      }
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    sum_weight.add_(product(grad_rows.transpose(1, 2), samples));
  }
  if (deterministic) {
    sum_x = sum_x.to(at::kDouble).div_(scale.to(at::kDouble));
  }
  const int64_t groups = shape.groups, in_group = shape.channels / groups;
  const Tensor grad_weight =
      sum_weight.view({groups, given.out_channels / groups, shape.taps, in_group})
          .transpose(2, 3)
          .reshape(weights.sizes())
          .to(input.scalar_type());
  return {sum_x.to(input.scalar_type()).permute({0, 3, 1, 2}), grad_weight, grad_offset,
          grad_mask.defined() ? grad_mask : at::empty({0}, input.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(d2ext, CUDA, m) {
  m.impl("deform_conv2d", deform_conv2d);
  m.impl("deform_conv2d_backward", deform_conv2d_backward);
}

}  // namespace d2ext
