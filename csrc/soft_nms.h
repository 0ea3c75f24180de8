// Soft non-maximum suppression: what one round does to a box, shared by the CPU and the CUDA kernel
// so that both agree, and the checks of arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "check.h"
#include "exponential.h"
#include "host_device.h"

namespace d2ext {

enum class Method : int64_t { kHard = 0, kLinear = 1, kGaussian = 2 };

struct Settings {
  Method method;
  float sigma;
  float iou_threshold;
  float score_threshold;
  float weight_exp;

  Settings(int64_t method, double sigma, double iou_threshold, double score_threshold,
           double weight_exp)
      : method(static_cast<Method>(method)),
        sigma(static_cast<float>(sigma)),
        iou_threshold(static_cast<float>(iou_threshold)),
        score_threshold(static_cast<float>(score_threshold)),
        weight_exp(static_cast<float>(weight_exp)) {}
};

// x2 and y2 count as inside.
struct PixelBox {
  float x1, y1, x2, y2;
};

D2EXT_HOST_DEVICE float pixel_area(const PixelBox& box) {
  return (box.x2 - box.x1 + 1) * (box.y2 - box.y1 + 1);
}

// A remaining box's IoU with the selected one, the factor of its score, and the score times this.
struct Weighed {
  float overlap;
  float weight;
  float score;
  int32_t dropped;  // 1: it overlaps and its score falls below the threshold; as wide as the others
};

// area: of the selected box.
template <Method kMethod>
D2EXT_HOST_DEVICE Weighed weigh(const PixelBox& selected, float area, const PixelBox& box,
                                float score, const Settings& settings) {
  const float width = (box.x2 < selected.x2 ? box.x2 : selected.x2) -
                      (box.x1 > selected.x1 ? box.x1 : selected.x1) + 1;
  const float height = (box.y2 < selected.y2 ? box.y2 : selected.y2) -
                       (box.y1 > selected.y1 ? box.y1 : selected.y1) + 1;
  const float common = width * height;
  const float united = area + pixel_area(box) - common;
  const float ratio = common / united;
  // With a coordinate that is not finite it may be NaN.
  const bool touching = (width > 0) & (height > 0) & (ratio == ratio);
  Weighed result;
  result.overlap = touching ? ratio : 0.0f;
  if (kMethod == Method::kGaussian) {
    const float decayed = exponential(-(result.overlap * result.overlap) / settings.sigma);
    result.weight = touching ? decayed : 1.0f;
  } else {
    const float reduced = kMethod == Method::kLinear ? 1 - result.overlap : 0.0f;
    result.weight = result.overlap > settings.iou_threshold ? reduced : 1.0f;
  }
  result.score = score * result.weight;
  // Touching is not enough: with an infinite side the ratio is 0.
  result.dropped = (result.overlap > 0) & (result.score < settings.score_threshold);
  return result;
}

// Raises for wrong shapes, dtypes, devices and values; reads no tensor data. Returns the number of
// boxes.
inline int64_t check_soft_nms(const at::Tensor& boxes, const at::Tensor& scores,
                              const std::optional<at::Tensor>& corner_scores,
                              const at::Tensor& sizes, int64_t method, double sigma) {
  D2EXT_CHECK_VALUE(boxes.dim() == 2, "soft_nms: boxes must have shape (N, 4), got ",
                    boxes.sizes());
  const int64_t count = boxes.size(0);
  const auto check = [&](const char* argument, const at::Tensor& tensor, at::IntArrayRef shape) {
    D2EXT_CHECK_VALUE(tensor.sizes() == shape && tensor.scalar_type() == at::kFloat,
                      "soft_nms: ", argument, " must be float32 of shape ", shape, ", got ",
                      tensor.scalar_type(), " of shape ", tensor.sizes());
    D2EXT_CHECK_VALUE(tensor.device() == boxes.device(), "soft_nms: boxes are on ", boxes.device(),
                      " but ", argument, " is on ", tensor.device());
  };
  check("boxes", boxes, {count, 4});
  check("scores", scores, {count});
  if (corner_scores.has_value()) {
    check("corner_scores", *corner_scores, {count, 2});
  }
  D2EXT_CHECK_VALUE(sizes.dim() == 1 && sizes.scalar_type() == at::kLong,
                    "soft_nms: sizes must be int64 of shape (classes,), got ", sizes.scalar_type(),
                    " of shape ", sizes.sizes());
  D2EXT_CHECK_VALUE(sizes.device() == boxes.device(), "soft_nms: boxes are on ", boxes.device(),
                    " but sizes is on ", sizes.device());
  D2EXT_CHECK_VALUE(method >= 0 && method <= 2,
                    "soft_nms: method must be 0 (hard), 1 (linear) or 2 (gaussian), got ", method);
  D2EXT_CHECK_VALUE(sigma > 0, "soft_nms: sigma must be > 0, got ", sigma);
  return count;
}

}  // namespace d2ext
