// Deformable convolution (arXiv 1811.11168): the samples of all taps as a matrix, in the dtype of the
// arguments, and matrix products, in half precision by tensor cores.
//
// Letters: B images, C channels, H x W cells of the input, h x w of the output, K taps, N output
// channels, G groups of channels, O groups of offsets. All maps are channels-last in memory, so
// that eight lanes read one cell's channels together. A row is one output cell; rows are computed
// in slices whose samples stay in the GPU's second-level cache between the kernel that writes them
// and the product.
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../check.h"
#include "packs.cuh"

namespace d2ext {
namespace {

using at::Tensor;

constexpr int kLanes = 8;     // threads that share a sample's place
constexpr int kChannels = 8;  // channels of a thread at a time: 16 bytes in half precision
constexpr int kThreads = 256;
// Bytes of samples in a slice. An H100 has 50 MB of second-level cache.
constexpr int64_t kSliceBytes = int64_t(24) << 20;

struct Shape {
  int rows;
  int channels, height, width, out_height, out_width, kernel_width, taps;
  int groups, offset_groups, stride, padding, dilation;
};

// One tap's place in an image and what it reads there.
struct Sample {
  bool broken, outside;  // NaN; nowhere near the image
  bool top, bottom;      // whether the rows are inside
  bool left, right;      // whether the columns are
  int64_t cell = 0;      // top left, in cells of the image; may be outside
  float dy, dx;          // from there

  __device__ Sample(const Shape& shape, float y, float x) {
    broken = y != y || x != x;
    // At exactly -1 the value is 0 and its slope is not, as in torchvision.
    outside = !(y >= -1.f && y < shape.height && x >= -1.f && x < shape.width);
    if (outside) {
      return;
    }
    const int row = static_cast<int>(floorf(y)), column = static_cast<int>(floorf(x));
    top = row >= 0;
    bottom = row + 1 < shape.height;
    left = column >= 0;
    right = column + 1 < shape.width;
    cell = int64_t(row) * shape.width + column;
    dy = y - row;
    dx = x - column;
  }
};

// The values of eight channels in the four cells around a place; 0 outside.
template <typename scalar_t>
struct Corners {
  using pack_t = Pack<scalar_t, kChannels>;
  pack_t top_left, top_right, bottom_left, bottom_right;

  __device__ Corners(const scalar_t* source, const Sample& at, const Shape& shape) {
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

  __device__ float value(int i, const Sample& at) const {
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

  __device__ Item(const Shape& shape, const scalar_t* x_data, const scalar_t* offset, int index,
                  int first_row)
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
  __device__ int64_t place(const Shape& shape, int channel, int rows) const {
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
                  const scalar_t* __restrict__ mask, scalar_t* __restrict__ samples, Shape shape,
                  int first_row, int rows) {
  const int index = (blockIdx.x * kThreads + threadIdx.x) / kLanes;
  if (index >= rows) {
    return;
  }
  const Item<scalar_t> item(shape, x, offset, index, first_row);
  const Sample at(shape, item.y, item.x);
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
                    Shape shape, int first_row, int rows) {
  const int index = (blockIdx.x * kThreads + threadIdx.x) / kLanes;
  const bool active = index < rows;  // all lanes stay for the sums over them
  const Item<scalar_t> item(shape, x, offset, active ? index : 0, first_row);
  const Sample at(shape, item.y, item.x);
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

void check_like(const char* name, const Tensor& tensor, const Tensor& x, at::IntArrayRef sizes) {
  D2EXT_CHECK_VALUE(tensor.sizes() == sizes, "deform_conv2d: ", name, " must be ", sizes, ", not ",
                    tensor.sizes());
  D2EXT_CHECK_VALUE(tensor.device() == x.device() && tensor.scalar_type() == x.scalar_type(),
                    "deform_conv2d: ", name, " must be ", x.scalar_type(), " on ", x.device(),
                    ", not ", tensor.scalar_type(), " on ", tensor.device());
}

// Checks the arguments, and makes them channels-last.
struct Arguments {
  Tensor x, offset, mask, weight;  // weight: (G, N / G, K C / G)
  int64_t batch, out_channels;
  Shape shape;

  Arguments(const Tensor& input, const Tensor& weights, const Tensor& offsets,
            const std::optional<Tensor>& masks, int64_t stride, int64_t padding, int64_t dilation) {
    D2EXT_CHECK_VALUE(input.dim() == 4 && weights.dim() == 4 && offsets.dim() == 4,
                      "deform_conv2d: x, weight and offset must have 4 axes, not ", input.sizes(),
                      ", ", weights.sizes(), " and ", offsets.sizes());
    D2EXT_CHECK_VALUE(input.scalar_type() == at::kHalf || input.scalar_type() == at::kBFloat16 ||
                          input.scalar_type() == at::kFloat,
                      "deform_conv2d: x must be Half, BFloat16 or Float, not ",
                      input.scalar_type());
    D2EXT_CHECK_VALUE(stride > 0 && dilation > 0 && padding >= 0,
                      "deform_conv2d: stride and dilation must be at least 1, padding 0, not ",
                      stride, ", ", dilation, " and ", padding);
    batch = input.size(0);
    out_channels = weights.size(0);
    const int64_t channels = input.size(1), in_group = weights.size(1);
    const int64_t taps = weights.size(2) * weights.size(3);
    const auto outputs = [&](int axis) {
      const int64_t reach = dilation * (weights.size(axis) - 1) + 1;
      return (input.size(axis) + 2 * padding - reach) / stride + 1;
    };
    D2EXT_CHECK_VALUE(in_group > 0 && taps > 0 && channels % in_group == 0 &&
                          out_channels % std::max<int64_t>(channels / in_group, 1) == 0,
                      "deform_conv2d: weight ", weights.sizes(), " does not fit x ", input.sizes());
    const int64_t groups = channels / in_group, offset_groups = offsets.size(1) / (2 * taps);
    D2EXT_CHECK_VALUE(offset_groups > 0 && channels % offset_groups == 0,
                      "deform_conv2d: offset must have a multiple of ", 2 * taps,
                      " channels that divides x's, not ", offsets.size(1));
    D2EXT_CHECK_VALUE(in_group % kChannels == 0 && channels / offset_groups % kChannels == 0,
                      "deform_conv2d: groups must have a multiple of 8 channels; there are ",
                      channels, " in ", groups, " and ", offset_groups, " groups");
    const int64_t height = outputs(2), width = outputs(3);
    D2EXT_CHECK_VALUE(height > 0 && width > 0, "deform_conv2d: the output has no cell for x ",
                      input.sizes(), " and weight ", weights.sizes());
    check_like("weight", weights, input, weights.sizes());
    check_like("offset", offsets, input, {batch, 2 * taps * offset_groups, height, width});
    if (masks.has_value()) {
      check_like("mask", *masks, input, {batch, taps * offset_groups, height, width});
      mask = masks->contiguous(at::MemoryFormat::ChannelsLast);
    }
    x = input.contiguous(at::MemoryFormat::ChannelsLast);
    offset = offsets.contiguous(at::MemoryFormat::ChannelsLast);
    weight = weights.reshape({groups, out_channels / groups, in_group, taps})
                 .transpose(2, 3)
                 .reshape({groups, out_channels / groups, taps * in_group});
    D2EXT_CHECK_VALUE(batch * height * width < int64_t(1) << 31 && taps * offset_groups < 1 << 16,
                      "deform_conv2d: 2^31 output cells, or 2^16 offsets of one, are too many");
    shape = {int(batch * height * width),
             int(channels),
             int(input.size(2)),
             int(input.size(3)),
             int(height),
             int(width),
             int(weights.size(3)),
             int(taps),
             int(groups),
             int(offset_groups),
             int(stride),
             int(padding),
             int(dilation)};
  }

  // Rows of a slice.
  int slice() const {
    const int64_t bytes = int64_t(shape.taps) * shape.channels * x.element_size();
    return int(std::clamp<int64_t>(kSliceBytes / bytes, 1, std::max(shape.rows, 1)));
  }

  Tensor samples(int64_t rows) const {
    const int64_t columns = int64_t(shape.taps) * shape.channels / shape.groups;
    return at::empty({shape.groups, rows, columns}, x.options());
  }

  Tensor maps(int64_t channels) const {
    return at::empty({batch, channels, shape.out_height, shape.out_width}, x.options(),
                     at::MemoryFormat::ChannelsLast);
  }

  dim3 grid(int rows) const {
    constexpr int kRows = kThreads / kLanes;
    return dim3((rows + kRows - 1) / kRows, shape.taps * shape.offset_groups);
  }
};

// (B, N, h, w), channels-last -> (G, rows, N / G) of a slice, as a view.
Tensor rows_of(const Tensor& maps, const Shape& shape, int64_t first, int64_t rows) {
  const int64_t channels = maps.size(1);
  return maps.permute({0, 2, 3, 1})
      .view({shape.rows, shape.groups, channels / shape.groups})
      .narrow(0, first, rows)
      .transpose(0, 1);
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
  const Arguments given(input, weights, offsets, masks, stride, padding, dilation);
  if (bias.has_value()) {
    check_like("bias", *bias, input, {given.out_channels});
  }
  const c10::cuda::CUDAGuard guard(input.device());
  const auto stream = at::cuda::getCurrentCUDAStream();
  const Shape& shape = given.shape;
  Tensor output = given.maps(given.out_channels);
  for (int first = 0; first < shape.rows; first += given.slice()) {
    const int rows = std::min(given.slice(), shape.rows - first);
    const Tensor samples = given.samples(rows);
    for_type(input, [&](auto zero) {
      using scalar_t = decltype(zero);
      sample_kernel<scalar_t><<<given.grid(rows), kThreads, 0, stream>>>(
          data<scalar_t>(given.x), data<scalar_t>(given.offset), data<scalar_t>(given.mask),
          data<scalar_t>(samples), shape, first, rows);
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    Tensor target = rows_of(output, shape, first, rows);
    const Tensor weight = given.weight.transpose(1, 2);
    if (shape.groups > 1) {
      target.copy_(at::bmm(samples, weight));
    } else if (bias.has_value()) {
      Tensor only = target[0];
      at::addmm_out(only, *bias, samples[0], weight[0]);
    } else {
      Tensor only = target[0];
      at::mm_out(only, samples[0], weight[0]);
    }
  }
  if (shape.groups > 1 && bias.has_value()) {
    output.add_(bias->view({1, -1, 1, 1}));
  }
  return output;
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
  const Arguments given(input, weights, offsets, masks, stride, padding, dilation);
  const Shape& shape = given.shape;
  check_like("grad", grad, input,
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
  for (int first = 0; first < shape.rows; first += given.slice()) {
    const int rows = std::min(given.slice(), shape.rows - first);
    const Tensor grad_rows = rows_of(grads, shape, first, rows);
    const Tensor grad_samples = product(grad_rows, given.weight);
    const Tensor samples = given.samples(rows);
    for_type(input, [&](auto zero) {
      using scalar_t = decltype(zero);
      const auto launch = [&](auto sum) {
        gradient_kernel<scalar_t><<<given.grid(rows), kThreads, 0, stream>>>(
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
