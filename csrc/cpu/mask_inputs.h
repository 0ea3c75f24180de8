// Arguments of prototype mask assembly in the layout that the CPU kernels read.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <type_traits>

#include "../prototype_masks.h"
#include "row_kernels.h"

namespace d2ext {

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
      worker(queue);
    }
  });
}

// Rows per task, so that few detections still keep every thread busy.
inline int64_t rows_per_task(int64_t detections, int64_t rows) {
  const int64_t wanted = 4 * at::get_num_threads();
  const int64_t bands = std::clamp<int64_t>(wanted / std::max<int64_t>(detections, 1), 1, rows);
  return (rows + bands - 1) / bands;
}

inline int64_t round_down(int64_t value, int64_t step) { return value / step * step; }
inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

template <typename T>
struct MaskInputs {
  int64_t images;
  int64_t height;
  int64_t width;
  int64_t channels;
  int64_t detections;
  int64_t stride;  // width rounded up to whole vectors
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

  // Probabilities of the cells `range` of row y, into `row` (stride values, zeros elsewhere).
  void probabilities(int64_t n, int64_t y, Range range, T* row) const {
    constexpr int kLanes = Simd<T>::kLanes;
    const int64_t begin = round_down(range.begin, kLanes);
    const int64_t end = round_up(range.end, kLanes);
    row_kernels<T>().probability_row(prototype_row(image(n), y), stride, coefficient_row(n),
                                     channels, begin, end, row);
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
  in.stride = round_up(in.width, Simd<T>::kLanes);
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

}  // namespace d2ext
