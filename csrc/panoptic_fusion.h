// Geometry and argument checks that the kernels of panoptic fusion share.
//
// Shapes: n instances with M x M mask logits, S stuff and T thing classes, h x w semantic logits,
// H x W map.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "check.h"
#include "geometry.h"

namespace d2ext {

// a * x + b * y, rounded in the same way everywhere: where the best thing's logit is also
// the best instance's semantic view, their difference must be 0.
template <typename T>
D2EXT_HOST_DEVICE T blend(T a, T x, T b, T y) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == sizeof(float)) {
    return __fmaf_rn(b, y, __fmul_rn(a, x));
  } else {
    return __fma_rn(b, y, __dmul_rn(a, x));
  }
#else
  return a * x + b * y;
#endif
}

// First down, then across.
template <typename T>
D2EXT_HOST_DEVICE T interpolate(const T* values, int64_t pitch, const Tap<T>& y, const Tap<T>& x) {
  const T* top = values + y.low * pitch;
  const T* bottom = values + y.high * pitch;
  const T low = blend(y.low_weight, top[x.low], y.high_weight, bottom[x.low]);
  const T high = blend(y.low_weight, top[x.high], y.high_weight, bottom[x.high]);
  return blend(x.low_weight, low, x.high_weight, high);
}

// A box in whole pixels. The mask is spread over columns x..x + width - 1 and rows alike; of the
// semantic logits the columns x..semantic_right - 1 count. Nothing is cut to the map.
struct WholeBox {
  int32_t x = 0;
  int32_t y = 0;
  int32_t width = 0;
  int32_t height = 0;
  int32_t semantic_right = 0;
  int32_t semantic_bottom = 0;

  D2EXT_HOST_DEVICE bool in_mask(int32_t px, int32_t py) const {
    return px >= x && px < x + width && py >= y && py < y + height;
  }
  D2EXT_HOST_DEVICE bool in_semantic(int32_t px, int32_t py) const {
    return px >= x && px < semantic_right && py >= y && py < semantic_bottom;
  }
  // Columns and rows of the mask, and of either view, within a map.
  D2EXT_HOST_DEVICE Range mask_columns(int32_t size) const {
    return intersect({x, x + width}, {0, size});
  }
  D2EXT_HOST_DEVICE Range mask_rows(int32_t size) const {
    return intersect({y, y + height}, {0, size});
  }
};

// int(x1)..int(x2) for the mask, int(x1)..round(x2), half to even, for the semantic logits; ends
// included. Coordinates are clamped to 2^29; a NaN makes the box empty.
template <typename T>
D2EXT_HOST_DEVICE WholeBox whole_box(const T* box) {
  constexpr double kFar = 1 << 29;
  int32_t cut[4];
  int32_t rounded[4];
  for (int i = 0; i < 4; ++i) {
    double value = static_cast<double>(box[i]);
    if (value != value) {
      return {};
    }
    value = value < -kFar ? -kFar : (value > kFar ? kFar : value);
    cut[i] = static_cast<int32_t>(value);
    rounded[i] = static_cast<int32_t>(rint(value));
  }
  WholeBox whole;
  whole.x = cut[0];
  whole.y = cut[1];
  whole.width = cut[2] - cut[0] + 1 > 0 ? cut[2] - cut[0] + 1 : 0;
  whole.height = cut[3] - cut[1] + 1 > 0 ? cut[3] - cut[1] + 1 : 0;
  whole.semantic_right = rounded[2] + 1;
  whole.semantic_bottom = rounded[3] + 1;
  return whole;
}

inline void check_map_size(const char* name, int64_t height, int64_t width) {
  constexpr int64_t kMaxSide = 1 << 29;
  D2EXT_CHECK_VALUE(height > 0 && width > 0 && height < kMaxSide && width < kMaxSide, name,
                    ": size must be (height, width), both >= 1 and < 2^29, got (", height, ", ",
                    width, ")");
}

// Raises for wrong ranks, sizes, dtypes and devices; reads no tensor data.
inline void check_instances(const char* name, const at::Tensor& masks, const at::Tensor& boxes,
                            const at::Tensor& classes) {
  D2EXT_CHECK_VALUE(masks.dim() == 3 && masks.size(1) > 0 && masks.size(2) > 0, name,
                    ": masks must have shape (n, M, M) with M >= 1, got ", masks.sizes());
  const int64_t count = masks.size(0);
  D2EXT_CHECK_VALUE(at::isFloatingType(masks.scalar_type()), name,
                    ": masks must be floating point, got ", masks.scalar_type());
  D2EXT_CHECK_VALUE(boxes.dim() == 2 && boxes.size(0) == count && boxes.size(1) == 4, name,
                    ": boxes must have shape (", count, ", 4), one box per mask, got ",
                    boxes.sizes());
  D2EXT_CHECK_VALUE(at::isFloatingType(boxes.scalar_type()), name,
                    ": boxes must be floating point, in pixels, got ", boxes.scalar_type());
  D2EXT_CHECK_VALUE(classes.dim() == 1 && classes.size(0) == count, name,
                    ": classes must have shape (", count, ",), got ", classes.sizes());
  D2EXT_CHECK_VALUE(classes.scalar_type() == at::kLong, name, ": classes must be int64, got ",
                    classes.scalar_type());
  D2EXT_CHECK_VALUE(boxes.device() == masks.device() && classes.device() == masks.device(), name,
                    ": all tensors must be on one device, got ", masks.device(), ", ",
                    boxes.device(), " and ", classes.device());
  D2EXT_CHECK_VALUE(count < std::numeric_limits<int32_t>::max(), name,
                    ": too many instances: ", count);
}

inline void check_prune_inputs(const at::Tensor& masks, const at::Tensor& boxes,
                               const at::Tensor& classes, const at::Tensor& scores, int64_t height,
                               int64_t width) {
  check_instances("prune_masks", masks, boxes, classes);
  D2EXT_CHECK_VALUE(scores.dim() == 1 && scores.size(0) == masks.size(0),
                    "prune_masks: scores must have shape (", masks.size(0), ",), got ",
                    scores.sizes());
  D2EXT_CHECK_VALUE(scores.device() == masks.device(), "prune_masks: scores must be on ",
                    masks.device(), ", got ", scores.device());
  check_map_size("prune_masks", height, width);
}

inline void check_fusion_inputs(const at::Tensor& score, const at::Tensor& boxes,
                                const at::Tensor& classes, const at::Tensor& masks, int64_t height,
                                int64_t width, int64_t num_stuff) {
  check_instances("fuse_panoptic", masks, boxes, classes);
  D2EXT_CHECK_VALUE(score.dim() == 3 && score.size(1) > 0 && score.size(2) > 0,
                    "fuse_panoptic: score must have shape (S + T, h, w) with h, w >= 1, got ",
                    score.sizes());
  D2EXT_CHECK_VALUE(at::isFloatingType(score.scalar_type()),
                    "fuse_panoptic: score must be floating point, got ", score.scalar_type());
  D2EXT_CHECK_VALUE(score.device() == masks.device(), "fuse_panoptic: score is on ", score.device(),
                    " but masks are on ", masks.device());
  D2EXT_CHECK_VALUE(num_stuff > 0 && num_stuff < score.size(0),
                    "fuse_panoptic: num_stuff must leave stuff and things, so lie in 1..",
                    score.size(0) - 1, ", got ", num_stuff);
  check_map_size("fuse_panoptic", height, width);
}

}  // namespace d2ext
