// Argument checks, memory layout and operators of corner pooling that its kernels share.
//
// Shapes: B images, C channels, H x W cells.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/MemoryFormat.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <tuple>

#include "check.h"

namespace d2ext {

inline void check_map(const char* name, const char* argument, const at::Tensor& x) {
  const auto dtype = x.scalar_type();
  D2EXT_CHECK_VALUE(x.dim() == 4, name, ": ", argument, " must have shape (B, C, H, W), got ",
                    x.sizes());
  D2EXT_CHECK_VALUE(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16,
      name, ": ", argument, " must be floating point: float32, float64, float16 or bfloat16, got ",
      dtype);
}

// Raises unless `second` goes with `first`, which has passed check_map.
inline void check_same(const char* name, const char* first_argument, const at::Tensor& first,
                       const char* second_argument, const at::Tensor& second) {
  D2EXT_CHECK_VALUE(first.sizes() == second.sizes(), name, ": ", first_argument, " and ",
                    second_argument, " must have one shape, got ", first.sizes(), " and ",
                    second.sizes());
  D2EXT_CHECK_VALUE(first.scalar_type() == second.scalar_type(), name, ": ", first_argument,
                    " and ", second_argument, " must have one dtype, got ", first.scalar_type(),
                    " and ", second.scalar_type());
  D2EXT_CHECK_VALUE(first.device() == second.device(), name, ": ", first_argument, " and ",
                    second_argument, " must be on one device, got ", first.device(), " and ",
                    second.device());
}

inline void check_axis(const char* name, int64_t axis) {
  D2EXT_CHECK_VALUE(axis == 2 || axis == 3, name, ": axis must be 2 (H) or 3 (W), got ", axis);
}

// The format in which a map is read and its result written: channels_last if the map has it.
inline at::MemoryFormat format_of(const at::Tensor& x) {
  return !x.is_contiguous() && x.is_contiguous(at::MemoryFormat::ChannelsLast)
             ? at::MemoryFormat::ChannelsLast
             : at::MemoryFormat::Contiguous;
}

inline at::Tensor empty_map(const at::Tensor& x) {
  return at::empty_like(x, x.options().memory_format(format_of(x)));
}

// A dense map as lines along one axis: element k of line (o, i) is number
// (o * length + k) * inner + i of the memory.
struct Lines {
  int64_t outer;
  int64_t length;
  int64_t inner;
};

inline Lines lines_of(const at::Tensor& x, at::MemoryFormat format, int64_t axis) {
  const bool channels_last = format == at::MemoryFormat::ChannelsLast;
  if (axis == 2) {
    return channels_last ? Lines{x.size(0), x.size(2), x.size(3) * x.size(1)}
                         : Lines{x.size(0) * x.size(1), x.size(2), x.size(3)};
  }
  return channels_last ? Lines{x.size(0) * x.size(2), x.size(3), x.size(1)}
                       : Lines{x.size(0) * x.size(1) * x.size(2), x.size(3), 1};
}

// The operators on one device, given its kernels:
//   Kernels::scan<scalar_t>(x, out, lines, reverse): out = running maximum
//   Kernels::scan_backward<scalar_t>(x, grad, grad_x, lines, reverse)
template <typename Kernels>
at::Tensor corner_pool(const at::Tensor& x, int64_t axis, bool reverse) {
  check_map("corner_pool", "input", x);
  check_axis("corner_pool", axis);
  const c10::OptionalDeviceGuard guard(x.device());
  const auto format = format_of(x);
  at::Tensor out = empty_map(x);
  if (x.numel() == 0) {
    return out;
  }
  const at::Tensor dense = x.contiguous(format);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "corner_pool", [&] {
    Kernels::template scan<scalar_t>(dense.const_data_ptr<scalar_t>(),
                                     out.mutable_data_ptr<scalar_t>(), lines_of(x, format, axis),
                                     reverse);
  });
  return out;
}

template <typename Kernels>
at::Tensor corner_pool_backward(const at::Tensor& grad, const at::Tensor& x, int64_t axis,
                                bool reverse) {
  check_map("corner_pool_backward", "input", x);
  check_axis("corner_pool_backward", axis);
  check_same("corner_pool_backward", "input", x, "grad", grad);
  const c10::OptionalDeviceGuard guard(x.device());
  const auto format = format_of(x);
  at::Tensor grad_x = empty_map(x);
  if (x.numel() == 0) {
    return grad_x;
  }
  const at::Tensor dense = x.contiguous(format);
  const at::Tensor dense_grad = grad.contiguous(format);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, x.scalar_type(), "corner_pool_backward", [&] {
        Kernels::template scan_backward<scalar_t>(
            dense.const_data_ptr<scalar_t>(), dense_grad.const_data_ptr<scalar_t>(),
            grad_x.mutable_data_ptr<scalar_t>(), lines_of(x, format, axis), reverse);
      });
  return grad_x;
}

}  // namespace d2ext
