// Deformable convolution (arXiv 1811.11168) on a CPU, forward: samples as a matrix, then a product.
#include "../deform_conv.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <limits>
#include <numeric>
#include <vector>

#include "vectorize.h"

namespace d2ext {
namespace {

// Bytes of samples in a slice: they stay in the second-level caches.
constexpr int64_t kSliceBytes = int64_t(1) << 20;
// Rows that are worth a thread of their own.
constexpr int64_t kGrain = 16;

// The samples of output cells of a slice.
struct Sampler {
  DeformShape shape;
  const float *x, *offset, *mask;  // mask: nullptr for none
  int first, rows;                 // of the slice
  float* samples;                  // (G, rows, K, C / G)
  std::vector<float> zeros;        // what is read outside the image

  void fill(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      for (int tap = 0; tap < shape.offset_groups * shape.taps; ++tap) {
        sample(row, tap / shape.taps, tap % shape.taps);
      }
    }
  }

  void sample(int64_t slice_row, int group, int tap) const {
    const int64_t row = first + slice_row, cells = int64_t(shape.out_height) * shape.out_width;
    const int64_t index = (row * shape.offset_groups + group) * shape.taps + tap;
    const int64_t cell = row % cells;
    const DeformSample at(shape,
                          cell / shape.out_width * shape.stride - shape.padding +
                              tap / shape.kernel_width * shape.dilation + offset[2 * index],
                          cell % shape.out_width * shape.stride - shape.padding +
                              tap % shape.kernel_width * shape.dilation + offset[2 * index + 1]);
    float weight = mask == nullptr ? 1.f : mask[index];
    if (at.broken) {
      weight = std::numeric_limits<float>::quiet_NaN();
    }
    const float* image = x + row / cells * shape.height * shape.width * shape.channels;
    const int in_group = shape.channels / shape.offset_groups;
    const int of_weights = shape.channels / shape.groups, run = std::gcd(in_group, of_weights);
    for (int c = group * in_group; c < (group + 1) * in_group; c += run) {
      float* target =
          samples + ((c / of_weights * int64_t(rows) + slice_row) * shape.taps + tap) * of_weights +
          c % of_weights;
      if (at.outside) {
        std::fill_n(target, run, weight != weight ? weight : 0.f);
        continue;
      }
      const float* source = image + at.cell * shape.channels + c;
      const int64_t down = int64_t(shape.width) * shape.channels;
      const float* top_left = at.top && at.left ? source : zeros.data();
      const float* top_right = at.top && at.right ? source + shape.channels : zeros.data();
      const float* bottom_left = at.bottom && at.left ? source + down : zeros.data();
      const float* bottom_right =
          at.bottom && at.right ? source + down + shape.channels : zeros.data();
      for (int i = 0; i < run; ++i) {
        const float above = top_left[i] + at.dx * (top_right[i] - top_left[i]);
        const float below = bottom_left[i] + at.dx * (bottom_right[i] - bottom_left[i]);
        target[i] = weight * (above + at.dy * (below - above));
      }
    }
  }
};

Tensor deform_conv2d(const Tensor& input, const Tensor& weights, const Tensor& offsets,
                     const std::optional<Tensor>& masks, const std::optional<Tensor>& bias,
                     int64_t stride, int64_t padding, int64_t dilation) {
  D2EXT_CHECK_VALUE(input.scalar_type() == at::kFloat,
                    "deform_conv2d: on a CPU x must be Float, not ", input.scalar_type());
  const DeformArguments given(input, weights, offsets, masks, stride, padding, dilation);
  if (bias.has_value()) {
    check_deform_like("bias", *bias, input, {given.out_channels});
  }
  Sampler sampler{given.shape, given.x.const_data_ptr<float>(),
                  given.offset.const_data_ptr<float>(),
                  given.mask.defined() ? given.mask.const_data_ptr<float>() : nullptr};
  sampler.zeros.resize(given.shape.channels);
  return deform_convolve(given, bias, kSliceBytes, [&](const Tensor& samples, int first, int rows) {
    sampler.first = first;
    sampler.rows = rows;
    sampler.samples = samples.data_ptr<float>();
    at::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
      vectorized([&] { sampler.fill(begin, end); });
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(d2ext, CPU, m) { m.impl("deform_conv2d", deform_conv2d); }

}  // namespace d2ext
