// Argument checks that the kernels of prototype mask assembly share.
//
// Shapes: B images, h x w prototype grid, k prototypes, N detections, H x W output.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

#include "check.h"

namespace d2ext {

// Raises for wrong ranks, sizes, dtypes, devices and values; reads no tensor data.
inline void check_mask_inputs(const char* name, const at::Tensor& prototypes,
                              const at::Tensor& coefficients, const at::Tensor& boxes,
                              const std::optional<at::Tensor>& batch_index, double padding) {
  constexpr int64_t kMaxSide = std::numeric_limits<int32_t>::max();
  const auto dtype = prototypes.scalar_type();
  D2EXT_CHECK_VALUE(prototypes.dim() == 3 || prototypes.dim() == 4, name,
                    ": prototypes must have shape (h, w, k) or (B, h, w, k), got ",
                    prototypes.sizes());
  D2EXT_CHECK_VALUE(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16,
      name, ": prototypes must be float32, float64, float16 or bfloat16, got ", dtype);
  const int64_t grid_height = prototypes.size(-3);
  const int64_t grid_width = prototypes.size(-2);
  const int64_t channels = prototypes.size(-1);
  D2EXT_CHECK_VALUE(grid_height > 0 && grid_width > 0 && channels > 0, name,
                    ": prototypes must have h, w, k >= 1, got ", prototypes.sizes());
  D2EXT_CHECK_VALUE(grid_height < kMaxSide && grid_width < kMaxSide && channels < kMaxSide, name,
                    ": prototypes must have h, w, k < 2^31 - 1, got ", prototypes.sizes());
  D2EXT_CHECK_VALUE(coefficients.dim() == 2 && coefficients.size(1) == channels, name,
                    ": coefficients must have shape (N, ", channels,
                    "), as many columns as there are prototypes, got ", coefficients.sizes());
  D2EXT_CHECK_VALUE(coefficients.scalar_type() == dtype, name, ": coefficients are ",
                    coefficients.scalar_type(), " but prototypes are ", dtype,
                    "; convert one to the other's dtype");
  const int64_t detections = coefficients.size(0);
  D2EXT_CHECK_VALUE(boxes.dim() == 2 && boxes.size(0) == detections && boxes.size(1) == 4, name,
                    ": boxes must have shape (", detections,
                    ", 4), one box per row of coefficients, got ", boxes.sizes());
  D2EXT_CHECK_VALUE(at::isFloatingType(boxes.scalar_type()), name,
                    ": boxes must be floating point, relative to the image (0 to 1), got ",
                    boxes.scalar_type());
  D2EXT_CHECK_VALUE(
      coefficients.device() == prototypes.device() && boxes.device() == prototypes.device(), name,
      ": prototypes, coefficients and boxes must be on one device, got ", prototypes.device(), ", ",
      coefficients.device(), " and ", boxes.device());
  if (batch_index.has_value()) {
    D2EXT_CHECK_VALUE(prototypes.dim() == 4, name,
                      ": batch_index needs prototypes of shape (B, h, w, k), got ",
                      prototypes.sizes());
    D2EXT_CHECK_VALUE(batch_index->dim() == 1 && batch_index->size(0) == detections, name,
                      ": batch_index must have shape (", detections, ",), got ",
                      batch_index->sizes());
    D2EXT_CHECK_VALUE(batch_index->scalar_type() == at::kLong, name,
                      ": batch_index must be int64, got ", batch_index->scalar_type());
    D2EXT_CHECK_VALUE(batch_index->device() == prototypes.device(), name,
                      ": batch_index must be on prototypes' device ", prototypes.device(), ", got ",
                      batch_index->device());
  } else {
    D2EXT_CHECK_VALUE(prototypes.dim() == 3 || prototypes.size(0) == 1 || detections == 0, name,
                      ": batch_index is needed to choose among the prototypes of ",
                      prototypes.dim() == 4 ? prototypes.size(0) : 1, " images");
  }
  D2EXT_CHECK_VALUE(prototypes.dim() == 3 || prototypes.size(0) > 0 || detections == 0, name, ": ",
                    detections, " detections, but prototypes of no image");
  D2EXT_CHECK_VALUE(padding >= 0 && std::isfinite(padding), name,
                    ": padding must be finite and >= 0 cells, got ", padding);
}

inline void check_output_size(const char* name, int64_t height, int64_t width) {
  constexpr int64_t kMaxSide = std::numeric_limits<int32_t>::max();
  D2EXT_CHECK_VALUE(height > 0 && width > 0 && height < kMaxSide && width < kMaxSide, name,
                    ": size must be (height, width), both >= 1 and < 2^31 - 1, got (", height, ", ",
                    width, ")");
}

inline void check_mask_gradient(const at::Tensor& grad, const at::Tensor& prototypes,
                                const at::Tensor& coefficients) {
  D2EXT_CHECK_VALUE(grad.dim() == 3 && grad.size(0) == coefficients.size(0) &&
                        grad.size(1) == prototypes.size(-3) && grad.size(2) == prototypes.size(-2),
                    "assemble_masks_backward: grad must have shape (N, h, w) = (",
                    coefficients.size(0), ", ", prototypes.size(-3), ", ", prototypes.size(-2),
                    "), got ", grad.sizes());
  D2EXT_CHECK_VALUE(
      grad.scalar_type() == prototypes.scalar_type() && grad.device() == prototypes.device(),
      "assemble_masks_backward: grad must have prototypes' dtype and device, got ",
      grad.scalar_type(), " on ", grad.device());
}

}  // namespace d2ext
