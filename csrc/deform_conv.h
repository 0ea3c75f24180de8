// Deformable convolution: what the CPU and the CUDA kernels share.
//
// Letters: B images, C channels, H x W cells of the input, h x w of the output, K taps, N output
// channels, G groups of channels, O groups of offsets. All maps are channels-last in memory. A row
// is one output cell; rows are computed in slices whose samples stay in a cache between the kernel
// that writes them and the matrix product.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "check.h"
#include "host_device.h"

namespace d2ext {

using at::Tensor;

// Groups have a multiple of so many channels: 16 bytes in half precision.
constexpr int kDeformPack = 8;

struct DeformShape {
  int rows;
  int channels, height, width, out_height, out_width, kernel_width, taps;
  int groups, offset_groups, stride, padding, dilation;
};

// One tap's place in an image and what it reads there.
struct DeformSample {
  bool broken, outside;  // NaN; nowhere near the image
  bool top, bottom;      // whether the rows are inside
  bool left, right;      // whether the columns are
  int64_t cell = 0;      // top left, in cells of the image; may be outside
  float dy, dx;          // from there

  D2EXT_HOST_DEVICE DeformSample(const DeformShape& shape, float y, float x) {
    broken = y != y || x != x;
    // At exactly -1 the value is 0 and its slope is not, as in torchvision.
    outside = !(y >= -1.f && y < shape.height && x >= -1.f && x < shape.width);
    if (outside) {
      return;
    }
    const int row = static_cast<int>(std::floor(y)), column = static_cast<int>(std::floor(x));
    top = row >= 0;
    bottom = row + 1 < shape.height;
    left = column >= 0;
    right = column + 1 < shape.width;
    cell = int64_t(row) * shape.width + column;
    dy = y - row;
    dx = x - column;
  }
};

inline void check_deform_like(const char* name, const Tensor& tensor, const Tensor& x,
                              at::IntArrayRef sizes) {
  D2EXT_CHECK_VALUE(tensor.sizes() == sizes, "deform_conv2d: ", name, " must be ", sizes, ", not ",
                    tensor.sizes());
  D2EXT_CHECK_VALUE(tensor.device() == x.device() && tensor.scalar_type() == x.scalar_type(),
                    "deform_conv2d: ", name, " must be ", x.scalar_type(), " on ", x.device(),
                    ", not ", tensor.scalar_type(), " on ", tensor.device());
}

// Checks the arguments, and makes them channels-last.
struct DeformArguments {
  Tensor x, offset, mask, weight;  // weight: (G, N / G, K C / G)
  int64_t batch, out_channels;
  DeformShape shape;

  DeformArguments(const Tensor& input, const Tensor& weights, const Tensor& offsets,
                  const std::optional<Tensor>& masks, int64_t stride, int64_t padding,
                  int64_t dilation) {
    D2EXT_CHECK_VALUE(input.dim() == 4 && weights.dim() == 4 && offsets.dim() == 4,
                      "deform_conv2d: x, weight and offset must have 4 axes, not ", input.sizes(),
                      ", ", weights.sizes(), " and ", offsets.sizes());
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
    D2EXT_CHECK_VALUE(in_group > 0 && taps > 0 && channels > 0 && channels % in_group == 0 &&
                          out_channels % std::max<int64_t>(channels / in_group, 1) == 0,
                      "deform_conv2d: weight ", weights.sizes(), " does not fit x ", input.sizes());
    const int64_t groups = channels / in_group, offset_groups = offsets.size(1) / (2 * taps);
    D2EXT_CHECK_VALUE(offset_groups > 0 && channels % offset_groups == 0,
                      "deform_conv2d: offset must have a multiple of ", 2 * taps,
                      " channels that divides x's, not ", offsets.size(1));
    D2EXT_CHECK_VALUE(in_group % kDeformPack == 0 && channels / offset_groups % kDeformPack == 0,
                      "deform_conv2d: groups must have a multiple of 8 channels; there are ",
                      channels, " in ", groups, " and ", offset_groups, " groups");
    const int64_t height = outputs(2), width = outputs(3);
    D2EXT_CHECK_VALUE(height > 0 && width > 0, "deform_conv2d: the output has no cell for x ",
                      input.sizes(), " and weight ", weights.sizes());
    check_deform_like("weight", weights, input, weights.sizes());
    check_deform_like("offset", offsets, input, {batch, 2 * taps * offset_groups, height, width});
    if (masks.has_value()) {
      check_deform_like("mask", *masks, input, {batch, taps * offset_groups, height, width});
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

  // Rows of a slice whose samples have so many bytes.
  int slice(int64_t bytes) const {
    const int64_t of_row = int64_t(shape.taps) * shape.channels * x.element_size();
    return int(std::clamp<int64_t>(bytes / of_row, 1, std::max(shape.rows, 1)));
  }

  Tensor samples(int64_t rows) const {
    const int64_t columns = int64_t(shape.taps) * shape.channels / shape.groups;
    return at::empty({shape.groups, rows, columns}, x.options());
  }

  Tensor maps(int64_t channels) const {
    return at::empty({batch, channels, shape.out_height, shape.out_width}, x.options(),
                     at::MemoryFormat::ChannelsLast);
  }
};

// (B, N, h, w), channels-last -> (G, rows, N / G) of a slice, as a view.
inline Tensor rows_of(const Tensor& maps, const DeformShape& shape, int64_t first, int64_t rows) {
  const int64_t channels = maps.size(1);
  return maps.permute({0, 2, 3, 1})
      .view({shape.rows, shape.groups, channels / shape.groups})
      .narrow(0, first, rows)
      .transpose(0, 1);
}

// Convolution; sample(samples, first, rows) writes the samples (G, rows, K C / G) of a slice.
template <typename Function>
Tensor deform_convolve(const DeformArguments& given, const std::optional<Tensor>& bias,
                       int64_t slice_bytes, Function sample) {
  const DeformShape& shape = given.shape;
  const int slice = given.slice(slice_bytes);
  Tensor output = given.maps(given.out_channels);
  for (int first = 0; first < shape.rows; first += slice) {
    const int rows = std::min(slice, shape.rows - first);
    const Tensor samples = given.samples(rows);
    sample(samples, first, rows);
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

}  // namespace d2ext
