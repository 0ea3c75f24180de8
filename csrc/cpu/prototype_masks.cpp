// CPU kernels of prototype mask assembly. A detection costs what its box covers: probabilities are
// computed row by row inside it, in a buffer of one row, and used at once.
#include "../prototype_masks.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../exponential.h"
#include "../geometry.h"
#include "vectorize.h"

namespace d2ext {
namespace {

using at::Tensor;

// Rows of the packed prototypes are padded to a multiple of this.
constexpr int64_t kLanes = 16;

inline int64_t round_down(int64_t value, int64_t step) { return value / step * step; }
inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// ---------------------------------------------------------------- loops over a row

// sigmoid(prototypes . coefficients) of the cells [begin, end), into output.
// prototypes: (channels, stride) of one grid row.
template <typename T>
inline void probability_row(const T* __restrict__ prototypes, int64_t stride, const T* coefficients,
                            int64_t channels, int64_t begin, int64_t end, T* __restrict__ output) {
  std::fill(output + begin, output + end, T(0));
  int64_t c = 0;
  // Four channels at a time: the sums are loaded and stored a quarter as often.
  for (; c + 4 <= channels; c += 4) {
    const T* p = prototypes + c * stride;
    const T* k = coefficients + c;
    for (int64_t x = begin; x < end; ++x) {
      output[x] +=
          p[x] * k[0] + p[x + stride] * k[1] + p[x + 2 * stride] * k[2] + p[x + 3 * stride] * k[3];
    }
  }
  for (; c < channels; ++c) {
    for (int64_t x = begin; x < end; ++x) {
      output[x] += prototypes[c * stride + x] * coefficients[c];
    }
  }
  for (int64_t x = begin; x < end; ++x) {
    output[x] = sigmoid(output[x]);
  }
}

// output[x] = low_weight[x] * cells[low[x]] + high_weight[x] * cells[high[x]] on [begin, end).
template <typename T>
inline void interpolate_row(const T* cells, const int32_t* low, const int32_t* high,
                            const T* low_weight, const T* high_weight, int64_t begin, int64_t end,
                            T* __restrict__ output) {
  for (int64_t x = begin; x < end; ++x) {
    output[x] = low_weight[x] * cells[low[x]] + high_weight[x] * cells[high[x]];
  }
}

// output[x] = low_weight * low[x] + high_weight * high[x] > threshold on [begin, end).
template <typename T>
inline void threshold_row(const T* low, const T* high, T low_weight, T high_weight, T threshold,
                          int64_t begin, int64_t end, uint8_t* __restrict__ output) {
  for (int64_t x = begin; x < end; ++x) {
    output[x] = low_weight * low[x] + high_weight * high[x] > threshold;
  }
}

// For one detection and `count` grid rows, with grad_logits = d loss / d logit of each cell:
//   grad_prototypes[y][c][x] += coefficients[c] * grad_logits[y][x]
//   grad_coefficients[c] = sum over y and x of prototypes[y][c][x] * grad_logits[y][x]
// prototypes and grad_prototypes: (count, channels, stride); grad_logits: (count, stride).
template <typename T>
inline void gradient_rows(const T* prototypes, int64_t stride, const T* coefficients,
                          int64_t channels, const T* __restrict__ grad_logits, int64_t count,
                          int64_t begin, int64_t end, T* __restrict__ grad_prototypes,
                          T* grad_coefficients) {
  for (int64_t c = 0; c < channels; ++c) {
    const T coefficient = coefficients[c];
    T sum = 0;
    for (int64_t y = 0; y < count; ++y) {
      const T* cells = prototypes + (y * channels + c) * stride;
      T* target = grad_prototypes + (y * channels + c) * stride;
      const T* grads = grad_logits + y * stride;
#pragma omp simd reduction(+ : sum)
      for (int64_t x = begin; x < end; ++x) {
        sum += cells[x] * grads[x];
        target[x] += grads[x] * coefficient;
      }
    }
    grad_coefficients[c] = sum;
  }
}

// ---------------------------------------------------------------- arguments

// Tasks 0 to count - 1, taken one by one by whichever thread is free: boxes differ a lot in size.
class TaskQueue {
 public:
  explicit TaskQueue(int64_t count) : count_(count) {}

  bool pop(int64_t& task) {
    task = next_.fetch_add(1, std::memory_order_relaxed);
    return task < count_;
  }

 private:
  std::atomic<int64_t> next_{0};
  int64_t count_;
};

// Calls worker(queue) on every thread that has something to do.
template <typename Worker>
void parallel_tasks(int64_t count, const Worker& worker) {
  TaskQueue queue(count);
  const int64_t threads = std::min<int64_t>(count, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      vectorized([&] { worker(queue); });
    }
  });
}

// Rows per task, so that few detections still keep every thread busy.
inline int64_t rows_per_task(int64_t detections, int64_t rows) {
  const int64_t wanted = 4 * at::get_num_threads();
  const int64_t bands = std::clamp<int64_t>(wanted / std::max<int64_t>(detections, 1), 1, rows);
  return (rows + bands - 1) / bands;
}

template <typename T>
struct MaskInputs {
  int64_t images;
  int64_t height;
  int64_t width;
  int64_t channels;
  int64_t detections;
  int64_t stride;  // width rounded up to a multiple of kLanes
  T padding;

  at::Tensor prototypes;    // (B, h, k, stride); past the width: 0
  at::Tensor coefficients;  // (N, k)
  at::Tensor boxes;         // (N, 4)
  at::Tensor batch_index;   // (N,), or undefined: all 0

  const T* prototype_row(int64_t image, int64_t y) const {
    return prototypes.const_data_ptr<T>() + (image * height + y) * channels * stride;
  }
  const T* coefficient_row(int64_t n) const {
    return coefficients.const_data_ptr<T>() + n * channels;
  }
  const T* box(int64_t n) const { return boxes.const_data_ptr<T>() + n * 4; }
  int64_t image(int64_t n) const {
    return batch_index.defined() ? batch_index.const_data_ptr<int64_t>()[n] : 0;
  }

  // Probabilities of the cells `range` of row y, into `row`; 0 in what is left of its kLanes.
  inline void probabilities(int64_t n, int64_t y, Range range, T* row) const {
    const int64_t begin = round_down(range.begin, kLanes);
    const int64_t end = round_up(range.end, kLanes);
    probability_row(prototype_row(image(n), y), stride, coefficient_row(n), channels, begin, end,
                    row);
    std::fill(row + begin, row + range.begin, T(0));
    std::fill(row + range.end, row + end, T(0));
  }
};

// (B, h, w, k) of any strides and dtype -> (B, h, k, stride), in T.
template <typename T, typename scalar_t>
void pack_prototypes(const at::Tensor& source, at::Tensor& target) {
  const scalar_t* from = source.const_data_ptr<scalar_t>();
  T* to = target.mutable_data_ptr<T>();
  const int64_t height = source.size(1);
  const int64_t width = source.size(2);
  const int64_t channels = source.size(3);
  const int64_t stride = target.size(3);
  const auto steps = source.strides();
  const int64_t rows = source.size(0) * height;
  const int64_t grain = std::max<int64_t>(1, 16384 / (channels * width));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const scalar_t* row = from + (r / height) * steps[0] + (r % height) * steps[1];
      T* packed = to + r * channels * stride;
      for (int64_t c = 0; c < channels; ++c) {
        const scalar_t* cells = row + c * steps[3];
        for (int64_t x = 0; x < width; ++x) {
          packed[c * stride + x] = static_cast<T>(cells[x * steps[2]]);
        }
        std::fill(packed + c * stride + width, packed + (c + 1) * stride, T(0));
      }
    }
  });
}

// Inputs must have passed check_mask_inputs. Raises IndexError for a wrong batch_index.
template <typename T>
MaskInputs<T> make_mask_inputs(const at::Tensor& prototypes, const at::Tensor& coefficients,
                               const at::Tensor& boxes,
                               const std::optional<at::Tensor>& batch_index, double padding) {
  const at::Tensor batched = prototypes.dim() == 3 ? prototypes.unsqueeze(0) : prototypes;
  MaskInputs<T> in;
  in.images = batched.size(0);
  in.height = batched.size(1);
  in.width = batched.size(2);
  in.channels = batched.size(3);
  in.detections = coefficients.size(0);
  in.stride = round_up(in.width, kLanes);
  in.padding = static_cast<T>(padding);
  const auto dtype = std::is_same_v<T, double> ? at::kDouble : at::kFloat;
  in.coefficients = coefficients.to(dtype).contiguous();
  in.boxes = boxes.to(dtype).contiguous();
  if (batch_index.has_value()) {
    in.batch_index = batch_index->contiguous();
    const int64_t* index = in.batch_index.template const_data_ptr<int64_t>();
    for (int64_t n = 0; n < in.detections; ++n) {
      D2EXT_CHECK_INDEX(index[n] >= 0 && index[n] < in.images, "batch_index[", n, "] is ", index[n],
                        ", but prototypes are of ", in.images, " images");
    }
  }
  in.prototypes = at::empty({in.images, in.height, in.channels, in.stride},
                            prototypes.options().dtype(dtype).memory_format(std::nullopt));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, prototypes.scalar_type(),
                                  "pack_prototypes",
                                  [&] { pack_prototypes<T, scalar_t>(batched, in.prototypes); });
  return in;
}

// ---------------------------------------------------------------- assemble_masks, forward

template <typename T, typename scalar_t>
void forward_kernel(const MaskInputs<T>& in, Tensor& masks) {
  scalar_t* out = masks.mutable_data_ptr<scalar_t>();
  const int64_t band = rows_per_task(in.detections, in.height);
  const int64_t bands = (in.height + band - 1) / band;
  parallel_tasks(in.detections * bands, [&](TaskQueue& queue) {
    std::vector<T> row(in.stride);
    for (int64_t task; queue.pop(task);) {
      const int64_t n = task / bands;
      const T* box = in.box(n);
      const Range xs = crop_range<T>(box[0], box[2], in.width, in.padding);
      const Range ys = crop_range<T>(box[1], box[3], in.height, in.padding);
      const int64_t first = task % bands * band;
      for (int64_t y = first; y < std::min(first + band, in.height); ++y) {
        scalar_t* target = out + (n * in.height + y) * in.width;
        if (xs.empty() || !ys.contains(y)) {
          std::fill_n(target, in.width, scalar_t(0));
          continue;
        }
        in.probabilities(n, y, xs, row.data());
        std::fill(target, target + xs.begin, scalar_t(0));
        std::copy(row.data() + xs.begin, row.data() + xs.end, target + xs.begin);
        std::fill(target + xs.end, target + in.width, scalar_t(0));
      }
    }
  });
}

Tensor assemble_masks_cpu(const Tensor& prototypes, const Tensor& coefficients, const Tensor& boxes,
                          const std::optional<Tensor>& batch_index, double padding) {
  check_mask_inputs("assemble_masks", prototypes, coefficients, boxes, batch_index, padding);
  Tensor masks = at::empty({coefficients.size(0), prototypes.size(-3), prototypes.size(-2)},
                           prototypes.options().memory_format(std::nullopt));
  if (masks.numel() == 0) {
    return masks;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, prototypes.scalar_type(), "assemble_masks_cpu", [&] {
        using T = at::opmath_type<scalar_t>;
        forward_kernel<T, scalar_t>(
            make_mask_inputs<T>(prototypes, coefficients, boxes, batch_index, padding), masks);
      });
  return masks;
}

// ---------------------------------------------------------------- assemble_masks, backward

// Rows of the grid are shared out in bands of fixed height, so that sums are formed in the same
// order whatever the number of threads.
constexpr int64_t kBandRows = 8;

template <typename T, typename scalar_t>
void backward_kernel(const MaskInputs<T>& in, const Tensor& grad, Tensor& grad_packed,
                     Tensor& grad_coefficients) {
  const scalar_t* grads = grad.const_data_ptr<scalar_t>();
  std::vector<std::vector<int64_t>> members(in.images);
  for (int64_t n = 0; n < in.detections; ++n) {
    members[in.image(n)].push_back(n);
  }
  const int64_t bands = (in.height + kBandRows - 1) / kBandRows;
  // A detection belongs to one image, so that partial sums need no image axis.
  Tensor partial = at::zeros({bands, in.detections, in.channels}, grad_packed.options());
  T* partials = partial.mutable_data_ptr<T>();
  T* packed = grad_packed.mutable_data_ptr<T>();
  parallel_tasks(in.images * bands, [&](TaskQueue& queue) {
    std::vector<T> logits(kBandRows * in.stride);
    for (int64_t task; queue.pop(task);) {
      const int64_t image = task / bands;
      const int64_t band = task % bands;
      const Range rows = {static_cast<int32_t>(band * kBandRows),
                          static_cast<int32_t>(std::min((band + 1) * kBandRows, in.height))};
      for (const int64_t n : members[image]) {
        const T* box = in.box(n);
        const Range xs = crop_range<T>(box[0], box[2], in.width, in.padding);
        const Range ys = intersect(crop_range<T>(box[1], box[3], in.height, in.padding), rows);
        if (xs.empty() || ys.empty()) {
          continue;
        }
        for (int64_t y = ys.begin; y < ys.end; ++y) {
          T* row = logits.data() + (y - ys.begin) * in.stride;
          in.probabilities(n, y, xs, row);
          const scalar_t* above = grads + (n * in.height + y) * in.width;
          for (int64_t x = xs.begin; x < xs.end; ++x) {
            row[x] = static_cast<T>(above[x]) * (row[x] * (T(1) - row[x]));
          }
        }
        gradient_rows(in.prototype_row(image, ys.begin), in.stride, in.coefficient_row(n),
                      in.channels, logits.data(), ys.size(), round_down(xs.begin, kLanes),
                      round_up(xs.end, kLanes),
                      packed + (image * in.height + ys.begin) * in.channels * in.stride,
                      partials + (band * in.detections + n) * in.channels);
      }
    }
  });
  grad_coefficients = partial.sum(0);
}

std::tuple<Tensor, Tensor> assemble_masks_backward_cpu(const Tensor& grad, const Tensor& prototypes,
                                                       const Tensor& coefficients,
                                                       const Tensor& boxes,
                                                       const std::optional<Tensor>& batch_index,
                                                       double padding) {
  check_mask_inputs("assemble_masks_backward", prototypes, coefficients, boxes, batch_index,
                    padding);
  check_mask_gradient(grad, prototypes, coefficients);
  Tensor grad_prototypes = at::empty_like(prototypes);
  if (coefficients.size(0) == 0) {
    return {grad_prototypes.zero_(), at::zeros_like(coefficients)};
  }
  Tensor grad_coefficients;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, prototypes.scalar_type(), "assemble_masks_backward_cpu", [&] {
        using T = at::opmath_type<scalar_t>;
        const auto in = make_mask_inputs<T>(prototypes, coefficients, boxes, batch_index, padding);
        Tensor grad_packed = at::zeros_like(in.prototypes);
        backward_kernel<T, scalar_t>(in, grad.contiguous(), grad_packed, grad_coefficients);
        const Tensor unpacked = grad_packed.narrow(3, 0, in.width).permute({0, 1, 3, 2});
        grad_prototypes.copy_(prototypes.dim() == 3 ? unpacked.squeeze(0) : unpacked);
      });
  return {grad_prototypes, at::empty_like(coefficients).copy_(grad_coefficients)};
}

// ---------------------------------------------------------------- assemble_binary_masks

// Taps of every index along one output axis, as arrays.
template <typename T>
struct TapTable {
  std::vector<int32_t> low;
  std::vector<int32_t> high;
  std::vector<T> low_weight;
  std::vector<T> high_weight;

  TapTable(int64_t cells, int64_t outputs)
      : low(outputs), high(outputs), low_weight(outputs), high_weight(outputs) {
    const T scale = static_cast<T>(cells) / static_cast<T>(outputs);
    for (int64_t i = 0; i < outputs; ++i) {
      const Tap<T> tap = source_tap<T>(static_cast<int32_t>(i), scale, cells);
      low[i] = tap.low;
      high[i] = tap.high;
      low_weight[i] = tap.low_weight;
      high_weight[i] = tap.high_weight;
    }
  }
};

// One detection's grid rows, interpolated along x to the output's width. An output row reads two
// of them and the next output row mostly the same two, so two are stored.
template <typename T>
class InterpolatedRows {
 public:
  InterpolatedRows(const MaskInputs<T>& in, const TapTable<T>& taps)
      : in_(in), taps_(taps), cells_(in.stride) {
    for (auto& row : rows_) {
      row.resize(taps.low.size());
    }
  }

  void start(int64_t n, const MaskRegion& region) {
    n_ = n;
    region_ = region;
    held_[0] = held_[1] = -1;
    std::fill(cells_.begin(), cells_.end(), T(0));
  }

  // Row y; does not overwrite row `other` if that is held.
  const T* get(int32_t y, int32_t other) {
    for (int slot = 0; slot < 2; ++slot) {
      if (held_[slot] == y) {
        return rows_[slot].data();
      }
    }
    const int slot = held_[0] == other ? 1 : 0;
    held_[slot] = y;
    T* row = rows_[slot].data();
    const Range outputs = region_.out_x;
    if (region_.cell_y.contains(y)) {
      in_.probabilities(n_, y, region_.cell_x, cells_.data());
      interpolate_row(cells_.data(), taps_.low.data(), taps_.high.data(), taps_.low_weight.data(),
                      taps_.high_weight.data(), outputs.begin, outputs.end, row);
    } else {
      std::fill(row + outputs.begin, row + outputs.end, T(0));
    }
    return row;
  }

 private:
  const MaskInputs<T>& in_;
  const TapTable<T>& taps_;
  std::vector<T> cells_;
  std::vector<T> rows_[2];
  int32_t held_[2] = {-1, -1};
  int64_t n_ = 0;
  MaskRegion region_;
};

template <typename T>
void binary_kernel(const MaskInputs<T>& in, int64_t height, int64_t width, T threshold,
                   bool crop_after, uint8_t* out) {
  const TapTable<T> taps_x(in.width, width);
  const TapTable<T> taps_y(in.height, height);
  // Cells outside the box count as 0; pixels cropped at the output are never set.
  const uint8_t background = !crop_after && T(0) > threshold;
  const int64_t band = rows_per_task(in.detections, height);
  const int64_t bands = (height + band - 1) / band;
  parallel_tasks(in.detections * bands, [&](TaskQueue& queue) {
    InterpolatedRows<T> rows(in, taps_x);
    for (int64_t task; queue.pop(task);) {
      const int64_t n = task / bands;
      const int64_t first = task % bands * band;
      const int64_t last = std::min(first + band, height);
      uint8_t* mask = out + n * height * width;
      const MaskRegion region =
          mask_region<T>(in.box(n), in.height, in.width, height, width, crop_after, in.padding);
      const Range ys =
          region.empty()
              ? Range{}
              : intersect(region.out_y, {static_cast<int32_t>(first), static_cast<int32_t>(last)});
      if (ys.empty()) {
        std::memset(mask + first * width, background, (last - first) * width);
        continue;
      }
      rows.start(n, region);
      std::memset(mask + first * width, background, (ys.begin - first) * width);
      for (int64_t y = ys.begin; y < ys.end; ++y) {
        const T* low = rows.get(taps_y.low[y], taps_y.high[y]);
        const T* high = rows.get(taps_y.high[y], taps_y.low[y]);
        uint8_t* row = mask + y * width;
        std::memset(row, background, region.out_x.begin);
        threshold_row(low, high, taps_y.low_weight[y], taps_y.high_weight[y], threshold,
                      region.out_x.begin, region.out_x.end, row);
        std::memset(row + region.out_x.end, background, width - region.out_x.end);
      }
      std::memset(mask + ys.end * width, background, (last - ys.end) * width);
    }
  });
}

Tensor assemble_binary_masks_cpu(const Tensor& prototypes, const Tensor& coefficients,
                                 const Tensor& boxes, const std::optional<Tensor>& batch_index,
                                 int64_t height, int64_t width, double threshold, bool crop_after,
                                 double padding) {
  check_mask_inputs("assemble_binary_masks", prototypes, coefficients, boxes, batch_index, padding);
  check_output_size("assemble_binary_masks", height, width);
  Tensor masks = at::empty({coefficients.size(0), height, width},
                           prototypes.options().dtype(at::kBool).memory_format(std::nullopt));
  if (masks.numel() == 0) {
    return masks;
  }
  uint8_t* out = static_cast<uint8_t*>(masks.mutable_data_ptr());
  if (prototypes.scalar_type() == at::kDouble) {
    binary_kernel<double>(
        make_mask_inputs<double>(prototypes, coefficients, boxes, batch_index, padding), height,
        width, threshold, crop_after, out);
  } else {
    binary_kernel<float>(
        make_mask_inputs<float>(prototypes, coefficients, boxes, batch_index, padding), height,
        width, static_cast<float>(threshold), crop_after, out);
  }
  return masks;
}

}  // namespace

TORCH_LIBRARY_IMPL(d2ext, CPU, m) {
  m.impl("assemble_masks", assemble_masks_cpu);
  m.impl("assemble_masks_backward", assemble_masks_backward_cpu);
  m.impl("assemble_binary_masks", assemble_binary_masks_cpu);
}

}  // namespace d2ext
