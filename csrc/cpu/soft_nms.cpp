// Soft non-maximum suppression as CornerNet publishes it (see d2ext/layers/soft_nms.py): a round
// weights all remaining boxes, a vector at a time; only if boxes are discarded are they moved one
// by one.
#include "../soft_nms.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../check.h"
#include "vectorize.h"

namespace d2ext {
namespace {

using at::Tensor;

// Results of a round: arrays with one value for each remaining box.
struct RoundArrays {
  const float* x1;
  const float* y1;
  const float* x2;
  const float* y2;
  const float* scores;
  float* __restrict__ overlaps;
  float* __restrict__ weights;
  float* __restrict__ weighed;
};

// IoUs of box `best` with boxes [begin, end), the factors of their scores, and the scores times
// these. Returns whether one that overlaps falls below the threshold.
template <Method kMethod>
inline bool weigh(const RoundArrays& in, int64_t best, int64_t begin, int64_t end,
                  const Settings& settings) {
  const PixelBox selected = {in.x1[best], in.y1[best], in.x2[best], in.y2[best]};
  const float area = pixel_area(selected);
  int32_t dropped = 0;
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    const PixelBox other = {in.x1[i], in.y1[i], in.x2[i], in.y2[i]};
    const Weighed result = weigh<kMethod>(selected, area, other, in.scores[i], settings);
    dropped |= result.dropped;
    in.overlaps[i] = result.overlap;
    in.weights[i] = result.weight;
    in.weighed[i] = result.score;
  }
  return dropped != 0;
}

inline bool weigh(const RoundArrays& in, int64_t best, int64_t begin, int64_t end,
                  const Settings& settings) {
  bool dropped = false;
  vectorized([&] {
    dropped = settings.method == Method::kHard
                  ? weigh<Method::kHard>(in, best, begin, end, settings)
              : settings.method == Method::kLinear
                  ? weigh<Method::kLinear>(in, best, begin, end, settings)
                  : weigh<Method::kGaussian>(in, best, begin, end, settings);
  });
  return dropped;
}

// The first of the greatest; NaN is the greatest.
inline int64_t first_maximum(const float* values, int64_t begin, int64_t end) {
  constexpr int64_t kLanes = 32;
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, values[begin]);
  const auto raise = [](float& maximum, float value) {
    maximum = (value > maximum) | (value != value) ? value : maximum;
  };
  int64_t i = begin;
  vectorized([&] {
    for (; i + kLanes <= end; i += kLanes) {
      for (int64_t k = 0; k < kLanes; ++k) {
        raise(lanes[k], values[i + k]);
      }
    }
  });
  for (; i < end; ++i) {
    raise(lanes[0], values[i]);
  }
  for (int64_t k = 1; k < kLanes; ++k) {
    raise(lanes[0], lanes[k]);
  }
  const float greatest = lanes[0];
  int64_t place = begin;
  while (!(values[place] == greatest || (values[place] != values[place] && greatest != greatest))) {
    ++place;
  }
  return place;
}

// base^exponent; by squaring where the exponent is a small whole number, as the published one is.
inline float power(float base, float exponent) {
  if (!(exponent >= 0 && exponent <= 64 && exponent == std::floor(exponent))) {
    return std::pow(base, exponent);
  }
  float result = 1;
  for (int bits = static_cast<int>(exponent); bits > 0; bits /= 2, base *= base) {
    result *= bits % 2 == 1 ? base : 1;
  }
  return result;
}

// The boxes of one class in an array from which boxes disappear.
class Suppression {
 public:
  Suppression(const float* boxes, const float* scores, const float* corner_scores, int64_t count,
              const Settings& settings)
      : settings_(settings), corner_scores_(corner_scores), count_(count) {
    for (auto* column : {&x1_, &y1_, &x2_, &y2_, &scores_, &overlaps_, &weights_, &weighed_}) {
      column->resize(count);
    }
    indices_.resize(count);
    std::iota(indices_.begin(), indices_.end(), int64_t(0));
    std::copy(scores, scores + count, scores_.begin());
    for (int64_t i = 0; i < count; ++i) {
      x1_[i] = boxes[4 * i];
      y1_[i] = boxes[4 * i + 1];
      x2_[i] = boxes[4 * i + 2];
      y2_[i] = boxes[4 * i + 3];
    }
  }

  // The number of rows that are not stale.
  int64_t run() {
    const RoundArrays arrays = {x1_.data(),     y1_.data(),       x2_.data(),      y2_.data(),
                                scores_.data(), overlaps_.data(), weights_.data(), weighed_.data()};
    for (int64_t row = 0; row < count_; ++row) {
      swap(row, first_maximum(scores_.data(), row, count_));
      const bool dropped = weigh(arrays, row, row + 1, count_, settings_);
      if (dropped || corner_scores_ != nullptr) {
        settle(row);
      } else {
        std::copy(weighed_.begin() + row + 1, weighed_.begin() + count_, scores_.begin() + row + 1);
      }
    }
    return count_;
  }

  void write(float* boxes, float* scores, int64_t* indices, int64_t first_index) const {
    for (size_t i = 0; i < indices_.size(); ++i) {
      boxes[4 * i] = x1_[i];
      boxes[4 * i + 1] = y1_[i];
      boxes[4 * i + 2] = x2_[i];
      boxes[4 * i + 3] = y2_[i];
      scores[i] = scores_[i];
      indices[i] = first_index + indices_[i];
    }
  }

 private:
  void swap(int64_t a, int64_t b) {
    for (auto* column : {&x1_, &y1_, &x2_, &y2_, &scores_}) {
      std::swap((*column)[a], (*column)[b]);
    }
    std::swap(indices_[a], indices_[b]);
  }

  // Visits the remaining boxes in order: stores their scores, overwrites a box below the threshold
  // with the array's last one (whose copy keeps its former score), and merges into box `row`.
  void settle(int64_t row) {
    const float* corners = corner_scores_;
    float share1 = corners == nullptr ? 0 : corners[2 * row];
    float share2 = corners == nullptr ? 0 : corners[2 * row + 1];
    float x1 = x1_[row] * share1;
    float y1 = y1_[row] * share1;
    float x2 = x2_[row] * share2;
    float y2 = y2_[row] * share2;
    for (int64_t i = row + 1; i < count_;) {
      if (corners != nullptr && overlaps_[i] > 0) {
        // Corner scores stay where they are while boxes move.
        const float share = power(1 - weights_[i], settings_.weight_exp);
        const float first = corners[2 * i] * share;
        const float second = corners[2 * i + 1] * share;
        x1 += x1_[i] * first;
        y1 += y1_[i] * first;
        x2 += x2_[i] * second;
        y2 += y2_[i] * second;
        share1 += first;
        share2 += second;
      }
      if (overlaps_[i] > 0 && weighed_[i] < settings_.score_threshold) {
        --count_;
        if (i == count_) {
          scores_[i] = weighed_[i];
        }
        for (auto* column : {&x1_, &y1_, &x2_, &y2_, &overlaps_, &weights_, &weighed_}) {
          (*column)[i] = (*column)[count_];
        }
        indices_[i] = indices_[count_];
      } else {
        scores_[i] = weighed_[i];
        ++i;
      }
    }
    if (corners != nullptr) {
      x1_[row] = x1 / share1;
      y1_[row] = y1 / share1;
      x2_[row] = x2 / share2;
      y2_[row] = y2 / share2;
    }
  }

  Settings settings_;
  const float* corner_scores_;
  int64_t count_;
  std::vector<float> x1_;
  std::vector<float> y1_;
  std::vector<float> x2_;
  std::vector<float> y2_;
  std::vector<float> scores_;
  std::vector<float> overlaps_;
  std::vector<float> weights_;
  std::vector<float> weighed_;
  std::vector<int64_t> indices_;
};

// boxes (N, 4), scores (N,), corner_scores (N, 2) or none: class by class; sizes: boxes of each
// class. Returns boxes, scores, indices and keep, as d2ext.layers.SoftNMSRows.
std::tuple<Tensor, Tensor, Tensor, Tensor> soft_nms_cpu(const Tensor& boxes, const Tensor& scores,
                                                        const std::optional<Tensor>& corner_scores,
                                                        const Tensor& sizes, int64_t method,
                                                        double sigma, double iou_threshold,
                                                        double score_threshold, double weight_exp) {
  const int64_t count = check_soft_nms(boxes, scores, corner_scores, sizes, method, sigma);
  const Settings settings(method, sigma, iou_threshold, score_threshold, weight_exp);
  const Tensor dense_sizes = sizes.contiguous();
  const int64_t* size = dense_sizes.const_data_ptr<int64_t>();
  const int64_t classes = sizes.size(0);
  std::vector<int64_t> begins(classes + 1, 0);
  for (int64_t c = 0; c < classes; ++c) {
    D2EXT_CHECK_VALUE(size[c] >= 0, "soft_nms: sizes must be >= 0, got ", size[c]);
    begins[c + 1] = begins[c] + size[c];
  }
  D2EXT_CHECK_VALUE(begins[classes] == count, "soft_nms: sizes must add up to the number of boxes ",
                    count, ", got ", begins[classes]);

  const Tensor dense_boxes = boxes.contiguous();
  const Tensor dense_scores = scores.contiguous();
  const Tensor dense_corners = corner_scores.has_value() ? corner_scores->contiguous() : Tensor();
  Tensor out_boxes = at::empty({count, 4}, boxes.options());
  Tensor out_scores = at::empty({count}, boxes.options());
  Tensor indices = at::empty({count}, boxes.options().dtype(at::kLong));
  Tensor keep = at::zeros({count}, boxes.options().dtype(at::kBool));
  const float* from_boxes = dense_boxes.const_data_ptr<float>();
  const float* from_scores = dense_scores.const_data_ptr<float>();
  const float* from_corners =
      dense_corners.defined() ? dense_corners.const_data_ptr<float>() : nullptr;
  float* to_boxes = out_boxes.mutable_data_ptr<float>();
  float* to_scores = out_scores.mutable_data_ptr<float>();
  int64_t* to_indices = indices.mutable_data_ptr<int64_t>();
  bool* to_keep = keep.mutable_data_ptr<bool>();
  // Few boxes are not worth another thread.
  const int64_t grain = count < 256 ? std::max<int64_t>(classes, 1) : 1;
  at::parallel_for(0, classes, grain, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t begin = begins[c];
      Suppression suppression(from_boxes + 4 * begin, from_scores + begin,
                              from_corners == nullptr ? nullptr : from_corners + 2 * begin, size[c],
                              settings);
      std::fill_n(to_keep + begin, suppression.run(), true);
      suppression.write(to_boxes + 4 * begin, to_scores + begin, to_indices + begin, begin);
    }
  });
  return {out_boxes, out_scores, indices, keep};
}

}  // namespace

TORCH_LIBRARY_IMPL(d2ext, CPU, m) { m.impl("soft_nms", soft_nms_cpu); }

}  // namespace d2ext
